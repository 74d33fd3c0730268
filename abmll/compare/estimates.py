"""Numbers of every table: means over seeds and then tasks with their intervals, and differences to the best baseline.

All frames have a row a line of their table and the columns task_set and model. Units are the metrics' own: fractions,
nats, seconds, bytes. `label` names a method, its setting unless default, and its score unless plain.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from typing import Any, NamedTuple

import numpy as np
import pandas as pd
from pandas.api.typing import SeriesGroupBy

from abmll.compare.calibration import pooled_ece
from abmll.compare.results import DEFAULT, STANDARD, Results
from abmll.compare.schema import PLAIN, parse_name, swept_value
from abmll.compare.statistics import Estimate, differences, estimate, holm, outcomes, permutation_p, record
from abmll.methods import Frequencies


class Metric(NamedTuple):
    """A column of scores: its heading, the factor it is shown with, and which direction is better (1: up, -1: down)."""

    name: str
    heading: str
    factor: float = 1.0
    better: int = -1
    partial: bool = False  # not defined on every task (an AUROC without errors): those tasks are left out


ACCURACY = Metric("accuracy", "accuracy %", 100, 1)
ECE = Metric("ece", "ECE")
MAIN = (
    ACCURACY,
    Metric("macro_f1", "macro-F1 %", 100, 1),
    ECE,
    Metric("ece_excess", "excess ECE"),
    Metric("nll_options", "NLL of options"),
    Metric("brier", "Brier"),
    Metric("aurc", "AURC"),
)
POOLED_ECE = Metric("pooled_ece", "pooled ECE")
# a task's ECE is for the most part chance where examples are few, and the more of it the surer a method is
TESTED = tuple(metric for metric in MAIN if metric != ECE)
PAIRED = tuple(metric for metric in TESTED if metric.name in ("accuracy", "ece_excess", "nll_options", "brier"))
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
PAIR = ["task", "seed"]  # what a difference is taken over
COSTS = ("seconds", "episodes", "inner_steps", "outer_steps", "tokens", "peak_memory_bytes", "parameters")


def summary(scores: pd.DataFrame) -> pd.DataFrame:
    """A row a label and number of steps under the standard condition: every metric, constant predictions, seeds."""
    return _summary(scores[scores["condition"] == STANDARD])


def under_conditions(scores: pd.DataFrame) -> pd.DataFrame:
    """`summary`'s rows under every other condition, with its name; tasks are beatable under one or not."""
    others = scores[scores["condition"] != STANDARD].groupby("condition", sort=False)
    return pd.concat([pd.DataFrame(), *(_summary(own).assign(condition=name) for name, own in others)])


def _summary(scores: pd.DataFrame) -> pd.DataFrame:
    rows = []
    for place, part in groups(scores):
        wanted = beatable(part)
        for (label, steps), own in part.groupby(["label", "steps"], sort=False):
            constant = (own["commonest_prediction"] == 1).astype(float).where(own["commonest_prediction"].notna())
            constant = _means(constant.groupby(own["task"]))  # as scores: of seeds, then tasks
            rows.append(
                {
                    **place,
                    "label": label,
                    "steps": steps,
                    "seeds": own["seed"].nunique(),
                    "tasks": own["task"].nunique(),
                    **estimates(own, (*MAIN, *UNCERTAINTY, *PAPERS), with_seeds=True),
                    POOLED_ECE.name: pooled_ece(own),
                    "constant": float(constant.mean(skipna=False)),
                    "commonest": float(own.groupby("task")["majority"].mean().mean()),
                    "beatable_tasks": len(wanted),
                    **estimates(own[own["task"].isin(wanted)], (ACCURACY,), prefix="beatable_"),
                }
            )
    return pd.DataFrame(rows)


def against_baseline(scores: pd.DataFrame, baselines: tuple[str, ...]) -> pd.DataFrame:
    """A row a label that is no baseline and a metric: its difference to the best baseline, after adaptation.

    The best by each metric on the tasks and seeds that both were scored on, under the same condition; no row where none
    was. A setting is held against the baselines' same setting, or their default where they have no such. Holm's
    family is all that one task set, model and condition has: every label and metric.
    """
    rows = []
    for place, part in groups(adapted(scores)):
        is_baseline = part["method"].isin(baselines)
        for condition, own in part[~is_baseline].groupby("condition", sort=False):
            rivals = part[is_baseline & (part["condition"] == condition)]
            family = []
            for label, mine in own.groupby("label", sort=False):
                shared = _scored_on(_of_setting(rivals, mine["setting"].iloc[0]), mine)
                for metric in TESTED if len(shared) else ():
                    baseline, theirs = best_of(shared, metric)
                    row = {"condition": condition, "label": label, "metric": metric.name, "baseline": baseline}
                    family.append({**place, **row, **_paired(mine, theirs, metric)})
            corrected = holm(np.array([row["p"] for row in family]))
            rows += [{**row, "p_holm": p} for row, p in zip(family, corrected, strict=True)]
    return pd.DataFrame(rows)


def against_each(scores: pd.DataFrame, baselines: tuple[str, ...]) -> pd.DataFrame:
    """A row a pair of labels and a metric, after adaptation: difference and test on the tasks and seeds of both.

    Under one condition each label is held against every label of a baseline (of its own setting, or the default where
    the baseline has no such), against its own run's first score there (what samples or a temperature change in the
    plain one, or entropy in a random choice), and a setting against its method's default by the same score. Baselines
    of different methods are held against `frequencies` alone. Holm's family: one rival's rows, its settings' too.
    """
    rows = []
    for place, part in groups(adapted(scores)):
        for _, own in part.groupby("condition", sort=False):
            first = set(own.groupby("run_label")["label"].first())
            labels = dict(list(own.groupby("label", sort=False)))
            settings = {setting: set(_of_setting(own, setting)["label"]) for setting in own["setting"].unique()}
            for rival, theirs in labels.items():
                family = [
                    {**place, "rival": rival, "label": label, "metric": metric.name, **_paired(mine, theirs, metric)}
                    for label, mine in labels.items()
                    if label != rival
                    and _held_against(mine.iloc[0], theirs.iloc[0], baselines, rival in first, settings)
                    and len(_scored_on(theirs, mine))
                    for metric in PAIRED
                ]
                corrected = holm(np.array([row["p"] for row in family]))
                rows += [{**row, "p_holm": p} for row, p in zip(family, corrected, strict=True)]
    return pd.DataFrame(rows)


def _of_setting(rivals: pd.DataFrame, setting: str) -> pd.DataFrame:
    """Each method's rows of this setting, or of its default where it has none: budgets are to be alike."""
    same = rivals["setting"] == setting
    known = same.groupby(rivals["method"]).transform("any")
    return rivals[same | (~known & (rivals["setting"] == DEFAULT))]


def _held_against(
    mine: pd.Series, theirs: pd.Series, baselines: Sequence[str], theirs_is_first: bool, settings: dict[str, set[str]]
) -> bool:
    if mine["run_label"] == theirs["run_label"]:
        return theirs_is_first
    if mine["method"] == theirs["method"]:
        return bool(theirs["setting"] == DEFAULT and mine["score"] == theirs["score"])
    alike = theirs["label"] in settings[mine["setting"]]
    held = mine["method"] not in baselines or theirs["method"] == Frequencies.name
    return bool(held and theirs["method"] in baselines and alike)


def by_task(scores: pd.DataFrame, baselines: tuple[str, ...]) -> pd.DataFrame:
    """A row a task and label after adaptation: accuracy, whether it is constant in all seeds, and its outcome.

    `outcome` of what is no baseline is 1, 0 or -1 against `baseline`, that which is the best on the mean over tasks, by
    the seeds of both, where accuracy is of all seeds; a setting's against the baselines' same setting, or their
    default, as in `against_baseline`. `baseline` is empty where there is none.
    """
    rows = []
    for place, part in groups(adapted(scores[scores["condition"] == STANDARD])):
        rivals = part[part["method"].isin(baselines)]
        for label, own in part.groupby("label", sort=False):
            shared = _scored_on(_of_setting(rivals, own["setting"].iloc[0]), own)
            compared = own["method"].iloc[0] not in baselines and not shared.empty
            baseline, best = best_of(shared, ACCURACY) if compared else ("", shared[:0])
            mine, theirs = _of_both(own, best, ACCURACY)
            outcome = pd.Series(outcomes(mine.to_numpy(), theirs.to_numpy()), mine.index)
            accuracy = task_values(own, ACCURACY)
            constant = (own["commonest_prediction"] == 1).groupby(own["task"]).all()
            facts = own.groupby("task", sort=False)[["n", "majority"]].first()
            for task, (n, majority) in facts.iterrows():
                row = {**place, "task": task, "n": int(n), "majority": majority, "label": label}
                found = {"constant": constant[task], "baseline": baseline, "outcome": outcome.get(task, math.nan)}
                rows.append({**row, "accuracy": accuracy[task], **found})
    return pd.DataFrame(rows)


def costs(results: Results) -> pd.DataFrame:
    """A row a label of runs: means over seeds of what training took."""
    found = results.costs.groupby(["task_set", "model", "run_label"], sort=False)
    return found[list(COSTS)].mean().assign(seeds=found["seed"].nunique()).reset_index()


def sweeps(results: Results) -> dict[str, pd.DataFrame]:
    """By name, every sweep of a setting or a score, after adaptation: a row a line and value along it.

    A sweep of settings has a line a method and score, one of scores a line a method and setting. The default run or the
    plain score stands on the line at its own value, where it is known (`swept_value`) and no other point has it.
    """
    scores = adapted(results.scores)
    standard = scores[scores["condition"] == STANDARD]
    lines = standard["method"].where(standard["score"] == PLAIN, standard["method"] + ", " + standard["score"])
    settings = standard.assign(line=lines)
    settings[["sweep", "value"]] = [parse_name(name) for name in settings["setting"]]
    by_score = scores.assign(line=scores["run_label"])
    points = pd.concat(
        [
            _with_default(settings, settings["setting"] == DEFAULT, results),
            _with_default(by_score, by_score["score"] == PLAIN, results),
        ]
    )
    found = {}
    for name, own in points.groupby("sweep", sort=False):
        rows = [
            {**place, "line": line, "value": value, "seeds": point["seed"].nunique(), **estimates(point, MAIN)}
            for place, part in groups(own)
            for line, along in part.groupby("line", sort=False)
            for value, point in along.groupby("value")
        ]
        found[str(name)] = pd.DataFrame(rows)
    return found


def _with_default(points: pd.DataFrame, default: pd.Series, results: Results) -> pd.DataFrame:
    """A sweep's points, and on each of their lines what is `default`, at its own value."""
    swept, unnamed = points[points["value"].notna()], points[default]
    places = ["task_set", "model", "line"]
    added = []
    for (*place, name), own in swept.groupby([*places, "sweep"], sort=False):
        here = unnamed[(unnamed[places] == place).all(axis=1)]
        values = here["run"].map({run: swept_value(config, str(name)) for run, config in results.configs.items()})
        added.append(here.assign(sweep=name, value=values)[values.notna() & ~values.isin(own["value"])])
    return pd.concat([swept, *added])


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
    means = part.groupby(["task", "label", "steps"])
    beaten = _means(means["accuracy"]) > means["majority"].mean() + 1e-12
    return sorted(beaten.index[beaten].get_level_values("task").unique())


def groups(frame: pd.DataFrame) -> Iterator[tuple[dict[str, Any], pd.DataFrame]]:
    for (task_set, model), part in frame.groupby(["task_set", "model"], sort=False):
        yield {"task_set": task_set, "model": model}, part


def task_values(own: pd.DataFrame, metric: Metric) -> pd.Series:
    """One label's value by task, the mean over seeds. NaN if a seed's is, unless the metric is a partial one."""
    means = own.groupby("task")[metric.name]
    return means.mean().dropna() if metric.partial else _means(means)


def _means(values: SeriesGroupBy) -> pd.Series:
    """NaN where one of the group's values is: what diverged in a seed has no mean over seeds."""
    return values.agg(lambda own: own.mean(skipna=False))


def estimates(
    own: pd.DataFrame, metrics: tuple[Metric, ...], prefix: str = "", with_seeds: bool = False
) -> dict[str, float]:
    """Of one label: for each metric its mean, its interval, and where asked for its standard deviation over seeds."""
    found: dict[str, float] = {}
    for metric in metrics:
        values = task_values(own, metric).to_numpy()
        name = f"{prefix}{metric.name}"
        found |= named(name, estimate(values) if len(values) else Estimate(math.nan, math.nan, math.nan))
        if with_seeds:
            by_seed = own.groupby("seed")[metric.name].agg(lambda values, skip=metric.partial: values.mean(skipna=skip))
            found[f"{name}_seed_sd"] = float(by_seed.std(skipna=metric.partial))
    return found


def named(name: str, found: Estimate) -> dict[str, float]:
    return dict(zip((name, f"{name}_low", f"{name}_high"), found, strict=True))


def best_of(rivals: pd.DataFrame, metric: Metric) -> tuple[str, pd.DataFrame]:
    """The label of the best mean and its rows; one that diverged is the best only if all did.

    Means are over the tasks and seeds that all of them were scored on, if there are any: seeds are not equally easy.
    """
    everywhere = rivals.groupby(PAIR)["label"].transform("nunique") == rivals["label"].nunique()
    compared = rivals[everywhere] if everywhere.any() else rivals
    means = {
        label: metric.better * task_values(own, metric).mean(skipna=False) for label, own in compared.groupby("label")
    }
    best = max(means, key=lambda label: -math.inf if math.isnan(means[label]) else means[label])
    return best, rivals[rivals["label"] == best]


def _scored_on(rows: pd.DataFrame, others: pd.DataFrame) -> pd.DataFrame:
    """The rows of a task and seed that `others` have too: an unfinished comparison lacks some of one method's."""
    known = set(zip(*(others[key] for key in PAIR), strict=True))
    return rows[np.array([pair in known for pair in zip(*(rows[key] for key in PAIR), strict=True)], dtype=bool)]


def _of_both(mine: pd.DataFrame, theirs: pd.DataFrame, metric: Metric) -> tuple[pd.Series, pd.Series]:
    """Two labels' values by task, over the tasks and seeds of both that have one; partial metrics lack some."""
    own, others = task_values(_scored_on(mine, theirs), metric), task_values(_scored_on(theirs, mine), metric)
    return own.align(others, join="inner")


def _paired(mine: pd.DataFrame, theirs: pd.DataFrame, metric: Metric) -> dict[str, Any]:
    """One label minus another by task as one estimate, with its test. At least one task and seed must be in both."""
    own, others = (found.to_numpy() for found in _of_both(mine, theirs, metric))
    values = differences(own, others)
    return {
        **named("difference", estimate(values)),
        "p": permutation_p(values),
        **record(outcomes(metric.better * own, metric.better * others))._asdict(),
        "tasks": len(values),
        "seeds": _scored_on(mine, theirs)["seed"].nunique(),
    }
