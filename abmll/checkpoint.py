"""Checkpoints that survive a kill at any moment: a folder with its final name is whole (`abmll.files`).

Theta and its optimizer are in it once, whole, so that a run goes on with another number of ranks. Beside them lies what
is a rank's own: the inner optimizer, and the generators' states. (Nothing that a run computes draws from those: noise
and data are functions of integers. They are restored for code that a user adds.) Base weights are not stored. All ranks
must see the same folder.
"""

from __future__ import annotations

import json
import random
import warnings
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch

from abmll.distributed import Ranks
from abmll.engine import ThetaEngine
from abmll.files import REMOVED, TEMPORARY, damage, new_partial, publish, read_json, remove_whole, sweep
from abmll.tensor_files import load_state, save_state

PREFIX, STATE = "step-", "trainer.json"


@dataclass(frozen=True)
class Checkpoint:
    """A whole checkpoint on disk: its folder, and the trainer's state that is the same on all ranks."""

    folder: Path
    state: dict[str, Any]


class CheckpointStore:
    """The folder RUN/checkpoints: save, find the newest whole one, load, prune."""

    def __init__(self, folder: Path, keep: int, ranks: Ranks):
        self.folder, self.keep, self.ranks = folder, keep, ranks

    def save(self, step: int, engine: ThetaEngine, state: dict[str, Any], rank_state: dict[str, Any]) -> Path:
        """All ranks call this. `state` is JSON, equal on all ranks; `rank_state` is tensors and values, one a rank."""
        final = self.folder / f"{PREFIX}{step:08d}"
        partial = self.folder / f"{TEMPORARY}{final.name}"
        if self.ranks.is_main:
            sweep(self.folder)
            new_partial(final)
        self.ranks.barrier()
        engine.save(partial)
        save_state(partial / _rank_file(self.ranks.rank), {**rank_state, "rng": _rng_state()})
        self.ranks.barrier()
        if self.ranks.is_main:
            state = {**state, "step": step, "world_size": self.ranks.world_size}
            (partial / STATE).write_text(json.dumps(state, indent=1))
            publish(partial, final)
            self._prune(final)
        self.ranks.barrier()
        return final

    def newest_whole(self) -> Checkpoint | None:
        """The newest checkpoint whose files are as they were written; warns of each damaged one that it skips.

        All ranks call this; the main rank looks, so that all of them take the same one.
        """
        return self.ranks.from_main(newest_whole(self.folder) if self.ranks.is_main else None)

    def load(self, checkpoint: Checkpoint, engine: ThetaEngine) -> dict[str, Any] | None:
        """All ranks: theta and its optimizer into the engine. Returns what this rank saved, its generators restored.

        None where another number of ranks wrote the checkpoint: what was a rank's own is nobody's then.
        """
        engine.load(checkpoint.folder)
        if checkpoint.state["world_size"] != self.ranks.world_size:
            return None
        path = checkpoint.folder / _rank_file(self.ranks.rank)
        try:
            rank_state = load_state(path)
            _restore_rng(rank_state.pop("rng"))
        except (ValueError, KeyError, TypeError, AttributeError, RuntimeError) as error:
            raise ValueError(
                f"--resume: {path}: holds no state of a rank ({error}): another program wrote it, or another version "
                "of this one; remove its folder to go on from an older checkpoint"
            ) from error
        return rank_state

    def states(self) -> list[dict[str, Any]]:
        """The trainer's states in the checkpoints that are kept, as far as they can be read."""
        states = []
        for folder in _steps(self.folder):
            try:
                states.append(_read_state(folder / STATE))
            except ValueError:
                continue
        return states

    def _prune(self, newest: Path) -> None:
        """Keep the newest few. Those of later steps go: the run went back before them, as they were damaged."""
        later = [folder for folder in _steps(self.folder) if folder.name > newest.name]
        earlier = [folder for folder in _steps(self.folder) if folder.name <= newest.name]
        for folder in (*later, *earlier[: -self.keep]):
            remove_whole(folder)


def newest_whole(folder: Path) -> Checkpoint | None:
    """The newest undamaged checkpoint in RUN/checkpoints; warns of each damaged one that it skips."""
    _give_names_back(folder)
    for step in reversed(_steps(folder)):
        problem = damage(step)
        if problem is None:
            try:
                return Checkpoint(step, _read_state(step / STATE))
            except ValueError as error:  # whole, and written by something else
                problem = str(error)
        warnings.warn(f"checkpoint {step}: {problem}; trying the one before", stacklevel=2)
    return None


def _give_names_back(folder: Path) -> None:
    """A step that was saved again has no folder under its name between two renamings: of a kill there what was going to
    have the name is given it or, if that is not whole, what had it.
    """
    for aside in folder.glob(f"{REMOVED}{PREFIX}*"):
        final = folder / aside.name.removeprefix(REMOVED)
        whole = [path for path in (folder / f"{TEMPORARY}{final.name}", aside) if path.is_dir() and not damage(path)]
        if whole and not final.exists():
            whole[0].rename(final)


def _steps(folder: Path) -> list[Path]:
    return sorted(folder.glob(f"{PREFIX}*"))


def _rank_file(rank: int) -> str:
    return f"rank-{rank:05d}.safetensors"


def _read_state(path: Path) -> dict[str, Any]:
    """The trainer's state. ValueError where it lacks what every version wrote, or has it as something else."""
    state = read_json(path)
    wanted = {"position": dict, "config": dict, "step": int, "world_size": int}
    if not isinstance(state, dict) or not all(type(state.get(name)) is kind for name, kind in wanted.items()):
        raise ValueError(f"{path}: holds no state of a trainer")
    if type(state.get("tasks_per_step", 1)) is not int:  # an older version wrote none
        raise ValueError(f"{path}: tasks_per_step is no number")
    best = state["position"].get("best")
    if best is not None and not (isinstance(best, dict) and type(best.get("step")) is int):
        raise ValueError(f"{path}: holds no best step that a trainer wrote")
    return state


def _rng_state() -> dict[str, Any]:
    numpy = np.random.get_state(legacy=False)
    numpy["state"]["key"] = numpy["state"]["key"].tolist()
    state = {"python": random.getstate(), "numpy": numpy, "torch": torch.get_rng_state()}
    if torch.cuda.is_available():
        state["cuda"] = torch.cuda.get_rng_state()
    return state


def _restore_rng(state: dict[str, Any]) -> None:
    random.setstate(state["python"])
    np.random.set_state(state["numpy"])
    torch.set_rng_state(state["torch"])
    if "cuda" in state:
        torch.cuda.set_rng_state(state["cuda"])
