"""Files and folders that are whole or absent under their own name, whenever the process is killed.

Everything is written under a temporary name, synced to disk and renamed. A sealed folder holds a manifest with the size
and SHA-256 of every file, so that later damage is found before anything is loaded.
"""

from __future__ import annotations

import hashlib
import json
import os
import shutil
from pathlib import Path

TEMPORARY, MANIFEST = ".partial-", "manifest.json"


def write_whole(path: Path, contents: str | bytes) -> None:
    """Replace a file's contents at once."""
    partial = path.with_name(f"{TEMPORARY}{path.name}")
    partial.write_bytes(contents.encode() if isinstance(contents, str) else contents)
    _sync(partial)
    partial.replace(path)


def new_partial(final: Path) -> Path:
    """An empty folder in which `final` is prepared."""
    partial = final.with_name(f"{TEMPORARY}{final.name}")
    if partial.exists():
        shutil.rmtree(partial)
    partial.mkdir(parents=True)
    return partial


def publish(partial: Path, final: Path) -> None:
    """Seal a finished folder and give it its name; a folder that had the name is removed."""
    files = {str(path.relative_to(partial)): path for path in sorted(partial.rglob("*")) if path.is_file()}
    entries = {name: {"bytes": path.stat().st_size, "sha256": file_digest(path)} for name, path in files.items()}
    (partial / MANIFEST).write_text(json.dumps(entries, indent=1))
    for path in (*files.values(), partial / MANIFEST, *(p for p in partial.rglob("*") if p.is_dir()), partial):
        _sync(path)
    old = _set_aside(final)
    partial.rename(final)
    _sync(final.parent)
    shutil.rmtree(old, ignore_errors=True)


def remove_whole(folder: Path) -> None:
    """Remove a folder, if it is there, without a moment at which its name stands for half of it."""
    shutil.rmtree(_set_aside(folder), ignore_errors=True)


def sweep(folder: Path) -> None:
    """Remove what a killed process left behind."""
    for stale in folder.glob(f"{TEMPORARY}*"):
        shutil.rmtree(stale)


def damage(folder: Path) -> str | None:
    """What is wrong with a sealed folder, or None."""
    try:
        entries = json.loads((folder / MANIFEST).read_text(encoding="utf-8"))
        expected = {name: (entry["bytes"], entry["sha256"]) for name, entry in entries.items()}
    except (OSError, ValueError, KeyError, TypeError, AttributeError) as error:
        return f"its manifest cannot be read ({error})"
    if not expected:
        return "its manifest is empty"
    for name, (size, digest) in expected.items():
        path = folder / name
        if not path.is_file():
            return f"{name} is missing"
        if path.stat().st_size != size or file_digest(path) != digest:
            return f"{name} is damaged"
    return None


def _set_aside(folder: Path) -> Path:
    """Rename a folder, if it is there, to a name that stands for nothing."""
    aside = folder.with_name(f"{TEMPORARY}removed-{folder.name}")
    shutil.rmtree(aside, ignore_errors=True)
    if folder.exists():
        folder.rename(aside)
    return aside


def file_digest(path: Path) -> str:
    """SHA-256 of a file."""
    return hashlib.sha256(path.read_bytes()).hexdigest()


def _sync(path: Path) -> None:
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)
