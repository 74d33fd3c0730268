"""The summary of a run: theta as safetensors and its facts as JSON. Reading one needs neither DeepSpeed nor a run."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from safetensors.torch import load_file, save_file
from torch import Tensor

from abmll.files import damage, new_partial, publish

THETA, FACTS = "theta.safetensors", "summary.json"
FINAL = "final"  # the summary of a run's end, in its folder


def save_summary(folder: Path, theta: dict[str, Tensor], facts: dict[str, Any]) -> None:
    """Theta and `facts`, whole or not at all; an older summary of that name is replaced."""
    partial = new_partial(folder)
    save_file({name: value.detach().cpu().contiguous() for name, value in theta.items()}, partial / THETA)
    (partial / FACTS).write_text(json.dumps(facts, indent=1))
    publish(partial, folder)


def finished_facts(run: Path) -> dict[str, Any] | None:
    """The facts of a run that ended with its scores; None of another: trained at most, or not even that."""
    try:
        facts = json.loads((run / FINAL / FACTS).read_text())
    except (OSError, ValueError):
        return None
    return facts if "scores" in facts else None


def load_summary(folder: Path) -> tuple[dict[str, Tensor], dict[str, Any]]:
    """Theta (CPU tensors by name) and the facts. ValueError where the folder is not a whole summary."""
    problem = damage(folder)
    if problem is not None:
        raise ValueError(f"summary {folder}: {problem}; name a folder written by a run, such as RUN/final")
    return load_file(folder / THETA), json.loads((folder / FACTS).read_text())
