"""Checkpoints that survive a kill at any moment, and the summary that loads without DeepSpeed.

A checkpoint is written into a temporary folder, synced to disk and renamed: a folder with its final name is whole. Its
manifest holds the size and SHA-256 of every file, so that later damage is found before anything is loaded. Base weights
are not stored. All ranks must see the same folder.
"""

from __future__ import annotations

import hashlib
import json
import os
import random
import shutil
import warnings
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from safetensors.torch import load_file, save_file

from abmll.distributed import Ranks
from abmll.engine import ThetaEngine

PREFIX, TEMPORARY, MANIFEST, STATE = "step-", ".partial-", "manifest.json", "trainer.json"


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
        """All ranks call this. `state` is JSON, equal on all ranks; `rank_state` goes through torch.save, one a rank."""
        final = self.folder / f"{PREFIX}{step:08d}"
        partial = self.folder / f"{TEMPORARY}{final.name}"
        if self.ranks.is_main:
            for stale in self.folder.glob(f"{TEMPORARY}*"):
                shutil.rmtree(stale)
            partial.mkdir(parents=True)
        self.ranks.barrier()
        engine.save(partial)
        torch.save({**rank_state, "rng": _rng_state()}, partial / f"rank-{self.ranks.rank:05d}.pt")
        self.ranks.barrier()
        if self.ranks.is_main:
            state = {**state, "step": step, "world_size": self.ranks.world_size}
            (partial / STATE).write_text(json.dumps(state, indent=1))
            _seal(partial)
            if final.exists():
                shutil.rmtree(final)
            partial.rename(final)
            _sync(self.folder)
            for old in self._steps()[: -self.keep]:
                shutil.rmtree(old)
        self.ranks.barrier()
        return final

    def newest_whole(self) -> Checkpoint | None:
        """The newest checkpoint whose files are as they were written; warns of each damaged one that it skips."""
        for folder in reversed(self._steps()):
            problem = _damage(folder)
            if problem is None:
                return Checkpoint(folder, json.loads((folder / STATE).read_text()))
            if self.ranks.is_main:
                warnings.warn(f"checkpoint {folder}: {problem}; trying the one before", stacklevel=2)
        return None

    def load(self, checkpoint: Checkpoint, engine: ThetaEngine) -> dict[str, Any]:
        """All ranks: theta and its optimizer into the engine, this rank's RNG restored; returns its rank_state."""
        written_by = checkpoint.state["world_size"]
        if written_by != self.ranks.world_size:
            raise ValueError(
                f"--resume: {checkpoint.folder} was written by {written_by} ranks and this run has "
                f"{self.ranks.world_size}; start it with {written_by}, or start a new run from the summary"
            )
        engine.load(checkpoint.folder)
        rank_state = torch.load(checkpoint.folder / f"rank-{self.ranks.rank:05d}.pt", weights_only=False)
        _restore_rng(rank_state.pop("rng"))
        return rank_state

    def _steps(self) -> list[Path]:
        return sorted(self.folder.glob(f"{PREFIX}*"))


def save_summary(folder: Path, theta: dict[str, torch.Tensor], facts: dict[str, Any]) -> None:
    """Theta as safetensors and `facts` as JSON, whole or not at all; an older summary of that name is replaced."""
    partial = folder.with_name(f"{TEMPORARY}{folder.name}")
    shutil.rmtree(partial, ignore_errors=True)
    partial.mkdir(parents=True)
    save_file({name: value.detach().cpu().contiguous() for name, value in theta.items()}, partial / "theta.safetensors")
    (partial / "summary.json").write_text(json.dumps(facts, indent=1))
    _seal(partial)
    if folder.exists():
        shutil.rmtree(folder)
    partial.rename(folder)
    _sync(folder.parent)


def load_summary(folder: Path) -> tuple[dict[str, torch.Tensor], dict[str, Any]]:
    """Theta (CPU tensors by name) and the facts. ValueError where the folder is not a whole summary."""
    problem = _damage(folder)
    if problem is not None:
        raise ValueError(f"summary {folder}: {problem}; name a folder written by a run, such as RUN/final")
    return load_file(folder / "theta.safetensors"), json.loads((folder / "summary.json").read_text())


def _seal(folder: Path) -> None:
    """Write the manifest of a finished folder and force everything to disk."""
    files = sorted(path for path in folder.rglob("*") if path.is_file())
    entries = {str(path.relative_to(folder)): {"bytes": path.stat().st_size, "sha256": _digest(path)} for path in files}
    (folder / MANIFEST).write_text(json.dumps(entries, indent=1))
    for path in (*files, folder / MANIFEST, *(p for p in folder.rglob("*") if p.is_dir()), folder):
        _sync(path)


def _damage(folder: Path) -> str | None:
    """What is wrong with a sealed folder, or None."""
    try:
        entries = json.loads((folder / MANIFEST).read_text())
    except (OSError, ValueError) as error:
        return f"its manifest cannot be read ({error})"
    for name, entry in entries.items():
        path = folder / name
        if not path.is_file():
            return f"{name} is missing"
        if path.stat().st_size != entry["bytes"] or _digest(path) != entry["sha256"]:
            return f"{name} is damaged"
    return None


def _digest(path: Path) -> str:
    return hashlib.sha256(path.read_bytes()).hexdigest()


def _sync(path: Path) -> None:
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def _rng_state() -> dict[str, Any]:
    state = {"python": random.getstate(), "numpy": np.random.get_state(), "torch": torch.get_rng_state()}
    if torch.cuda.is_available():
        state["cuda"] = torch.cuda.get_rng_state()
    return state


def _restore_rng(state: dict[str, Any]) -> None:
    random.setstate(state["python"])
    np.random.set_state(state["numpy"])
    torch.set_rng_state(state["torch"])
    if "cuda" in state:
        torch.cuda.set_rng_state(state["cuda"])
