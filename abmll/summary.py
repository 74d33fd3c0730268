"""The summary of a run: theta as safetensors and its facts as JSON. Reading one needs neither DeepSpeed nor a run."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from torch import Tensor

from abmll.files import MANIFEST, damage, new_partial, publish, read_json
from abmll.tensor_files import read_tensors, write_tensors

THETA, FACTS = "theta.safetensors", "summary.json"
FINAL = "final"  # the summary of a run's end, in its folder


def save_summary(folder: Path, theta: dict[str, Tensor], facts: dict[str, Any]) -> None:
    """Theta and `facts`, whole or not at all; an older summary of that name is replaced."""
    partial = new_partial(folder)
    write_tensors(partial / THETA, theta)
    (partial / FACTS).write_text(json.dumps(facts, indent=1))
    publish(partial, folder)


def finished_facts(run: Path) -> dict[str, Any] | None:
    """The facts of a run that ended with its scores; None of another: trained at most, or not even that."""
    try:
        facts = read_json(run / FINAL / FACTS)
    except ValueError:
        return None
    return facts if isinstance(facts, dict) and "scores" in facts else None


def find_summary(run: Path) -> Path:
    """The summary in a run's folder, or the folder itself if it is one. ValueError, with its remedy, where none is."""
    if (run / FINAL).is_dir():
        return run / FINAL
    if (run / MANIFEST).is_file() and (run / FACTS).is_file():
        return run
    problem = "holds no run; name a run's output folder, or its final/"
    if not run.is_dir():
        problem = "no such folder; name a run's output folder, or its final/"
    elif (run / MANIFEST).is_file():
        problem = "holds what was made from a run, such as an adapter, and no run; name the output folder of that run"
    elif (run / "config.yaml").is_file():
        problem = "its run has not ended: there is no final/; go on with it by launch/train.py --resume auto"
    raise ValueError(f"--run: {run}: {problem}")


def load_summary(folder: Path) -> tuple[dict[str, Tensor], dict[str, Any]]:
    """Theta (CPU tensors by name) and the facts. ValueError where the folder is not a whole summary."""
    problem = damage(folder)
    if problem is not None:
        raise ValueError(f"summary {folder}: {problem}; name a folder written by a run, such as RUN/final")
    theta, facts = read_tensors(folder / THETA)[0], read_json(folder / FACTS)
    if not isinstance(facts, dict):
        raise ValueError(f"summary {folder}: {FACTS} holds a {type(facts).__name__}, not the facts of a run")
    return theta, facts
