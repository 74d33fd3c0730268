from __future__ import annotations

import io
import math
from dataclasses import replace

import numpy as np
import pandas as pd
import pytest

from abmll.compare.estimates import adapted, summary, sweeps
from abmll.compare.plots import (
    adapted_examples,
    all_plots,
    learning_curves,
    panel_axes,
    reliability,
    risk_coverage,
    smoothed,
    styles_of,
    sweep,
    variance_error,
    with_legend,
)

STYLES = styles_of(["pretrained", "lora", "reptile", "abmll"])


def test_window_is_the_three_most_recent():
    assert smoothed(pd.Series([3.0, 1.0, 2.0, 6.0]), 3).tolist() == [3, 2, 2, 3]


def test_learning_curves_are_means_over_seeds_with_the_papers_window():
    seeds = {0: [0.3, 0.6, 0.9, 0.6], 1: [0.5, 0.4, 0.3, 0.5]}
    rows = [
        {"run": run, "run_label": "abmll", "episode": 10 * k, "accuracy": value, "ece": math.nan, "nll": math.nan}
        for run, values in seeds.items()
        for k, value in enumerate(values)
    ]
    (axis,) = learning_curves(pd.DataFrame(rows), STYLES).axes
    (line,) = axis.lines
    assert line.get_xdata().tolist() == [0, 10, 20, 30]
    # smoothed .3 .45 .6 .7 and .5 .45 .4 .4
    np.testing.assert_allclose(line.get_ydata(), [40, 45, 50, 55])
    assert learning_curves(pd.DataFrame(rows).assign(accuracy=math.nan), STYLES) is None
    diverged = pd.DataFrame(rows)
    diverged.loc[(diverged["run"] == 1) & (diverged["episode"] >= 20), "accuracy"] = math.nan
    (line,) = learning_curves(diverged, STYLES).axes[0].lines
    assert line.get_xdata().tolist() == [0, 10]  # and not the other seed's from there on


def examples(confidence, correct, variance=None, task="task"):
    frame = pd.DataFrame({"confidence": confidence, "correct": correct, "task": task, "run": 0, "label": "abmll"})
    return frame.assign(variance=variance)


def test_risk_coverage_is_the_mean_over_tasks():
    easy = examples(np.linspace(0.6, 0.9, 10), [True] * 10, task="easy")
    hard = examples(np.linspace(0.6, 0.9, 20), [False] * 10 + [True] * 10, task="hard")  # the unsure half is wrong
    (line,) = risk_coverage(pd.concat([easy, hard]), STYLES).axes[0].lines
    x, y = line.get_xdata(), line.get_ydata()
    assert x[-1] == pytest.approx(100) and y[-1] == pytest.approx((0 + 50) / 2)
    np.testing.assert_allclose(y[x < 50.1], 0)
    at_80 = np.isclose(x, 80)
    assert y[at_80] == pytest.approx((0 + 100 * 6 / 16) / 2)


def test_variance_against_error_sorts_within_a_task():
    """The fifth of the largest variance is wrong, in tasks of very different variances; confidence is all the same."""
    wrong = np.arange(20) >= 16
    frames = [examples(0.7, ~wrong, scale * np.arange(20), task) for task, scale in (("one", 1.0), ("other", 0.01))]
    figure = variance_error(pd.concat(frames, ignore_index=True))
    variance, confidence = (bars.lines[0] for bars in figure.axes[0].containers)
    np.testing.assert_allclose(variance.get_ydata(), [0, 0, 0, 0, 100])
    np.testing.assert_allclose(confidence.get_ydata(), [20])  # ties share a place: all in the middle
    assert variance_error(frames[0][:0]) is None


def test_the_reliability_plots_ece_is_the_tables(full):
    """Of all labels, among them such with several seeds."""
    found = dict(axis.get_title().split("\n") for axis in reliability(adapted_examples(full)).axes if axis.get_title())
    rows = summary(adapted(full.scores))
    assert found == {row["label"]: f"pooled ECE {row['pooled_ece']:.3f}" for _, row in rows.iterrows()}
    assert rows["seeds"].max() > 1


def test_what_diverged_is_told_in_the_plots(full):
    """Two of a label's adaptations: it has no pooled ECE, and its risk is that of the other tasks."""
    (run,) = full.runs.index[(full.runs["run_label"] == "lora") & (full.runs["seed"] == full.runs["seed"].min())]
    own = full.predictions["run"] == run
    broken = own & full.predictions["task"].isin(full.predictions[own]["task"].unique()[:2])
    predictions = full.predictions.assign(p0=full.predictions["p0"].mask(broken))
    found = adapted_examples(replace(full, predictions=predictions))
    assert found.groupby("label")["diverged"].first().loc[lambda lost: lost > 0].to_dict() == {"lora": 2}
    titles = [axis.get_title() for axis in reliability(found).axes]
    assert "lora (2 diverged)\npooled ECE not defined" in titles
    styles = styles_of(found["label"])
    (legend,) = risk_coverage(found, styles).legends
    assert "lora (2 diverged)" in [text.get_text() for text in legend.get_texts()]


def test_sweep_draws_a_line_a_method(full):
    figure = sweep("pruning", sweeps(full)["pruning"], STYLES)
    accuracy = figure.axes[0]
    assert [tick.get_text() for tick in accuracy.get_xticklabels()] == ["0", "0.01", "0.1", "0.2", "0.3"]
    assert [bars.get_label() for bars in accuracy.containers] == ["pretrained", "lora", "reptile", "abmll"]
    drawn = accuracy.containers[3].lines[0].get_ydata()
    frame = sweeps(full)["pruning"]
    np.testing.assert_allclose(drawn, 100 * frame[frame["line"] == "abmll"].sort_values("value")["accuracy"])


def test_one_value_is_no_sweep(full):
    assert sweep("beta", sweeps(full)["beta"][:1], STYLES) is None


def test_styles_are_told_apart_beyond_ten():
    styles = styles_of([f"method {number}" for number in range(25)])
    assert len({tuple(style.items()) for style in styles.values()}) == 25


@pytest.mark.parametrize(("count", "panels"), [(2, 1), (26, 1), (26, 2), (60, 4)])
def test_a_long_legend_stays_within_its_figure(count, panels):
    """And leaves the panels room; a line whose entry is cut off cannot be told."""
    figure, axes = panel_axes(panels)
    for number in range(count):
        axes[0].plot([0, 1], [0, number], label=f"a method, setting-{number}")
    (legend,) = with_legend(figure, axes).legends
    figure.suptitle("tasks, model")
    figure.savefig(io.BytesIO())
    inner, outer = legend.get_window_extent(), figure.bbox
    assert inner.x0 >= outer.x0 and inner.x1 <= outer.x1 and inner.y0 >= outer.y0 and inner.y1 <= outer.y1
    assert axes[0].get_window_extent().height > 1.5 * figure.dpi


def test_files_of_all_plots(full, tmp_path):
    paths = all_plots(full, tmp_path)
    kinds = ["learning_curves", "reliability", "risk_coverage", "variance_error"]
    kinds += ["sweep_beta", "sweep_pruning", "sweep_samples"]
    assert [path.name for path in paths] == [f"{kind}_cls-23_random_tiny.png" for kind in kinds]
    assert all(path.stat().st_size > 10_000 for path in paths)
