"""A comparison's plots: learning curves, sweeps, reliability, risk against coverage, variance against error."""

from __future__ import annotations

import re
from collections.abc import Sequence
from pathlib import Path

import matplotlib
import numpy as np
import pandas as pd
import torch
from matplotlib.axes import Axes
from matplotlib.figure import Figure

from abmll.compare.estimates import MAIN, Metric, adapted, groups, sweeps
from abmll.compare.results import STANDARD, Comparison, confidence_and_correct, value_text
from abmll.compare.statistics import estimate
from abmll.metrics import CALIBRATION_BINS
from abmll.uncertainty import selective_risk

WINDOW = 3  # validations in a point of the paper's Figure 2: the mean of the three most recent ones
COVERAGES = np.linspace(0.05, 1, 20)
PARTS = 5  # of a task's examples, sorted by variance
SWEPT = tuple(metric for metric in MAIN if metric.name in ("accuracy", "ece", "nll_options", "aurc"))
DASHES = ("-", "--", ":", "-.")


def all_plots(comparison: Comparison, folder: Path) -> list[Path]:
    """Draw all that there is data for, a file a task set and model each; returns the files."""
    paths = []
    examples = _adapted_examples(comparison)
    swept = sweeps(comparison)
    for place, runs in groups(comparison.runs):
        own = examples[examples["run"].isin(runs.index)]
        drawn = {
            "learning_curves": learning_curves(comparison.curves.merge(runs["label"], left_on="run", right_index=True)),
            "reliability": reliability(own),
            "risk_coverage": risk_coverage(own),
            "variance_error": variance_error(own[own["variance"].notna()]),
        }
        for name, frame in swept.items():
            drawn[f"sweep_{name}"] = sweep(name, frame[(frame[list(place)] == list(place.values())).all(axis=1)])
        for name, figure in drawn.items():
            if figure is not None:
                figure.suptitle(", ".join(place.values()), fontsize=11)
                paths.append(folder / f"{_file_name(name, *place.values())}.png")
                figure.savefig(paths[-1], dpi=110)
    return paths


def learning_curves(curves: pd.DataFrame) -> Figure | None:
    """Validation accuracy and ECE after adaptation (as the paper's Figure 2), and the training NLL of the last inner
    step, against episodes; mean over seeds, the band from the lowest to the highest."""
    panels = [
        ("accuracy", f"validation accuracy %,\ntrailing mean of {WINDOW} validations", 100.0),
        ("ece", f"validation ECE,\ntrailing mean of {WINDOW} validations", 1.0),
        ("nll", "training NLL after the inner steps,\ntrailing mean over a tenth of the run", 1.0),
    ]
    panels = [panel for panel in panels if curves[panel[0]].notna().any()]
    if not panels:
        return None
    figure, axes = _panels(len(panels), sharex=True)
    labels = list(dict.fromkeys(curves["label"]))
    for axis, (name, heading, factor) in zip(axes, panels, strict=True):
        for number, label in enumerate(labels):
            seeds = [
                smoothed(own.set_index("episode")[name], WINDOW if name != "nll" else max(1, len(own) // 10)) * factor
                for _, own in curves[(curves["label"] == label) & curves[name].notna()].groupby("run")
            ]
            if seeds:
                points = pd.concat(seeds, axis=1)
                axis.plot(points.index, points.mean(axis=1), label=label, **_style(number))
                band = {"color": _style(number)["color"], "alpha": 0.15, "linewidth": 0}
                axis.fill_between(points.index, points.min(axis=1), points.max(axis=1), **band)
        axis.set_xlabel("episodes", fontsize=9)
        axis.set_ylabel(heading, fontsize=8)
    return _with_legend(figure, axes)


def smoothed(values: pd.Series, window: int) -> pd.Series:
    """Mean of each value and the window - 1 before it, of fewer at the start."""
    return values.rolling(window, min_periods=1).mean()


def sweep(name: str, frame: pd.DataFrame) -> Figure | None:
    """Scores against a swept setting, its values at equal distances, a line a method, with 95 % intervals."""
    values = list(dict.fromkeys(value_text(value) for value in _sorted(frame["value"])))
    if len(values) < 2:
        return None
    figure, axes = _panels(len(SWEPT), sharex=True)
    lines = list(frame.groupby("line", sort=False))
    connected = pd.to_numeric(frame["value"], errors="coerce").notna().all()
    for axis, metric in zip(axes, SWEPT, strict=True):
        for number, (line, own) in enumerate(lines):
            own = own.assign(place=[values.index(value_text(value)) for value in own["value"]]).sort_values("place")
            beside = 0.4 * (number / max(1, len(lines) - 1) - 0.5) if len(lines) > 1 else 0.0  # bars side by side
            style = _style(number) if connected else {**_style(number), "linestyle": "none"}
            _points(axis, own["place"] + beside, own, metric, line, style)
        axis.set_xticks(range(len(values)), values, rotation=0 if max(map(len, values)) < 7 else 30)
        axis.set_xlabel(name, fontsize=9)
        axis.set_ylabel(metric.heading if metric.better > 0 else f"{metric.heading} (less is better)", fontsize=9)
    return _with_legend(figure, axes)


def _points(axis: Axes, x: pd.Series, found: pd.DataFrame, metric: Metric, label: str, style: dict[str, str]) -> None:
    """Means with their intervals, without a bar where there is none."""
    mean, low, high = (metric.factor * found[f"{metric.name}{end}"].to_numpy() for end in ("", "_low", "_high"))
    spread = np.nan_to_num([mean - low, high - mean]).clip(min=0)
    axis.errorbar(x, mean, spread, label=label, marker="o", markersize=4, capsize=2, elinewidth=0.8, **style)


def _sorted(values: pd.Series) -> list[float | str]:
    """What is not set, then numbers by size, then texts."""
    found = values.dropna().unique()
    return [*values[values.isna()].unique(), *sorted(found, key=lambda value: (isinstance(value, str), value))]


def reliability(examples: pd.DataFrame) -> Figure:
    """Accuracy against confidence in 15 equal bins, all tasks and seeds pooled: dots; the bins' sizes: grey bars."""
    parts = list(examples.groupby("label", sort=False))
    figure, axes = _panels(len(parts), columns=4, width=2.9, height=2.9, sharex=True, sharey=True)
    edges = np.linspace(0, 1, CALIBRATION_BINS + 1)
    for axis, (label, own) in zip(axes, parts, strict=True):
        share, confidence, accuracy = reliability_bins(own["confidence"].to_numpy(), own["correct"].to_numpy())
        axis.bar(edges[:-1], share, 1 / CALIBRATION_BINS, align="edge", color="0.82", edgecolor="white", linewidth=0.5)
        axis.plot([0, 1], [0, 1], color="0.5", linewidth=0.8)
        axis.plot(confidence, accuracy, marker="o", markersize=4, color="C0", clip_on=False)
        error = np.nansum(share * np.abs(accuracy - confidence))
        axis.set_title(f"{label}\npooled ECE {error:.3f}", fontsize=8)
        axis.set(xlim=(0, 1), ylim=(0, 1))
        axis.tick_params(labelbottom=True)  # the panel below may not be there
    figure.supxlabel("confidence", fontsize=9)
    figure.supylabel("accuracy (dots), share of examples (bars)", fontsize=9)
    return figure


def reliability_bins(confidence: np.ndarray, correct: np.ndarray) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Of each bin, closed on the left and the last on both sides: share of the examples, mean confidence, accuracy."""
    number = np.minimum((confidence * CALIBRATION_BINS).astype(int), CALIBRATION_BINS - 1)
    size, *sums = (np.bincount(number, values, CALIBRATION_BINS) for values in (None, confidence, correct))
    with np.errstate(invalid="ignore"):  # an empty bin has no mean
        return size / len(confidence), *(total / size for total in sums)


def risk_coverage(examples: pd.DataFrame) -> Figure:
    """Error rate of the surest share of a task's examples against that share, mean over tasks and seeds."""
    figure, (axis,) = _panels(1, width=7, height=3.8)
    for number, (label, own) in enumerate(examples.groupby("label", sort=False)):
        curves = []
        for _, task in own.groupby(["run", "task"]):
            confidence, correct = (torch.tensor(task[name].to_numpy()) for name in ("confidence", "correct"))
            risk = selective_risk(confidence, correct).numpy()
            curves.append(risk[np.ceil(COVERAGES * len(risk) - 1e-9).astype(int) - 1])
        axis.plot(COVERAGES * 100, 100 * np.mean(curves, axis=0), label=label, **_style(number))
    axis.set(xlabel="coverage %: the surest examples of a task", ylabel="error rate %", xlim=(0, 100))
    axis.set_ylim(bottom=0)
    return _with_legend(figure, [axis])


def variance_error(examples: pd.DataFrame) -> Figure | None:
    """Error rate in fifths of a task's examples, sorted by posterior variance and by lack of confidence.

    Mean over seeds and tasks, with 95 % intervals over tasks. A variance that knows more than the confidence rises
    more steeply than it.
    """
    parts = list(examples.groupby("label", sort=False))
    if not parts:
        return None
    figure, axes = _panels(len(parts), sharey=True)
    error = Metric("error", "error rate %", 100)
    for axis, (label, own) in zip(axes, parts, strict=True):
        signals = {"posterior variance": own["variance"], "1 - confidence": 1 - own["confidence"]}
        for number, (name, signal) in enumerate(signals.items()):
            rank = signal.groupby([own["run"], own["task"]]).rank(pct=True)
            fifth = np.ceil(rank * PARTS - 1e-9).astype(int).rename("fifth")
            by_task = (~own["correct"]).groupby([own["task"], fifth]).mean().unstack()
            found = [estimate(column.dropna().to_numpy()) for _, column in by_task.items()]
            points = pd.DataFrame(found, columns=["error", "error_low", "error_high"])
            _points(axis, by_task.columns + 0.06 * (2 * number - 1), points, error, name, _style(number))
        axis.set_title(label, fontsize=9)
        axis.set_xlabel("fifth of a task's examples, the surest first", fontsize=9)
        axis.set_ylabel(error.heading, fontsize=9)
        axis.set_xticks(range(1, PARTS + 1))
    return _with_legend(figure, axes)


def _adapted_examples(comparison: Comparison) -> pd.DataFrame:
    """Scored examples after adaptation under the standard condition, with confidence, correct, and the tables' label.

    What diverged is left out: its probabilities are no numbers, and its row in the tables says so.
    """
    examples = comparison.predictions[comparison.predictions["p0"].notna()]
    confidence, correct = confidence_and_correct(examples)
    examples = examples.drop(columns="label").assign(confidence=confidence, correct=correct)
    wanted = adapted(comparison.scores[comparison.scores["condition"] == STANDARD])
    keys = ["run", "score", "steps", "task"]
    return examples.merge(wanted[[*keys, "label"]], on=keys)


def _panels(
    count: int, columns: int = 4, width: float = 3.6, height: float = 3.2, sharex: bool = False, sharey: bool = False
) -> tuple[Figure, list[Axes]]:
    columns = min(count, columns)
    rows = -(-count // columns)
    figure = Figure(figsize=(width * columns, height * rows + 0.4), layout="constrained")  # needs no display
    axes = figure.subplots(rows, columns, sharex=sharex, sharey=sharey, squeeze=False).ravel().tolist()
    for axis in axes[count:]:
        axis.set_visible(False)
    for axis in axes:
        axis.tick_params(labelsize=8)
        axis.spines[["top", "right"]].set_visible(False)
    return figure, axes[:count]


def _with_legend(figure: Figure, axes: Sequence[Axes]) -> Figure:
    """One legend for all panels: beside a single one, below several."""
    handles, labels = axes[0].get_legend_handles_labels()
    columns = int(figure.get_figwidth() * 15 / (max(map(len, labels)) + 6))  # about 15 letters an inch, and the handle
    place, columns = ("outside right upper", 1) if len(axes) == 1 else ("outside lower center", columns)
    figure.legend(handles, labels, loc=place, ncols=max(1, min(len(labels), columns)), fontsize=8, frameon=False)
    return figure


def _style(number: int) -> dict[str, str]:
    colours = matplotlib.colormaps["tab10"].colors
    return {"color": colours[number % len(colours)], "linestyle": DASHES[number // len(colours) % len(DASHES)]}


def _file_name(*parts: str) -> str:
    return re.sub(r"[^\w.-]+", "_", "_".join(parts))
