"""The command `launch/report.py`: read, count, draw, fill the template, write one file."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

from jinja2 import Environment, PackageLoader, StrictUndefined

from abmll.compare.statistics import Estimate
from abmll.config import Refused
from abmll.files import unwritable, write_whole
from abmll.metrics import HIGHER_IS_BETTER
from abmll.page.charts import all_charts
from abmll.page.facts import RunFacts, read_runs
from abmll.page.measures import (
    COLUMNS,
    UNKNOWN,
    Scored,
    all_scored,
    configurations,
    costs,
    interval,
    mean_aurc,
    number,
    over_tasks,
    score_row,
    task_names,
    task_scores,
    training_tasks,
)


def report(folders: Sequence[str], out: str | None) -> Path:
    """Write the page of these runs and return its path: RUN/report.html for one, `out` for several. Refused as
    `read_runs`, where several have no `out`, and where the page cannot be written."""
    if out is None and len(folders) > 1:
        raise Refused(
            f"--out: not set, and the page is of {len(folders)} runs; name its file, such as --out report.html"
        )
    runs = read_runs(folders)
    path = Path(out) if out else runs[0].folder / "report.html"
    if path.is_dir():
        raise Refused(f"--out: {path}: is a folder; name a file in it, such as {path / 'report.html'}")
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        problem = unwritable(path, (own for run in runs for own in run.folder.iterdir() if own.suffix != ".html"))
    except OSError as error:
        problem = f"{path.parent} cannot be a folder ({error.strerror}); name another file"
    if problem:
        raise Refused(f"--out: {path}: {problem}")
    write_whole(path, page(runs))
    return path


def page(runs: Sequence[RunFacts]) -> str:
    """The page as HTML, all values escaped by the template."""
    scored = all_scored(runs)
    tasks = {task: [task_scores(one, task) for one in scored] for task in task_names(scored)}
    environment = Environment(
        loader=PackageLoader("abmll.page", "."), autoescape=True, undefined=StrictUndefined, trim_blocks=True
    )
    return environment.get_template("template.html.j2").render(
        title=", ".join(run.name for run in runs),
        runs=runs,
        facts=_beside([_what(run) for run in runs]),
        scored=scored,
        headings=[f"{heading} {'↑' if name in HIGHER_IS_BETTER else '↓'}" for name, heading, _ in COLUMNS],
        scores=[_scores(one) for one in scored],
        tasks=[_task(task, own) for task, own in tasks.items()],
        means=[_cells(over_tasks(one, "accuracy"), over_tasks(one, "nll")) for one in scored],
        charts=all_charts(runs, scored, tasks),
        costs=_beside([costs(run) for run in runs]),
        training=[(run, training_tasks(run)) for run in runs if len(run.episodes)],
        others=[_other(run, other) for run in runs for other in run.others],
        adapters=[(run, [_adapter(card) for card in run.adapters]) for run in runs if run.adapters],
        configurations=configurations(runs),
        without_kl=[(run.name, _why_no_kl(run)) for run in runs if run.kl_by_layer.empty],
    )


def _what(run: RunFacts) -> dict[str, str]:
    """What the run is, by name; what its files do not tell is left out."""
    summary, made, setting = run.summary, run.provenance, run.setting
    best = summary.get("best")
    taken = f"step {summary['step']} of {summary.get('trained_steps', UNKNOWN)}" if "step" in summary else UNKNOWN
    if best:
        taken += f", the best by {setting('eval.select_by', 'accuracy')} on the validation tasks ({best['value']:.4g})"
    method = setting("method.name", "abmll")
    beta = setting("method.beta")
    kl = f", beta {beta}" if method in ("abmll", "blob") and beta is not None else ""
    posterior = f", {setting('adapters.posterior', 'activation')} posterior" if method == "abmll" else ""
    versions = {name: version for name, version in (made.get("versions") or {}).items() if version}
    commit = made.get("commit")
    told = {
        "folder": str(run.folder),
        "model": setting("model.name"),
        "weights": ", ".join(filter(None, [setting("model.dtype"), _unless_none(setting("model.quantization"))])),
        "method": f"{method}, {setting('method.inner_steps', UNKNOWN)} inner steps{posterior}{kl}",
        "adapters": f"rank {setting('adapters.rank', UNKNOWN)}, {', '.join(map(str, setting('adapters.modules', [])))}"
        + (f", {len(summary['layers'])} layers" if "layers" in summary else ""),
        "trained parameters": f"{summary['parameters']:,} of theta" if "parameters" in summary else None,
        "theta": taken,
        "seed": setting("seed", 0),
        "device": made.get("device"),
        "commit": commit and commit + (" and uncommitted changes" if made.get("dirty") else ""),
        "versions": ", ".join(f"{name} {version}" for name, version in versions.items()),
        "not there": " ".join(run.notes),
    }
    return {name: str(value) for name, value in told.items() if value not in (None, "")}


def _why_no_kl(run: RunFacts) -> str:
    if run.steps.empty:
        return "no training steps are recorded, and so no KL."
    if run.setting("method.name", "abmll") not in ("abmll", "blob"):
        return "its method has no posterior, and so no KL."
    return "its KL by layer was not recorded: it was trained by an older version, or no episode was finite."


def _unless_none(text: str | None) -> str | None:
    return None if text == "none" else text


def _beside(tables: Sequence[dict[str, str]]) -> list[tuple[str, list[str]]]:
    """Rows of several runs' values by name."""
    names = dict.fromkeys(name for table in tables for name in table)
    return [(name, [table.get(name, UNKNOWN) for table in tables]) for name in names]


def _scores(one: Scored) -> dict[str, Any]:
    tasks = one.evaluation.overall[one.steps].get("tasks", UNKNOWN)
    diverged = sum(steps == one.steps for steps, _ in one.evaluation.diverged)
    row = [*score_row(one.evaluation, one.steps), number(mean_aurc(one), 3)]
    return {"label": one.label, "tasks": tasks, "values": row, "diverged": diverged}


def _task(task: str, own: list) -> dict[str, Any]:
    n = next(found.n for found in own if found is not None)
    return {"task": task, "n": n, "cells": [_cells(f and f.accuracy, f and f.nll) for f in own]}


def _cells(accuracy: Estimate | None, nll: Estimate | None) -> tuple[tuple[str, str], tuple[str, str]]:
    return interval(accuracy, 100, 1), interval(nll, 1, 3)


def _other(run: RunFacts, other: Any) -> dict[str, Any]:
    rows = [
        (f"{found.method}, {steps} steps", score_row(found, steps))
        for found in other.evaluations
        for steps in found.steps
    ]
    settings = ", ".join(f"{key}={value}" for key, value in other.settings.items())
    return {"run": run.name, "name": other.name, "settings": settings or "as trained", "rows": rows}


def _adapter(card: dict[str, Any]) -> dict[str, str]:
    """A row of an adapter's card; a number that is not there, or is none, is unknown."""
    adaptation, scores = card.get("adaptation") or {}, card.get("scores") or {}
    losses = adaptation.get("loss") or []
    row = {
        "task": str(card.get("task", UNKNOWN)),
        "options": ", ".join(map(str, card.get("options") or ["each question's own"])),
        "examples": str(adaptation.get("examples", UNKNOWN)),
        "steps": str(adaptation.get("steps", UNKNOWN)),
        "loss": f"{number(losses[0], 3)} → {number(losses[-1], 3)}" if losses else UNKNOWN,
    }
    for name, key in (("before", "before_adaptation"), ("after", "cross_validation")):
        found = scores.get(key) or {}
        accuracy, low, high = (found.get(part) for part in ("accuracy", "accuracy_low", "accuracy_high"))
        row[name] = UNKNOWN if accuracy is None else number(100 * accuracy, 1)
        if accuracy is not None and low is not None and high is not None:
            row[name] += f" ({number(100 * low, 1)} – {number(100 * high, 1)})"
    return row
