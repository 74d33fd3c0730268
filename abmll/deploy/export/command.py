"""The command `launch/export.py`: a task's adapter, or a run's theta, for others to use."""

from __future__ import annotations

from pathlib import Path

from abmll.deploy.export.push import check_push, push
from abmll.deploy.export.write import export_adapter
from abmll.deploy.folder import REPORT, check_free
from abmll.deploy.meta_model import MetaModel
from abmll.deploy.task_model import load_task_models, of_base


def export(
    adapter: str | None,
    run: str | None,
    format: str,
    out: str,
    model: str | None = None,
    repository: str | None = None,
    dtype: str | None = None,
    device: str | None = None,
) -> None:
    """Writes the folder, prints what was found, and pushes it where asked to. ValueErrors for a user's mistakes.

    `model`: where the base is now. `dtype`: in which it is loaded and, for the format merged, written; None: the run's.
    """
    check_free(Path(out), REPORT)  # before a model is loaded
    if repository is not None:
        check_push(repository)
    overrides = of_base(model, dtype)
    if run is None:
        own = load_task_models([str(adapter)], overrides, device)[0]
    else:
        meta = MetaModel.load(run, overrides, device)
        own = meta.unadapted(None, meta.run.name)
    report = export_adapter(own, out, format)
    rows = [("exported", f"{own.name}, as {format}, on {report.base} in {report.dtype}"), *report.lines()]
    rows += [("note", note) for note in report.notes]
    print("\n".join(f"{name:<15} {value}" for name, value in [*rows, ("folder", out)]), flush=True)
    if repository is not None:
        print(f"{'pushed':<15} {push(Path(out), repository)}")
