"""A comparison's plots: learning curves, sweeps, reliability, risk against coverage, variance against error."""

from __future__ import annotations

import re
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any

import matplotlib
import numpy as np
import pandas as pd
import torch
from matplotlib.axes import Axes
from matplotlib.figure import Figure

from abmll.compare.calibration import gaps, pooled_ece, reliability_bins
from abmll.compare.estimates import MAIN, Metric, adapted, groups, sweeps
from abmll.compare.results import STANDARD, Results
from abmll.compare.statistics import estimate
from abmll.metrics import CALIBRATION_BINS
from abmll.score_files import as_predictions
from abmll.uncertainty import selective_risk

WINDOW = 3  # validations in a point of the paper's Figure 2: the mean of the three most recent ones
COVERAGES = np.linspace(0.05, 1, 20)
PARTS = 5  # of a task's examples, sorted by variance
SWEPT = tuple(metric for metric in MAIN if metric.name in ("accuracy", "ece_excess", "nll_options", "aurc"))
LEGEND_LINE = 0.175  # inches of the legend's font
DASHES = ("-", "--", ":", "-.")
Styles = dict[str, dict[str, Any]]  # matplotlib's, by label
# what a reader of the report needs to know, by the start of the file's name
CAPTIONS = {
    "learning_curves": "Learning curves against training episodes: mean over seeds, the band from the lowest to the "
    "highest seed. Lines that coincide hide one another.",
    "reliability": "Reliability: accuracy against confidence in 15 equal bins, all tasks' examples and seeds together; "
    "grey: each bin's share of the examples. The pooled ECE is the tables', of each seed by itself and then the mean.",
    "risk_coverage": "Risk against coverage: error rate of the surest share of each task's examples, mean over tasks "
    "and seeds. A line that falls to the left tells wrong answers from right ones.",
    "variance_error": "Error rate in fifths of each task's examples, sorted by posterior variance and by lack of "
    "confidence; bars are 95 % intervals over tasks.",
    "sweep": "Means after adaptation at each value; bars are 95 % intervals over tasks. Tasks differ far more than "
    "methods do: differences are paired by task in the tables (against_each), not read off these bars.",
}


def all_plots(results: Results, folder: Path) -> list[Path]:
    """Draw all that there is data for, a file a task set and model each; returns the files."""
    paths = []
    examples, swept, runs = adapted_examples(results), sweeps(results), results.runs
    lines = [line for frame in swept.values() for line in frame["line"]]
    styles = styles_of([*runs["method"], *runs["run_label"], *examples["label"].unique(), *lines])
    for place, part in groups(runs):
        own = examples[examples["run"].isin(part.index)]
        drawn = {
            "learning_curves": learning_curves(results.curves.join(part["run_label"], on="run", how="inner"), styles),
            "reliability": reliability(own),
            "risk_coverage": risk_coverage(own, styles),
            "variance_error": variance_error(own[own["variance"].notna()]),
        }
        for name, frame in swept.items():
            here = (frame[list(place)] == list(place.values())).all(axis=1)
            drawn[f"sweep_{name}"] = sweep(name, frame[here], styles)
        for name, figure in drawn.items():
            if figure is not None:
                figure.suptitle(", ".join(place.values()), fontsize=11)
                paths.append(folder / f"{_file_name(name, *place.values())}.png")
                figure.savefig(paths[-1], dpi=110)
    return paths


def styles_of(labels: Iterable[str]) -> Styles:
    """A colour and a dash for each label, the same in every plot."""
    colours = matplotlib.colormaps["tab10"].colors
    return {
        label: {"color": colours[number % len(colours)], "linestyle": DASHES[number // len(colours) % len(DASHES)]}
        for number, label in enumerate(dict.fromkeys(labels))
    }


def learning_curves(curves: pd.DataFrame, styles: Styles) -> Figure | None:
    """Validation accuracy and ECE after adaptation (as the paper's Figure 2), and the training NLL of an episode's last
    batch, before its step, against episodes; mean over seeds, the band from the lowest to the highest. A curve ends
    where a seed's does.
    """
    panels = [
        ("accuracy", f"validation accuracy %,\ntrailing mean of {WINDOW} validations", 100.0),
        ("ece", f"validation ECE,\ntrailing mean of {WINDOW} validations", 1.0),
        ("nll", "training NLL, nats an example of an episode's last\nbatch, trailing mean of a tenth of the run", 1.0),
    ]
    panels = [panel for panel in panels if curves[panel[0]].notna().any()]
    if not panels:
        return None
    figure, axes = panel_axes(len(panels), sharex=True)
    for axis, (name, heading, factor) in zip(axes, panels, strict=True):
        for label, own in curves[curves[name].notna()].groupby("run_label", sort=False):
            seeds = [points.set_index("episode")[name] * factor for _, points in own.groupby("run")]
            points = pd.concat(
                [smoothed(seed, max(1, len(seed) // 10) if name == "nll" else WINDOW) for seed in seeds], axis=1
            )
            points = points.dropna()  # where a seed has diverged, the others' mean would be another curve
            axis.plot(points.index, points.mean(axis=1), label=label, **styles[label])
            band = {"color": styles[label]["color"], "alpha": 0.15, "linewidth": 0}
            axis.fill_between(points.index, points.min(axis=1), points.max(axis=1), **band)
        axis.set_xlabel("episodes", fontsize=9)
        axis.set_ylabel(heading, fontsize=8)
    return with_legend(figure, axes)


def smoothed(values: pd.Series, window: int) -> pd.Series:
    """Mean of each value and the window - 1 before it, of fewer at the start."""
    return values.rolling(window, min_periods=1).mean()


def sweep(name: str, frame: pd.DataFrame, styles: Styles) -> Figure | None:
    """Scores against a swept number, its values at equal distances, a line a method, with 95 % intervals."""
    values = sorted(frame["value"].unique())
    if len(values) < 2:
        return None
    figure, axes = panel_axes(len(SWEPT), sharex=True)
    lines = list(frame.groupby("line", sort=False))
    for axis, metric in zip(axes, SWEPT, strict=True):
        for number, (line, own) in enumerate(lines):
            own = own.sort_values("value")
            beside = 0.4 * (number + 0.5) / len(lines) - 0.2  # the bars stand side by side
            _points(axis, np.searchsorted(values, own["value"]) + beside, own, metric, line, styles[line])
        axis.set_xticks(range(len(values)), [f"{value:g}" for value in values])
        axis.set_xlim(-0.5, len(values) - 0.5)
        axis.set_xlabel(name, fontsize=9)
        axis.set_ylabel(metric.heading if metric.better > 0 else f"{metric.heading} (less is better)", fontsize=9)
    return with_legend(figure, axes)


def _points(axis: Axes, x: np.ndarray, found: pd.DataFrame, metric: Metric, label: str, style: dict[str, Any]) -> None:
    """Means with their intervals, without a bar where there is none."""
    mean, low, high = (metric.factor * found[f"{metric.name}{end}"].to_numpy() for end in ("", "_low", "_high"))
    spread = np.nan_to_num([mean - low, high - mean]).clip(min=0)
    axis.errorbar(x, mean, spread, label=label, marker="o", markersize=4, capsize=2, elinewidth=0.8, **style)


def reliability(examples: pd.DataFrame) -> Figure | None:
    """Accuracy against confidence in 15 equal bins, all tasks and seeds pooled: dots; the bins' sizes: grey bars.

    The ECE in the titles is the tables' `pooled_ece`: seeds taken together would lessen chance's part.
    """
    parts = list(examples.groupby("label", sort=False))
    if not parts:
        return None
    figure, axes = panel_axes(len(parts), width=2.9, height=2.9, sharex=True, sharey=True)
    edges = np.linspace(0, 1, CALIBRATION_BINS + 1)
    for axis, (label, own) in zip(axes, parts, strict=True):
        share, confidence, accuracy = reliability_bins(own["confidence"].to_numpy(), own["correct"].to_numpy())
        axis.bar(edges[:-1], share, 1 / CALIBRATION_BINS, align="edge", color="0.82", edgecolor="white", linewidth=0.5)
        axis.plot([0, 1], [0, 1], color="0.5", linewidth=0.8)
        axis.plot(confidence, accuracy, marker="o", markersize=4, color="C0", clip_on=False)
        ece = "not defined" if _diverged(own) else f"{_pooled_ece(own):.3f}"  # as in the tables
        axis.set_title(f"{_with_diverged(label, own)}\npooled ECE {ece}", fontsize=8)
        axis.set(xlim=(0, 1), ylim=(0, 1))
        axis.tick_params(labelbottom=True)  # the panel below may not be there
    figure.supxlabel("confidence", fontsize=9)
    figure.supylabel("accuracy (dots), share of examples (bars)", fontsize=9)
    return figure


def _pooled_ece(own: pd.DataFrame) -> float:
    """Of one label's examples [confidence, correct, run], a run a seed."""
    rows = [
        {"seed": run, "n": len(part), **gaps(part["confidence"].to_numpy(), part["correct"].to_numpy())}
        for run, part in own.groupby("run")
    ]
    return pooled_ece(pd.DataFrame(rows))


def risk_coverage(examples: pd.DataFrame, styles: Styles) -> Figure | None:
    """Error rate of the surest share of a task's examples against that share, mean over tasks and seeds."""
    if examples.empty:
        return None
    figure, (axis,) = panel_axes(1, width=7, height=3.8)
    for label, own in examples.groupby("label", sort=False):
        curves = []
        for _, task in own.groupby(["run", "task"]):
            confidence, correct = (torch.tensor(task[name].to_numpy()) for name in ("confidence", "correct"))
            risk = selective_risk(confidence, correct).numpy()
            curves.append(risk[np.ceil(COVERAGES * len(risk) - 1e-9).astype(int) - 1])
        named = _with_diverged(label, own)
        axis.plot(COVERAGES * 100, 100 * np.mean(curves, axis=0), label=named, **styles[label])
    axis.set(xlabel="coverage %: the surest examples of a task", ylabel="error rate %", xlim=(0, 100))
    axis.set_ylim(bottom=0)
    return with_legend(figure, [axis])


def variance_error(examples: pd.DataFrame) -> Figure | None:
    """Error rate in fifths of a task's examples, sorted by posterior variance and by lack of confidence.

    Mean over seeds and tasks, with 95 % intervals over tasks. A variance that knows more than the confidence rises
    more steeply than it.
    """
    parts = list(examples.groupby("label", sort=False))
    if not parts:
        return None
    figure, axes = panel_axes(len(parts), sharey=True)
    error = Metric("error", "error rate %", 100)
    for axis, (label, own) in zip(axes, parts, strict=True):
        signals = {"posterior variance": own["variance"], "1 - confidence": 1 - own["confidence"]}
        styles = styles_of(signals)
        for number, (name, signal) in enumerate(signals.items()):
            rank = signal.groupby([own["run"], own["task"]]).rank(pct=True)
            fifth = np.ceil(rank * PARTS - 1e-9).astype(int).rename("fifth")
            by_task = (~own["correct"]).groupby([own["task"], fifth]).mean().unstack()
            found = [estimate(column.dropna().to_numpy()) for _, column in by_task.items()]
            points = pd.DataFrame(found, columns=["error", "error_low", "error_high"])
            _points(axis, by_task.columns + 0.06 * (2 * number - 1), points, error, name, styles[name])
        axis.set_title(_with_diverged(label, own), fontsize=9)
        axis.set_xlabel("fifth of a task's examples, the surest first", fontsize=9)
        axis.set_ylabel(error.heading, fontsize=9)
        axis.set_xticks(range(1, PARTS + 1))
    return with_legend(figure, axes)


def adapted_examples(results: Results) -> pd.DataFrame:
    """Scored examples after adaptation under the standard condition, with confidence, correct, and the tables' label.

    What diverged is left out, as its probabilities are no numbers; `diverged` says how many of the label's adaptations.
    """
    examples = results.predictions[results.predictions["p0"].notna()]
    confidence, choice = as_predictions(examples).options.max(dim=1)
    correct = choice.numpy() == examples["label"]
    examples = examples.drop(columns="label").assign(confidence=confidence.numpy(), correct=correct)
    wanted = adapted(results.scores[results.scores["condition"] == STANDARD])
    keys = ["run", "score", "steps", "task"]
    there = pd.MultiIndex.from_frame(wanted[keys]).isin(pd.MultiIndex.from_frame(examples[keys]))
    lost = (~pd.Series(there, wanted.index)).groupby(wanted["label"]).transform("sum")
    return examples.merge(wanted[[*keys, "label"]].assign(diverged=lost), on=keys)


def _with_diverged(label: str, own: pd.DataFrame) -> str:
    """The label, and how many of its adaptations are not among its examples."""
    return f"{label} ({_diverged(own)} diverged)" if _diverged(own) else label


def _diverged(own: pd.DataFrame) -> int:
    return int(own["diverged"].iloc[0]) if "diverged" in own else 0


def panel_axes(
    count: int, columns: int = 4, width: float = 3.6, height: float = 3.2, sharex: bool = False, sharey: bool = False
) -> tuple[Figure, list[Axes]]:
    """Axes in rows, in a figure that needs no display."""
    columns = min(count, columns)
    rows = -(-count // columns)
    figure = Figure(figsize=(width * columns, height * rows + 0.4), layout="constrained")
    axes = figure.subplots(rows, columns, sharex=sharex, sharey=sharey, squeeze=False).ravel().tolist()
    for axis in axes[count:]:
        axis.set_visible(False)
    for axis in axes:
        axis.tick_params(labelsize=8)
        axis.spines[["top", "right"]].set_visible(False)
    return figure, axes[:count]


def with_legend(figure: Figure, axes: Sequence[Axes]) -> Figure:
    """One legend for all panels: below them, but beside a single one where it is long. The figure grows by it."""
    handles, labels = axes[0].get_legend_handles_labels()
    letters = max(map(len, labels)) + 6  # and the handle; an inch takes about 15
    columns = max(1, min(len(labels), int(figure.get_figwidth() * 15 / letters)))
    place = "outside lower center"
    if len(axes) == 1 and len(labels) > 3:
        place, columns = "outside right center", 1
        figure.set_figwidth(figure.get_figwidth() + letters / 15)
        figure.set_figheight(max(figure.get_figheight(), len(labels) * LEGEND_LINE + 0.4))  # and the title
    else:
        figure.set_figheight(figure.get_figheight() + (-(-len(labels) // columns) - 1) * LEGEND_LINE)
    figure.legend(handles, labels, loc=place, ncols=columns, fontsize=8, frameon=False)
    return figure


def _file_name(*parts: str) -> str:
    return re.sub(r"[^\w.-]+", "_", "_".join(parts))
