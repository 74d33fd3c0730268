"""What a task's folder was made from: `made_from.json`, which `launch/prepare.py` writes beside the rows."""

from __future__ import annotations

from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from pydantic import ValidationError

from abmll.config.schema import HubTask
from abmll.files import read_json

MADE_FROM = "made_from.json"


@dataclass(frozen=True)
class MadeFrom:
    """The entry and the options that a folder was made with."""

    entry: HubTask
    seed: int
    max_examples: int | None

    def to_json(self) -> dict[str, Any]:
        return vars(self) | {"entry": self.entry.model_dump(mode="json")}

    def differs(self, folder: Path) -> list[str]:
        """What the folder was made with another one of. ValueError where its record cannot be read.

        A key that entries did not have yet counts as its default, with which the same rows were made.
        """
        record = read_json(folder / MADE_FROM)
        before = record if isinstance(record, dict) else {}
        with suppress(ValidationError):  # it has keys that entries have no more, and stays another one
            before = before | {"entry": HubTask.model_validate(before.get("entry"))}
        return [key for key, value in vars(self).items() if before.get(key) != value]


def evaluation_only(folder: Path) -> bool:
    """Whether the entry that a task's folder was made from says so. ValueError where its record cannot be read."""
    path = folder / MADE_FROM
    record = read_json(path) if path.is_file() else None
    entry = record.get("entry") if isinstance(record, dict) else None
    return isinstance(entry, dict) and entry.get("evaluation_only") is True
