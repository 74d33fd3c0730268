"""A run's folder: what a run writes into it, and when another may take its place."""

from __future__ import annotations

import shutil
from pathlib import Path
from tempfile import TemporaryFile

from abmll.checkpoint import PREFIX
from abmll.config import ConfigError
from abmll.config.yaml_text import read_mapping
from abmll.files import MANIFEST, read_json
from abmll.provenance import PROVENANCE
from abmll.score_files import MADE_WITH

CONFIG = "config.yaml"
# All that a run writes, and the page made of it. config.yaml is removed last: while it is there, the folder holds a
# run.
WRITTEN = (
    "checkpoints",
    "best",
    "final",
    "monitor",
    "profile",
    "metrics.jsonl",
    "episodes.jsonl",
    "scores.json",
    "predictions.parquet",
    "scores.md",
    MADE_WITH,
    "report.html",
    "scores",
    PROVENANCE,
    CONFIG,
)
_SECTIONS = {"seed", "output", "model", "adapters", "method", "tasks", "trainer"}  # every run's has all of them


def check_folder(folder: Path, resume: bool, overwrite: bool) -> None:
    """ValueError where the output folder holds a run that would be mixed with another or lost by accident, or what
    nobody but its owner should replace, or where nothing can be written.
    """
    _check_can_write(folder)
    there = [name for name in WRITTEN if (folder / name).exists()]
    if there and not _is_ours(folder):
        raise ValueError(
            f"output: {folder}: holds other files than a run's, which a run would replace ({', '.join(there)}); name a "
            "new folder with output=FOLDER"
        )
    if any(name in there for name in (CONFIG, "checkpoints")) and not (resume or overwrite):
        raise ValueError(
            f"output: {folder}: already holds a run; continue it with --resume auto, start another with "
            "output=FOLDER, or replace it with --overwrite"
        )


def make_folder(folder: Path, overwrite: bool) -> None:
    """The folder, without an older run where that is to be replaced; other files in it are nobody's to remove."""
    folder.mkdir(parents=True, exist_ok=True)
    for path in (folder / name for name in WRITTEN if overwrite):
        if path.is_dir():
            shutil.rmtree(path)
        else:
            path.unlink(missing_ok=True)


def _check_can_write(folder: Path) -> None:
    """In the folder or, where it is still to be made, in the nearest one above it."""
    try:
        nearest = next(path for path in (folder, *folder.absolute().parents) if path.exists())
        with TemporaryFile(dir=nearest):  # permissions do not tell it: a disk may be read-only, /proc holds no files
            return
    except NotADirectoryError:
        problem = f"{nearest} is a file"
    except (OSError, ValueError) as error:
        problem = f"nothing can be written there ({error})"
    raise ValueError(f"output: {folder}: {problem}; name a folder with output=FOLDER")


def _is_ours(folder: Path) -> bool:
    """Whether a run, whole or killed at any moment, left what is there: names alone are anybody's."""
    return (
        _keys(folder / CONFIG) >= _SECTIONS
        or {"versions", "commit"} <= _keys(folder / PROVENANCE)
        or (folder / "final" / MANIFEST).is_file()
        or any(path.is_dir() for path in (folder / "checkpoints").glob(f"{PREFIX}{'[0-9]' * 8}"))
    )


def _keys(path: Path) -> set[str]:
    """Of a YAML or JSON file that holds a mapping; none of any other."""
    try:
        found = read_json(path) if path.suffix == ".json" else read_mapping(path)
    except (ConfigError, ValueError):
        return set()
    return set(found) if isinstance(found, dict) else set()
