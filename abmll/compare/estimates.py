"""Numbers of every table: means over seeds and then tasks with their intervals, and differences to the best baseline.

All frames have a row a line of their table and the columns task_set and model. Units are the metrics' own: fractions,
nats, seconds, bytes. `label` names a method, its setting unless default, and its score unless plain.
"""

from __future__ import annotations

import math
from collections.abc import Iterator
from typing import Any, NamedTuple

import numpy as np
import pandas as pd

from abmll.compare.results import PLAIN, STANDARD, Results, parse_name
from abmll.compare.statistics import Estimate, estimate, holm, permutation_p, record


class Metric(NamedTuple):
    """A column of scores: its heading, the factor it is shown with, and which direction is better (1: up, -1: down)."""

    name: str
    heading: str
    factor: float = 1.0
    better: int = -1
    partial: bool = False  # not defined on every task (an AUROC without errors): those tasks are left out


ACCURACY = Metric("accuracy", "accuracy %", 100, 1)
MAIN = (
    ACCURACY,
    Metric("macro_f1", "macro-F1 %", 100, 1),
    Metric("ece", "ECE"),
    Metric("nll_options", "NLL of options"),
    Metric("brier", "Brier"),
    Metric("aurc", "AURC"),
)
PAIRED = tuple(metric for metric in MAIN if metric.name in ("accuracy", "ece", "nll_options", "brier"))
UNCERTAINTY = (
    Metric("accuracy_at_80", "accuracy % at 80 % coverage", 100, 1),
    Metric("accuracy_at_50", "at 50 %", 100, 1),
    Metric("refinement", "refinement"),
    Metric("calibration", "calibration"),
    Metric("auroc_confidence", "AUROC of errors by confidence", 1, 1, partial=True),
    Metric("auroc_variance", "by variance", 1, 1, partial=True),
    Metric("auroc_mutual_information", "by mutual information", 1, 1, partial=True),
)
PAPERS = (Metric("accuracy_vocabulary", "accuracy %", 100, 1), Metric("ece_paper", "ECE"))
COSTS = ("seconds", "episodes", "inner_steps", "outer_steps", "tokens", "peak_memory_bytes", "parameters")
ZERO_IS_PLAIN = ("pruning", "samples")  # sweeps whose point 0 is the plain score


def summary(scores: pd.DataFrame) -> pd.DataFrame:
    """A row a label and number of steps under the standard condition: every metric, constant predictions, seeds."""
    rows = []
    for place, part in groups(scores[scores["condition"] == STANDARD]):
        wanted = beatable(part)
        for (label, steps), own in part.groupby(["label", "steps"], sort=False):
            by_task = own.groupby("task")["commonest_prediction"].mean()
            rows.append(
                {
                    **place,
                    "label": label,
                    "steps": steps,
                    "seeds": own["seed"].nunique(),
                    "tasks": own["task"].nunique(),
                    **estimates(own, (*MAIN, *UNCERTAINTY, *PAPERS), with_seeds=True),
                    "constant": float((by_task == 1).mean()),
                    "beatable_tasks": len(wanted),
                    **estimates(own[own["task"].isin(wanted)], (ACCURACY,), prefix="beatable_"),
                }
            )
    return pd.DataFrame(rows)


def against_baseline(scores: pd.DataFrame, baselines: tuple[str, ...]) -> pd.DataFrame:
    """A row a label that is no baseline and a metric: its difference to the best baseline, after adaptation.

    The best by each metric, among those scored under the same condition, or the standard one where none was. Holm's
    family is all that one task set, model and condition has: every label and metric.
    """
    rows = []
    for place, part in groups(adapted(scores)):
        is_baseline = part["method"].isin(baselines)
        for condition, own in part[~is_baseline].groupby("condition", sort=False):
            rivals = part[is_baseline & (part["condition"] == condition)]
            if rivals.empty:
                rivals = part[is_baseline & (part["condition"] == STANDARD)]
            if rivals.empty:
                continue
            family = [
                {
                    **place,
                    "condition": condition,
                    "label": label,
                    "metric": metric.name,
                    **_difference(mine, rivals, metric),
                }
                for label, mine in own.groupby("label", sort=False)
                for metric in MAIN
            ]
            corrected = holm(np.array([row["p"] for row in family]))
            rows += [{**row, "p_holm": p} for row, p in zip(family, corrected, strict=True)]
    return pd.DataFrame(rows)


def against_each(scores: pd.DataFrame, baselines: tuple[str, ...]) -> pd.DataFrame:
    """A row a pair of labels and a metric, after adaptation and under the standard condition: difference and test.

    Each label is held against every label of a baseline, and against its own run's plain score: what samples or a
    temperature change. Baselines are not held against one another. Holm's family is one rival's rows.
    """
    rows = []
    for place, part in groups(adapted(scores[scores["condition"] == STANDARD])):
        rivals = {label: own for label, own in part.groupby("label", sort=False)}
        for rival, theirs in rivals.items():
            family = [
                {**place, "rival": rival, "label": label, "metric": metric.name, **_paired(mine, theirs, metric)}
                for label, mine in rivals.items()
                if label != rival and _held_against(mine.iloc[0], theirs.iloc[0], baselines)
                for metric in PAIRED
            ]
            corrected = holm(np.array([row["p"] for row in family]))
            rows += [{**row, "p_holm": p} for row, p in zip(family, corrected, strict=True)]
    return pd.DataFrame(rows)


def _held_against(mine: pd.Series, theirs: pd.Series, baselines: tuple[str, ...]) -> bool:
    if mine["run_label"] == theirs["run_label"]:
        return theirs["score"] == PLAIN
    return mine["method"] not in baselines and theirs["method"] in baselines


def by_task(scores: pd.DataFrame, baselines: tuple[str, ...]) -> pd.DataFrame:
    """A row a task and label after adaptation: accuracy, whether it is constant in all seeds, and its outcome.

    `outcome` of what is no baseline is 1, 0 or -1 against the baseline that is the best on the mean over tasks.
    """
    rows = []
    for place, part in groups(adapted(scores[scores["condition"] == STANDARD])):
        rivals = part[part["method"].isin(baselines)]
        best = None if rivals.empty else task_values(best_of(rivals, ACCURACY)[1], ACCURACY)
        for label, own in part.groupby("label", sort=False):
            accuracy = task_values(own, ACCURACY)
            commonest = own.groupby("task")["commonest_prediction"].min()
            facts = own.groupby("task", sort=False)[["n", "majority"]].first()
            for task, (n, majority) in facts.iterrows():
                row = {**place, "task": task, "n": int(n), "majority": majority, "label": label}
                compared = best is not None and task in best and own["method"].iloc[0] not in baselines
                outcome = float(np.sign(round(accuracy[task] - best[task], 12))) if compared else math.nan
                rows.append({**row, "accuracy": accuracy[task], "constant": commonest[task] == 1, "outcome": outcome})
    return pd.DataFrame(rows)


def costs(results: Results) -> pd.DataFrame:
    """A row a label of runs: means over seeds of what training took."""
    found = results.costs.groupby(["task_set", "model", "run_label"], sort=False)
    return found[list(COSTS)].mean().assign(seeds=found["seed"].nunique()).reset_index()


def sweeps(results: Results) -> dict[str, pd.DataFrame]:
    """By name, every sweep of a setting or a score, after adaptation: a row a line and value along it."""
    scores = adapted(results.scores)
    settings = scores[scores["condition"] == STANDARD].copy()
    settings[["sweep", "value"]] = [parse_name(name) for name in settings["setting"]]
    settings["line"] = settings["label"].where(settings["score"] != PLAIN, settings["method"])
    zero = scores[scores["score"] == PLAIN]
    zeros = [
        zero[zero["run"].isin(own["run"])].assign(sweep=name, value=0.0)
        for name, own in scores[scores["value"].notna()].groupby("sweep", sort=False)
        if name.startswith(ZERO_IS_PLAIN) and not (own["value"] == 0).any()
    ]
    points = pd.concat([settings, *(frame.assign(line=frame["run_label"]) for frame in [*zeros, scores])])
    found = {}
    for name, own in points[points["value"].notna()].groupby("sweep", sort=False):
        rows = [
            {**place, "line": line, "value": value, "seeds": point["seed"].nunique(), **estimates(point, MAIN)}
            for place, part in groups(own)
            for line, along in part.groupby("line", sort=False)
            for value, point in along.groupby("value")
        ]
        found[str(name)] = pd.DataFrame(rows)
    return found


def papers_metrics(scores: pd.DataFrame) -> pd.DataFrame:
    """A row a label after adaptation, and of the pretrained model before it: accuracy and ECE of the paper's tables."""
    wanted = pd.concat([scores[(scores["method"] == "pretrained") & (scores["steps"] == 0)], adapted(scores)])
    keys = ["label", "method", "score", "sweep", "value", "steps"]
    return pd.DataFrame(
        [
            {**place, **dict(zip(keys, values, strict=True)), **estimates(own, PAPERS)}
            for place, part in groups(wanted.drop_duplicates())
            for values, own in part.groupby(keys, sort=False, dropna=False)
        ]
    )


def adapted(scores: pd.DataFrame) -> pd.DataFrame:
    """Only the largest number of adaptation steps of every label."""
    most = scores.groupby(["task_set", "model", "label"])["steps"].transform("max")
    return scores[scores["steps"] == most]


def beatable(part: pd.DataFrame) -> list[str]:
    """Tasks on which some label, in the mean over its seeds, is right more often than the commonest answer would be."""
    means = part.groupby(["task", "label", "steps"])[["accuracy", "majority"]].mean()
    return sorted(means.index[means["accuracy"] > means["majority"] + 1e-12].get_level_values("task").unique())


def groups(frame: pd.DataFrame) -> Iterator[tuple[dict[str, Any], pd.DataFrame]]:
    for (task_set, model), part in frame.groupby(["task_set", "model"], sort=False):
        yield {"task_set": task_set, "model": model}, part


def task_values(own: pd.DataFrame, metric: Metric) -> pd.Series:
    """One label's value by task, the mean over seeds. NaN if a seed's is, unless the metric is a partial one."""
    means = own.groupby("task")[metric.name].agg(lambda values: values.mean(skipna=metric.partial))
    return means.dropna() if metric.partial else means


def estimates(
    own: pd.DataFrame, metrics: tuple[Metric, ...], prefix: str = "", with_seeds: bool = False
) -> dict[str, float]:
    """Of one label: for each metric its mean, its interval, and where asked for its standard deviation over seeds."""
    found: dict[str, float] = {}
    for metric in metrics:
        values = task_values(own, metric).to_numpy()
        mean, low, high = estimate(values) if len(values) else Estimate(math.nan, math.nan, math.nan)
        name = f"{prefix}{metric.name}"
        found |= {name: mean, f"{name}_low": low, f"{name}_high": high}
        if with_seeds:
            found[f"{name}_seed_sd"] = float(own.groupby("seed")[metric.name].mean().std())
    return found


def best_of(rivals: pd.DataFrame, metric: Metric) -> tuple[str, pd.DataFrame]:
    """The label of the best mean and its rows; one that diverged is the best only if all did."""
    means = {
        label: metric.better * task_values(own, metric).mean(skipna=False) for label, own in rivals.groupby("label")
    }
    best = max(means, key=lambda label: -math.inf if math.isnan(means[label]) else means[label])
    return best, rivals[rivals["label"] == best]


def _difference(mine: pd.DataFrame, rivals: pd.DataFrame, metric: Metric) -> dict[str, Any]:
    baseline, rows = best_of(rivals, metric)
    return {"baseline": baseline, **_paired(mine, rows, metric)}


def _paired(mine: pd.DataFrame, theirs: pd.DataFrame, metric: Metric) -> dict[str, Any]:
    """One label minus another, task by task."""
    own, other = task_values(mine, metric), task_values(theirs, metric)
    common = own.index.intersection(other.index)
    values = (own[common] - other[common]).to_numpy()
    return {
        **dict(zip(("difference", "difference_low", "difference_high"), estimate(values), strict=True)),
        "p": permutation_p(values),
        **record(metric.better * values)._asdict(),
        "tasks": len(values),
    }
