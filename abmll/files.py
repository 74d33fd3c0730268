"""Files and folders that are whole or absent under their own name, whenever the process is killed.

Everything is written under a temporary name, synced to disk and renamed. A sealed folder holds a manifest with the size
and SHA-256 of every file, so that later damage is found before anything is loaded. Nothing is pickled.
"""

from __future__ import annotations

import fcntl
import hashlib
import json
import os
import shutil
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from pathlib import Path
from tempfile import TemporaryFile
from typing import Any

TEMPORARY, MANIFEST, LOCK = ".partial-", "manifest.json", ".lock"
REMOVED = f"{TEMPORARY}removed-"  # what had the name that something else is given


def write_whole(path: Path, contents: str | bytes) -> None:
    """Replace a file's contents at once."""
    partial = path.with_name(f"{TEMPORARY}{path.name}")
    try:
        partial.write_bytes(contents.encode() if isinstance(contents, str) else contents)
        sync(partial)
    except OSError:  # most likely the disk is full: what was written is of no use to anybody
        partial.unlink(missing_ok=True)
        raise
    partial.replace(path)


def unwritable(path: Path, read: Iterable[str | Path] = ()) -> str | None:
    """Why a file cannot be written, and what to do, or None: asked before the work whose result it is for.

    `read`: what that work reads, of which no file may be replaced, files and whole folders.
    """
    if path.is_dir():
        return f"is a folder; name a file in it, such as {path / 'FILE'}"
    if problem := is_read(path, read):
        return problem
    if not path.parent.is_dir():
        return f"{path.parent} is no folder; make it, or name another file"
    try:
        # permissions do not tell it: a disk may be read-only, /proc holds no files
        with TemporaryFile(dir=path.parent):
            return None
    except OSError as error:
        return f"nothing can be written in {path.parent} ({error.strerror}); name another file"


def is_read(path: Path, read: Iterable[str | Path]) -> str | None:
    """Why a file that is there must stay as it is: it is one of those that are read, or lies in such a folder."""
    for own in map(Path, read if path.exists() else ()):
        if own.exists() and (path.samefile(own) or path.resolve().is_relative_to(own.resolve())):
            what = f"a file of {own}, which" if own.is_dir() else "what"
            return f"is {what} this command reads; name another file"
    return None


def read_json(path: Path) -> Any:
    """A JSON file's value. ValueError where it holds none, or one that is nested too deep to be ours."""
    try:
        return json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError, RecursionError) as error:
        raise ValueError(f"{path}: cannot be read as JSON ({error})") from error


def whole_lines(path: Path) -> list[dict[str, Any]]:
    """The objects of a file of JSON lines; without the lines that a kill or a full disk cut off."""
    found = []
    for line in path.read_bytes().splitlines():
        try:
            value = json.loads(line)
        except (ValueError, RecursionError):
            continue
        if isinstance(value, dict):
            found.append(value)
    return found


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
        sync(path)
    old = _set_aside(final)
    partial.rename(final)
    sync(final.parent)
    shutil.rmtree(old, ignore_errors=True)


def inside(folder: Path, name: str) -> Path:
    """`folder / name` for a name that a file holds. ValueError where it would lie elsewhere, or is no plain text."""
    path = Path(name)
    if path.is_absolute() or ".." in path.parts or not name.isprintable():
        raise ValueError(f"{folder}: {name!r}: leads out of this folder; the file that names it was changed")
    return folder / path


def remove_whole(folder: Path) -> None:
    """Remove a folder, if it is there, without a moment at which its name stands for half of it."""
    shutil.rmtree(_set_aside(folder), ignore_errors=True)


def sweep(folder: Path) -> None:
    """Remove what a killed process left behind."""
    for stale in folder.glob(f"{TEMPORARY}*"):
        if stale.is_dir() and not stale.is_symlink():
            shutil.rmtree(stale)
        else:
            stale.unlink()


@contextmanager
def alone_in(folder: Path) -> Iterator[None]:
    """Keep others that ask for the same out of a folder, until this process ends. ValueError where one is in it."""
    with (folder / LOCK).open("w") as lock:
        try:
            fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            raise ValueError(
                f"{folder}: another process is at work in it; wait for it, or name another folder"
            ) from None
        except OSError:  # a file system without locks
            pass
        yield


def damage(folder: Path) -> str | None:
    """What is wrong with a sealed folder, or None."""
    try:
        entries = read_json(folder / MANIFEST)
        expected = {name: (entry["bytes"], entry["sha256"]) for name, entry in entries.items()}
    except (ValueError, KeyError, TypeError, AttributeError) as error:
        return f"its manifest cannot be read ({error})"
    if not expected:
        return "its manifest is empty"
    for name, (size, digest) in expected.items():
        path = folder / name
        try:
            if ".." in Path(name).parts or folder not in path.parents or not path.is_file():
                return f"{name[:100]!r} is missing"
            if path.stat().st_size != size or file_digest(path) != digest:
                return f"{name} is damaged"
        except (OSError, ValueError) as error:  # a name that no file can have, a disk that cannot be read
            return f"{name[:100]!r} cannot be read ({error})"
    return None


def _set_aside(folder: Path) -> Path:
    """Rename a folder, if it is there, to a name that stands for nothing."""
    aside = folder.with_name(f"{REMOVED}{folder.name}")
    shutil.rmtree(aside, ignore_errors=True)
    if folder.exists():
        folder.rename(aside)
    return aside


def file_digest(path: Path) -> str:
    """SHA-256 of a file."""
    digest = hashlib.sha256()
    with path.open("rb") as file:
        while part := file.read(2**20):
            digest.update(part)
    return digest.hexdigest()


def sync(path: Path) -> None:
    """What was written to a file or folder, to the disk."""
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)
