"""The numbers of the page's tables: scores and their intervals, costs, training by task, configurations."""

from __future__ import annotations

import json
import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from datetime import timedelta
from typing import Any

import numpy as np
import pandas as pd
from pydantic import BaseModel

from abmll.compare.plots import smoothed
from abmll.compare.statistics import Estimate, estimate, wilson
from abmll.config import Config
from abmll.config.schema import ModelConfig
from abmll.evaluation import Evaluation
from abmll.metrics import Predictions
from abmll.page.facts import RunFacts
from abmll.uncertainty import selective_risk

COLUMNS = (
    ("accuracy", "accuracy %", 100.0),
    ("accuracy_vocabulary", "accuracy % (vocabulary)", 100.0),
    ("macro_f1", "macro-F1 %", 100.0),
    ("nll", "NLL", 1.0),
    ("brier", "Brier", 1.0),
    ("ece", "ECE", 1.0),
    ("pooled_ece", "ECE, all pooled", 1.0),
)
UNKNOWN = "–"
LAST = 10  # the last tenth of the run is what a table calls its end


@dataclass(frozen=True)
class Scored:
    """One method of one run at one number of adaptation steps; `label` names it on the page."""

    run: RunFacts
    evaluation: Evaluation
    steps: int
    label: str

    @property
    def adapted(self) -> bool:
        return self.steps == max(self.evaluation.steps)

    def predictions(self, task: str) -> Predictions | None:
        return self.evaluation.predictions.get(self.steps, {}).get(task)


@dataclass(frozen=True)
class TaskScores:
    """A task's accuracy and NLL with their 95 % intervals; `n` its scored examples."""

    n: int
    accuracy: Estimate
    nll: Estimate


def all_scored(runs: Sequence[RunFacts]) -> list[Scored]:
    """Everything that was scored, in the order of the runs; a label names the run where there are several."""
    found = []
    for run in runs:
        for evaluation in run.evaluations:
            for steps in evaluation.steps:
                name = evaluation.method
                if len(runs) > 1:
                    name = run.name if name == run.setting("method.name") else f"{run.name}: {name}"
                found.append(Scored(run, evaluation, steps, f"{name}, {steps} steps"))
    return found


def score_row(evaluation: Evaluation, steps: int) -> list[str]:
    """The means over tasks, as COLUMNS order them."""
    overall = evaluation.overall[steps]
    return [number(overall.get(name, math.nan) * factor, 1 if factor == 100 else 3) for name, _, factor in COLUMNS]


def task_scores(scored: Scored, task: str) -> TaskScores | None:
    """Of one task; None where it was not scored. Without predictions the intervals are unknown (NaN)."""
    scores = scored.evaluation.tasks[scored.steps].get(task)
    if scores is None:
        return None
    predictions, n = scored.predictions(task), int(scores["n"])
    nll = Estimate(scores["nll"], math.nan, math.nan)
    if predictions is not None:
        nll = estimate(predictions.nll.numpy())
    return TaskScores(n, wilson(scores["accuracy"], n), nll)


def over_tasks(scored: Scored, metric: str) -> Estimate:
    """Mean over tasks with its interval: see `abmll.compare.statistics`."""
    return estimate(np.array([scores[metric] for scores in scored.evaluation.tasks[scored.steps].values()]))


def task_names(scored: Sequence[Scored]) -> list[str]:
    """Every task that something was scored on, in the order of the first run's."""
    return list(dict.fromkeys(name for one in scored for name in one.evaluation.tasks[one.steps]))


def examples(scored: Sequence[Scored]) -> pd.DataFrame:
    """Every scored example with numbers as the plots of comparisons want them: run, task, label, confidence, correct.

    What diverged is left out, as its probabilities are no numbers; `diverged` says how many of the label's tasks.
    """
    parts = []
    for place, one in enumerate(scored):
        found = one.evaluation.predictions.get(one.steps, {}).values()
        diverged = sum(bool(predictions.options.isnan().any()) for predictions in found)
        for task, predictions in one.evaluation.predictions.get(one.steps, {}).items():
            if predictions.options.isnan().any():
                continue
            confidence, choice = predictions.options.max(dim=1)
            values = {"confidence": confidence.numpy(), "correct": (choice == predictions.label).numpy()}
            places = {"run": place, "task": task, "label": one.label, "diverged": diverged}
            parts.append(pd.DataFrame({**values, **places}))
    return pd.concat(parts, ignore_index=True) if parts else pd.DataFrame(columns=["label"])


def mean_aurc(scored: Scored) -> float:
    """Area under each task's risk-coverage curve, the mean over tasks; NaN where a task diverged."""
    found = []
    for predictions in scored.evaluation.predictions.get(scored.steps, {}).values():
        confidence, choice = predictions.options.max(dim=1)
        diverged = bool(predictions.options.isnan().any())
        found.append(math.nan if diverged else float(selective_risk(confidence, choice == predictions.label).mean()))
    return float(np.mean(found)) if found else math.nan


def costs(run: RunFacts) -> dict[str, str]:
    """Memory and speed of training, by name."""
    steps = run.steps
    if steps.empty:
        return {}
    seconds, tokens, padded = steps["seconds"].sum(), _tokens(steps, "real"), _tokens(steps, "padded")
    skipped = steps["skipped_episodes"].max() if "skipped_episodes" in steps else 0
    return {
        "training time": duration(seconds),
        "outer steps": f"{len(steps):,}",
        "episodes": f"{int(steps['episode'].max()):,}",
        "seconds an outer step, median": number(steps["seconds"].median(), 3),
        "tokens/s": f"{tokens / seconds:,.0f}",
        "padding, share of the rows": f"{100 * (1 - tokens / padded):.1f} %" if padded else UNKNOWN,
        "tokens in all": f"{tokens:,.0f}",
        "peak memory": f"{steps['peak_memory_bytes'].max() / 2**30:.2f} GiB",
        "episodes skipped for NaN or Inf": f"{int(skipped):,}",
    }


def _tokens(steps: pd.DataFrame, kind: str) -> float:
    """Of all steps; 0 where it was not counted."""
    name = f"{kind}_tokens_per_second"
    return float((steps[name] * steps["seconds"]).sum()) if name in steps else 0.0


def training_tasks(run: RunFacts) -> list[dict[str, str]]:
    """Each training task's episodes, and its NLL before and after the inner steps over the last of them."""
    rows = []
    for task, own in run.episodes.groupby("task") if len(run.episodes) else ():
        good = own[own["finite"]]
        last = good.tail(max(1, math.ceil(len(good) / LAST)))
        values = {name: last[name].mean() if name in last else math.nan for name in ("nll_first", "nll_last")}
        texts = {name: number(value, 3) for name, value in values.items()}
        rows.append({"task": str(task), "episodes": str(len(own)), "skipped": str(len(own) - len(good)), **texts})
    return rows


def thinned(values: pd.Series, window: int, most: int = 400) -> pd.Series:
    """Trailing means, at no more points than a line of a few hundred pixels can show; the last one is kept."""
    means = smoothed(values, window)
    return means.iloc[:: -max(1, len(means) // most)].iloc[::-1]


def configurations(runs: Sequence[RunFacts]) -> list[dict[str, Any]]:
    """A row a key: its default, every run's value, which of these are not the default, whether the runs differ."""
    defaults = dict(_flat(default_config()))
    own = [{**defaults, **dict(_flat(run.config))} for run in runs]
    rows = []
    for key in dict.fromkeys(key for config in own for key in config):
        values = [config.get(key, UNKNOWN) for config in own]
        default = defaults.get(key, UNKNOWN)
        changed = [value != default for value in values]
        rows.append(
            {"key": key, "default": default, "values": values, "changed": changed, "differ": len(set(values)) > 1}
        )
    return rows


def default_config() -> dict[str, Any]:
    """The schema's defaults, but for the model's name, which has none."""
    sections = Config.model_fields
    found = {name: field.default for name, field in sections.items() if name != "model"}
    found = {name: of.model_dump(mode="json") if isinstance(of, BaseModel) else of for name, of in found.items()}
    return {**found, "model": ModelConfig(name="").model_dump(mode="json", exclude={"name"})}


def _flat(config: dict[str, Any], before: str = "") -> Iterator[tuple[str, str]]:
    """Values as text by `section.key`; a hub task is one value."""
    for key, value in config.items():
        name = f"{before}{key}"
        if isinstance(value, dict) and value and before != "tasks.hub.":
            yield from _flat(value, f"{name}.")
        elif name != "tasks.hub" or value:
            yield name, value if isinstance(value, str) else json.dumps(value, ensure_ascii=False)


def duration(seconds: float) -> str:
    return str(timedelta(seconds=round(seconds)))


def number(value: float, digits: int) -> str:
    return UNKNOWN if value is None or math.isnan(value) else f"{value:.{digits}f}"


def interval(found: Estimate | None, factor: float, digits: int) -> tuple[str, str]:
    """A value and its interval as text; the interval is empty where it is unknown."""
    if found is None or math.isnan(found.mean):
        return UNKNOWN, ""
    low, high = (number(end * factor, digits) for end in (found.low, found.high))
    return number(found.mean * factor, digits), "" if UNKNOWN in (low, high) else f"{low} – {high}"
