"""Folders of adapters and exports: whole or absent, and never in the place of somebody's other files."""

from __future__ import annotations

import shutil
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from abmll.config import Refused
from abmll.files import MANIFEST, new_partial, publish, read_json

CARD = "card.json"  # what tells an adapter, which may be replaced, from anything else
REPORT = "export.json"  # the same of an export


def check_free(folder: Path, mark: str) -> None:
    """Refused where the folder holds anything but an earlier one of its kind, which its file `mark` tells."""
    if not folder.exists():
        return
    files = {str(path.relative_to(folder)) for path in folder.rglob("*") if not path.is_dir()}
    if not folder.is_dir() or (files and not (mark in files and files <= _sealed(folder))):
        what = "an export's" if mark == REPORT else "an adapter's"
        raise Refused(f"--out: {folder}: holds other files than {what}; name a new folder")


def _sealed(folder: Path) -> set[str]:
    try:
        return {*read_json(folder / MANIFEST), MANIFEST}
    except (ValueError, TypeError):
        return set()


@contextmanager
def written_whole(folder: Path, mark: str) -> Iterator[Path]:
    """A folder to write in, which becomes `folder` at the end; on an error it is removed, and `folder` is as it was.

    The manifest in it bothers nobody: transformers, PEFT and vLLM open files by their names.
    """
    check_free(folder, mark)
    folder = folder.resolve()
    partial = new_partial(folder)
    try:
        yield partial
        publish(partial, folder)
    except BaseException:
        shutil.rmtree(partial, ignore_errors=True)
        raise
