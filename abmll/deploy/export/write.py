"""One adapter in one format, with its model card, whole or not at all."""

from __future__ import annotations

import json
from collections.abc import Callable
from dataclasses import asdict
from pathlib import Path
from typing import TYPE_CHECKING

from abmll.deploy.export.merged import write_merged
from abmll.deploy.export.model_card import model_card
from abmll.deploy.export.peft import write_peft
from abmll.deploy.export.report import Report
from abmll.deploy.export.subject import Subject
from abmll.deploy.export.tensors import write_tensors
from abmll.deploy.folder import REPORT, check_free, written_whole

if TYPE_CHECKING:
    from abmll.deploy.task_model import TaskModel

FORMATS: dict[str, Callable[[Subject, Path], Report]] = {
    "peft": write_peft,
    "merged": write_merged,
    "safetensors": write_tensors,
}


def export_adapter(model: TaskModel, folder: str | Path, format: str = "peft") -> Report:
    """The means of a task's phi (of a model that is not adapted, theta's) in `folder`, for others to use.

    `format`: peft, merged or safetensors; see `FORMATS`. What was written is loaded back and compared first.

    ValueError (Refused) for an unknown format, a folder with other files, an adapter that changes nothing, and where
    what is loaded back is not the adapter; the folder then is as it was.
    """
    if format not in FORMATS:
        raise ValueError(f"format: {format!r}: no such format; take one of {', '.join(FORMATS)}")
    folder = Path(folder)
    check_free(folder, REPORT)
    subject = Subject(model)
    with written_whole(folder, REPORT) as partial:
        report = FORMATS[format](subject, partial)
        (partial / "README.md").write_text(model_card(subject, report), encoding="utf-8")
        (partial / REPORT).write_text(json.dumps(asdict(report), indent=1, ensure_ascii=False), encoding="utf-8")
    return report
