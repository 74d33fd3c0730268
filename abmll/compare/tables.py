"""A comparison's tables: Markdown for readers, CSV with all of the numbers behind it."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass
from importlib.resources import files
from pathlib import Path
from typing import Any

import pandas as pd
import yaml

from abmll.compare.estimates import (
    ACCURACY,
    COSTS,
    MAIN,
    PAIRED,
    PAPERS,
    POOLED_ECE,
    UNCERTAINTY,
    Metric,
    against_baseline,
    against_each,
    by_task,
    costs,
    groups,
    papers_metrics,
    summary,
    sweeps,
    under_conditions,
)
from abmll.compare.results import Results
from abmll.compare.schema import PLAIN
from abmll.compare.statistics import FEWEST
from abmll.files import write_whole

INTERVALS = (
    "In brackets: 95 % interval over tasks, seeds averaged before: what the permutation test does not reject; none "
    f"below {FEWEST} tasks."
)


@dataclass(frozen=True)
class Table:
    """`frame` is the CSV, in the metrics' own units; `text` the Markdown."""

    name: str
    text: str
    frame: pd.DataFrame

    def write(self, folder: Path) -> list[Path]:
        paths = [folder / f"{self.name}.md", folder / f"{self.name}.csv"]
        write_whole(paths[0], self.text)
        write_whole(paths[1], self.frame.to_csv(index=False, float_format="%.6g", lineterminator="\n"))
        return paths


def all_tables(results: Results) -> list[Table]:
    """Every table that there are rows for, the summary first."""
    scores, baselines = results.scores, results.baselines
    overall = summary(scores)
    against, tasks = against_baseline(scores, baselines), by_task(scores, baselines)
    made = [
        _table("summary", "Summary", _SUMMARY, overall, _summary),
        _table("uncertainty", "What the uncertainty is worth", _UNCERTAINTY, overall, _uncertainty),
        _table("against_baseline", "Against the best baseline", _AGAINST, against, _against),
        _table("against_each", "One against another", _EACH, against_each(scores, baselines), _each),
        _table("conditions", "Under other conditions", _CONDITIONS, under_conditions(scores), _conditions),
        _table("by_task", "Accuracy by task", _BY_TASK, tasks, _by_task),
        _table("costs", "Costs of training", _COSTS, costs(results), _costs),
        _table("chosen", "Settings chosen", _CHOSEN, chosen(results.choices), _chosen),
    ]
    for name, frame in sweeps(results).items():
        made.append(_table(f"sweep_{name}", f"Sweep of {name}", f"After adaptation. {INTERVALS}", frame, _sweep(name)))
    made.append(_table("paper", "Beside the paper's own figures", _PAPER, beside_paper(scores), _beside_paper))
    return [table for table in made if len(table.frame)]


def chosen(choices: Iterable[dict[str, Any]]) -> pd.DataFrame:
    """A row a combination that a method tried: its settings, their score by `select_by`, and whether it was taken."""
    return pd.DataFrame(
        [
            {
                **{key: choice[key] for key in ("task_set", "model", "method")},
                "settings": ", ".join(f"{key}={value}" for key, value in tried["values"].items()),
                "select_by": choice.get("select_by", "score"),  # older files do not say
                "score": math.nan if tried["score"] is None else tried["score"],
                "chosen": tried["values"] == choice["chosen"],
                "at_the_end_of": ", ".join(choice["at_the_end_of"]),
            }
            for choice in choices
            for tried in choice["tried"]
        ]
    )


def beside_paper(scores: pd.DataFrame) -> pd.DataFrame:
    """A row a figure of the paper for a task set that was compared, and each of ours by its metrics that answers it."""
    paper = yaml.safe_load((files("abmll.compare") / "paper.yaml").read_text())
    rows: list[dict[str, Any]] = []
    for place, own in groups(papers_metrics(scores)):
        name = next((name for name in paper["scores"] if _same(name, place["task_set"])), None)
        for figure in [] if name is None else _figures(paper, name):
            method, pruned = figure["paper_method"], figure["pruned"]
            mine = own[(own["method"] == method) | own["method"].str.startswith(f"{method}-")]
            pruning = mine["sweep"].str.startswith("pruning") & (mine["value"] == pruned)
            mine = mine[(mine["score"] == PLAIN) if math.isnan(pruned) else pruning]
            known = mine if math.isnan(figure["beta"]) else mine[:0]  # our own sweep of beta has its own table
            rows += [{**place, **figure, **ours} for ours in known.to_dict("records") or [{}]]
    return pd.DataFrame(rows)


def _figures(paper: dict[str, Any], task_set: str) -> Iterator[dict[str, Any]]:
    """The paper's figures for a task set, with standard errors, as fractions."""

    def figure(method: str, accuracy: list[float], ece: list[float], pruned: float = math.nan, beta: float = math.nan):
        values = [*(value / 100 for value in accuracy), *ece]
        names = ("paper_accuracy", "paper_accuracy_se", "paper_ece", "paper_ece_se")
        return {"paper_method": method, "pruned": pruned, "beta": beta, **dict(zip(names, values, strict=True))}

    none = [math.nan, math.nan]
    for method, found in paper["scores"][task_set].items():
        yield figure(method, found["accuracy"], found["ece"])
        for fraction, accuracy in zip(paper["pruned"], paper["pruning"][task_set][method], strict=True):
            yield figure(method, accuracy, none, pruned=fraction)
    if task_set == "cls-45":
        for beta, (accuracy, ece) in paper["beta"].items():
            yield figure("abmll", [accuracy, math.nan], [ece, math.nan], beta=float(beta))


def _same(one: str, other: str) -> bool:
    """cls-23 is cls23."""
    return "".join(filter(str.isalnum, one.lower())) == "".join(filter(str.isalnum, other.lower()))


def markdown(rows: list[dict[str, str]]) -> str:
    """Rows with the same keys, which are the headings."""
    lines = [rows[0].keys(), ["---"] * len(rows[0]), *(row.values() for row in rows)]
    return "\n".join(f"| {' | '.join(line)} |" for line in lines)


def number(value: float, metric: Metric, sign: bool = False) -> str:
    """Percent with one decimal, all else with three; nothing where there is none."""
    if math.isnan(value):
        return ""
    return f"{value * metric.factor:{'+' if sign else ''}.{1 if metric.factor == 100 else 3}f}"


def _or_nan(text: str) -> str:
    """What is defined for every row has no number only where an adaptation diverged."""
    return text or "NaN"


def interval(row: pd.Series | dict[str, Any], metric: Metric, name: str | None = None, sign: bool = False) -> str:
    """`60.2 [55.1, 65.0]`; without the brackets where there is no interval; NaN where an adaptation diverged."""
    name = name or metric.name
    if math.isnan(row[name]) and not metric.partial:
        return "NaN"
    bounds = [number(row[f"{name}_{end}"], metric, sign) for end in ("low", "high")]
    return number(row[name], metric, sign) + (f" [{', '.join(bounds)}]" if all(bounds) else "")


def _table(
    name: str, title: str, note: str, frame: pd.DataFrame, rows: Callable[[pd.DataFrame], list[dict[str, str]]]
) -> Table:
    """A Markdown table for each task set and model, under one title and note."""
    parts = [f"# {title}", note]
    if len(frame):
        for place, part in groups(frame):
            parts += [f"## {', '.join(place.values())}", markdown(rows(part))]
    return Table(name, "\n\n".join(parts) + "\n", frame)


_CHOSEN = (
    "What each method tried on validation tasks, which are neither training nor test tasks, and the mean over them by "
    "which one was taken. A choice at the end of its list may have a better one behind it; methods that tried nothing "
    "are left out."
)


def _chosen(part: pd.DataFrame) -> list[dict[str, str]]:
    return [
        {
            "method": row["method"],
            "tried": row["settings"],
            row["select_by"]: "NaN" if math.isnan(row["score"]) else f"{row['score']:.4f}",
            "chosen": (f"yes, at the end of {row['at_the_end_of']}" if row["at_the_end_of"] else "yes")
            if row["chosen"]
            else "",
        }
        for _, row in part.iterrows()
    ]


_SUMMARY = (
    f"Means over a task's examples, then over seeds, then over tasks. {INTERVALS} SD: of the accuracy, over seeds. "
    "Constant: tasks with one and the same prediction for all examples. Commonest: what would be right "
    "if each task's commonest answer were given to all its examples. Beatable: tasks on which some "
    "row is right more often than the commonest answer; chosen with these scores, so that luck is in it. ECE of 15 "
    "bins by task; the excess over what a calibrated model with the same confidences would show there by chance (below "
    "0 for one and the same answer to labels that were balanced on purpose, where nothing is left to chance); and "
    "pooled: of all tasks' examples as one set, the mean over seeds (without an interval, which a resample's own noise "
    "would bias). NLL among the options. Rows of other seeds had other support sets."
)


def _summary(part: pd.DataFrame) -> list[dict[str, str]]:
    count = part["beatable_tasks"].iloc[0]
    return [
        {
            **_means(row),
            f"accuracy % on the {count} beatable": interval(row, ACCURACY, "beatable_accuracy") if count else "",
            **_counts(row),
        }
        for _, row in part.iterrows()
    ]


def _means(row: pd.Series) -> dict[str, str]:
    return {
        "method": row["label"],
        "steps": str(row["steps"]),
        **{metric.heading: interval(row, metric) for metric in MAIN},
        POOLED_ECE.heading: _or_nan(number(row[POOLED_ECE.name], POOLED_ECE)),
        "constant %": "NaN" if math.isnan(row["constant"]) else f"{100 * row['constant']:.0f}",
        "commonest %": f"{100 * row['commonest']:.1f}",
    }


def _counts(row: pd.Series) -> dict[str, str]:
    return {
        "SD %": number(row["accuracy_seed_sd"], ACCURACY),
        "seeds": str(row["seeds"]),
        "tasks": str(row["tasks"]),
    }


_CONDITIONS = (
    "The summary's numbers where the problem is another one: fewer activations, other tasks, wrong labels, other steps "
    f"or learning rates. Only rows of one condition compete. {INTERVALS}"
)


def _conditions(part: pd.DataFrame) -> list[dict[str, str]]:
    return [{"condition": row["condition"], **_means(row), **_counts(row)} for _, row in part.iterrows()]


_UNCERTAINTY = (
    "Coverage: only the surest answers count. NLL of the options = refinement (what the best temperature leaves) + "
    "calibration (what it takes away), in nats. AUROC: how well a wrong answer is told from a right one within a task, "
    "0.5 by chance, tasks without either and seeds that diverged left out; variance and mutual information need "
    "samples. " + INTERVALS
)


def _uncertainty(part: pd.DataFrame) -> list[dict[str, str]]:
    metrics = [metric for metric in UNCERTAINTY if part[metric.name].notna().any()]
    return [
        {"method": row["label"], "steps": str(row["steps"]), **{m.heading: interval(row, m) for m in metrics}}
        for _, row in part.iterrows()
    ]


_AGAINST = (
    "After adaptation, each label minus the best baseline by that metric, chosen with these scores, under the same "
    "condition: of scores with a number (pruning, steps) the same name and number, else the standard one. Only tasks "
    "and seeds that both have count. For accuracy and macro-F1 more is better, for the others less. Interval of the "
    "paired difference by task; p of the paired permutation test; Holm over a task set's, model's and condition's "
    "rows; wins, ties and losses by task. " + INTERVALS
)


def _against(part: pd.DataFrame) -> list[dict[str, str]]:
    metrics = {metric.name: metric for metric in MAIN}
    return [
        {
            "method": row["label"],
            "metric": metrics[row["metric"]].heading,
            "best baseline": row["baseline"],
            "difference": interval(row, metrics[row["metric"]], "difference", sign=True),
            "p": _p(row["p"]),
            "p, Holm": _p(row["p_holm"]),
            "wins-ties-losses": f"{row['wins']}-{row['ties']}-{row['losses']}",
            "seeds": str(row["seeds"]),
        }
        for _, row in part.iterrows()
    ]


_EACH = (
    "After adaptation, each label minus another under the same condition: every baseline, its own run's first score "
    "(the plain one under the standard condition), and of a setting the method's default by the same score. p, and "
    "behind it what Holm leaves over one rival's rows. Otherwise as against the best baseline. " + INTERVALS
)


def _each(part: pd.DataFrame) -> list[dict[str, str]]:
    """A line a pair: each metric's difference, its p, and the p that Holm leaves."""
    rows = []
    for (rival, label), own in part.groupby(["rival", "label"], sort=False):
        cells = {"method": label, "minus": rival}
        for metric in PAIRED:
            row = own[own["metric"] == metric.name].iloc[0]
            tested = "" if math.isnan(row["p"]) else f", p {_p(row['p'])} ({_p(row['p_holm'])})"
            cells[metric.heading] = interval(row, metric, "difference", sign=True) + tested
        cells["seeds"] = str(own["seeds"].iloc[0])
        rows.append(cells)
    return rows


def _p(p: float) -> str:
    return "" if math.isnan(p) else "< .0001" if p < 1e-4 else f"{p:.4f}".removeprefix("0")


_BY_TASK = (
    "Accuracy % after adaptation, mean over seeds. + and -: better and worse than the baseline of the best mean, which "
    "stands in the first row, by the seeds of both alone, which may be fewer than those of the number; c: the "
    "predictions are constant in every seed."
)


def _by_task(part: pd.DataFrame) -> list[dict[str, str]]:
    marks = {1: " +", -1: " -"}
    head = {"task": "minus", "n": "", "majority %": "", **part.groupby("label", sort=False)["baseline"].first()}
    rows: dict[str, dict[str, str]] = {"": head} if any(part["baseline"]) else {}
    for _, row in part.iterrows():
        facts = {"task": row["task"], "n": str(row["n"]), "majority %": number(row["majority"], ACCURACY)}
        cells = rows.setdefault(row["task"], {**facts, **dict.fromkeys(part["label"], "")})
        constant = " c" if row["constant"] else ""
        accuracy = _or_nan(number(row["accuracy"], ACCURACY))
        cells[row["label"]] = f"{accuracy}{marks.get(row['outcome'], '')}{constant}"
    return list(rows.values())


_COSTS = (
    "Means over seeds, of training alone. Runs may have shared a device with others at the same time: wall times tell "
    "their order at best, and no speed. Inner steps move phi, outer ones theta. Peak memory is the GPU's, or without "
    "one the process's. Parameters are theta's, which a run keeps; phi has as many while it trains."
)


def _costs(part: pd.DataFrame) -> list[dict[str, str]]:
    form: dict[str, tuple[str, Callable[[float], str]]] = {
        "seconds": ("wall time, min", lambda value: f"{value / 60:.1f}"),
        "peak_memory_bytes": ("peak, GB", lambda value: "" if math.isnan(value) else f"{value / 1e9:.2f}"),
    }
    rows = []
    for _, row in part.iterrows():
        cells = {"method": row["run_label"]}
        for name in COSTS:
            heading, show = form.get(name, (name.replace("_", " "), lambda value: f"{value:,.0f}"))
            cells[heading] = show(row[name])
        rows.append({**cells, "seeds": str(row["seeds"])})
    return rows


def _sweep(name: str) -> Callable[[pd.DataFrame], list[dict[str, str]]]:
    def rows(part: pd.DataFrame) -> list[dict[str, str]]:
        return [
            {
                "method": row["line"],
                name: f"{row['value']:g}",
                **{metric.heading: interval(row, metric) for metric in MAIN},
                "seeds": str(row["seeds"]),
            }
            for _, row in part.iterrows()
        ]

    return rows


_PAPER = (
    "The paper's: Zhang, Snell and Griffiths (2025), version 2, Llama3-8B-Chat, ± standard error over three seeds. "
    "Both by its metrics: accuracy over the whole vocabulary, and an ECE near 1 - accuracy, not the pooled one. "
    "Models, budgets and test examples differ: what can be compared is the order of the methods. " + INTERVALS
)


def _beside_paper(part: pd.DataFrame) -> list[dict[str, str]]:
    rows = []
    for _, row in part.iterrows():
        pruned = "" if math.isnan(row["pruned"]) else f", {row['pruned']:.0%} pruned"
        beta = "" if math.isnan(row["beta"]) else f", beta {row['beta']:g} (validation)"
        cells = {"method": f"{row['paper_method']}{pruned}{beta}"}
        for metric, name in zip(PAPERS, ("accuracy", "ece"), strict=True):
            spread = number(row[f"paper_{name}_se"], metric)
            cells[f"the paper's {metric.heading}"] = number(row[f"paper_{name}"], metric) + (
                f" ± {spread}" if spread else ""
            )
        ours = isinstance(row.get("label"), str)
        cells |= {"ours": row["label"], "steps": f"{row['steps']:.0f}"} if ours else {"ours": "", "steps": ""}
        rows.append({**cells, **{f"our {metric.heading}": interval(row, metric) if ours else "" for metric in PAPERS}})
    return rows
