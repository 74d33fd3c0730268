"""What a task's folder was made from: `made_from.json`, which `launch/prepare.py` writes beside the rows."""

from __future__ import annotations

from pathlib import Path

from abmll.files import read_json

MADE_FROM = "made_from.json"  # the entry and the options that a folder was made with


def evaluation_only(folder: Path) -> bool:
    """Whether the entry that a task's folder was made from says so. ValueError where its record cannot be read."""
    path = folder / MADE_FROM
    record = read_json(path) if path.is_file() else None
    entry = record.get("entry") if isinstance(record, dict) else None
    return isinstance(entry, dict) and entry.get("evaluation_only") is True
