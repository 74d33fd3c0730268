"""The page's figures. Those of confidence are the comparisons' own (`abmll.compare.plots`)."""

from __future__ import annotations

import math
import textwrap
from collections.abc import Sequence
from functools import partial
from typing import NamedTuple

import numpy as np
from markupsafe import Markup
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.ticker import FuncFormatter, LogLocator, MaxNLocator, NullFormatter

from abmll.compare.plots import panel_axes, reliability, risk_coverage, styles_of, with_legend
from abmll.page.facts import RunFacts
from abmll.page.measures import LAST, Scored, TaskScores, examples, thinned
from abmll.page.posterior import EXPLAINED, by_module, deviations, posterior_kind
from abmll.page.svg import inline_svg, label


class Chart(NamedTuple):
    svg: Markup
    caption: str


def all_charts(
    runs: Sequence[RunFacts], scored: Sequence[Scored], tasks: dict[str, list[TaskScores | None]]
) -> dict[str, Chart | None]:
    """By section; None where there is nothing to draw. `tasks`: each task's scores, in the order of `scored`."""
    shown = [one for one in scored if one.adapted] if len(runs) > 1 else list(scored)
    confident = examples(shown)
    confident["label"] = [
        label(textwrap.fill(text.replace(" steps", "\u00a0steps"), 34)) for text in confident["label"]
    ]
    names = ", ".join(run.name for run in runs)
    after = "After adaptation" if len(runs) > 1 else "Before and after adaptation"
    drawn = {
        "learning": (
            partial(learning_curves, runs),
            "In training, as trailing means over a tenth of the run: NLL of the batches at the first inner step "
            "(dashed) and at the last one (solid), as the objective has it, by default summed over a batch's examples, "
            "and beta KL of the outer step. Validation: scores before (dashed) and after adaptation (solid).",
        ),
        "tasks": (
            partial(task_intervals, tasks, [label(one.label) for one in scored], [one.adapted for one in scored]),
            "Accuracy after adaptation, with Wilson's 95 % intervals.",
        ),
        "reliability": (
            partial(reliability, confident),
            f"{after}: accuracy against confidence in 15 equal bins, all tasks' examples as one set (dots), and each "
            "bin's share of the examples (bars). On the diagonal confidence is right.",
        ),
        "risk": (
            partial(risk_coverage, confident, styles_of(confident["label"].unique())),
            f"{after}: error rate among the surest examples of a task, against how many of them are kept; the mean "
            "over tasks.",
        ),
        "kl": (
            partial(kl_by_layer, runs),
            "KL of each layer's posterior to theta's at the last inner step, mean over the episodes of the run's last "
            "tenth (solid) and of its first (dotted).",
        ),
        "deviation": (
            partial(deviation_by_layer, runs),
            " ".join(EXPLAINED[kind] for kind in dict.fromkeys(filter(None, map(posterior_kind, runs)))),
        ),
        "cost": (
            partial(cost_curves, runs),
            "Tokens in a second of training (trailing mean over a tenth of the run), and the peak of memory so far.",
        ),
    }
    found = {}
    for section, (draw, caption) in drawn.items():
        svg = inline_svg(draw, section, f"{caption} Runs: {names}.")
        found[section] = None if svg is None else Chart(svg, caption)
    return found


def learning_curves(runs: Sequence[RunFacts]) -> Figure | None:
    """Training terms, and validation scores where there are any."""
    styles = _styles(runs)
    trained = [run for run in runs if "nll_last" in run.steps]
    validated = [run for run in runs if len(run.validations)]
    if not trained and not validated:
        return None
    with_kl = [run for run in trained if "weighted_kl" in run.steps and (run.steps["weighted_kl"] > 0).any()]
    terms = [("NLL in training", "nll")] * bool(trained) + [("beta KL, outer step", "weighted_kl")] * bool(with_kl)
    scores = [(f"validation {name}", key) for name, key in (("accuracy %", "accuracy"), ("NLL", "nll"), ("ECE", "ece"))]
    scores = scores if validated else []
    figure, axes = panel_axes(len(terms) + len(scores), columns=len(scores) or 2)
    for axis, (heading, key) in zip(axes, terms, strict=False):
        for run in with_kl if key == "weighted_kl" else trained:
            _training(axis, run, key, styles[run.name])
        axis.set_ylabel(heading, fontsize=9)
        if key == "weighted_kl":
            _log_scale(axis, "log")
    for axis, (heading, key) in zip(axes[len(terms) :], scores, strict=True):
        for run in validated:
            _validation(axis, run, key, styles[run.name])
        axis.set_ylabel(heading, fontsize=9)
    return _finished(figure, axes, "episodes")


def _training(axis: Axes, run: RunFacts, key: str, style: dict) -> None:
    steps = run.steps[run.steps["nll_last"].notna()].set_index("episode")
    window = max(1, len(steps) // LAST)
    if key == "weighted_kl":
        axis.plot(thinned(steps[key], window), label=label(run.name), **style)
        return
    axis.plot(thinned(steps["nll_last"], window), label=label(run.name), **style)
    if "nll_first" in steps:
        axis.plot(thinned(steps["nll_first"], window), **{**style, "linestyle": (0, (4, 3))}, alpha=0.7, linewidth=1)


def _validation(axis: Axes, run: RunFacts, key: str, style: dict) -> None:
    most = run.validations["steps"].max()
    for steps, own in run.validations.groupby("steps"):
        values = own.set_index("episode")[key] * (100 if key == "accuracy" else 1)
        before = {"linestyle": (0, (4, 3)), "alpha": 0.7, "linewidth": 1}
        look = {"label": label(run.name)} if steps == most else before
        axis.plot(values, marker="o", markersize=3, **{**style, **look})


def task_intervals(tasks: dict[str, list[TaskScores | None]], labels: list[str], adapted: list[bool]) -> Figure | None:
    """A row a task, what was scored beside each other in it."""
    shown = [place for place, wanted in enumerate(adapted) if wanted]
    if not tasks or not shown:
        return None
    height = 0.6 + len(tasks) * (0.16 + 0.09 * len(shown))
    figure, (axis,) = panel_axes(1, width=8.5 if len(shown) <= 3 else 11, height=min(height, 60))
    styles = styles_of(labels[place] for place in shown)
    for number, place in enumerate(shown):
        found = [(row, own[place].accuracy) for row, own in enumerate(tasks.values()) if own[place] is not None]
        rows = np.array([row for row, _ in found]) + 0.6 * ((number + 0.5) / len(shown) - 0.5)
        mean, low, high = (100 * np.array([value[end] for _, value in found]) for end in range(3))
        look = {"color": styles[labels[place]]["color"], "marker": "os^Dv"[number % 5], "linestyle": "none"}
        bars = np.clip([mean - low, high - mean], 0, None)  # at 0 and 1 a rounding may be below 0
        axis.errorbar(mean, rows, xerr=bars, label=labels[place], markersize=4, elinewidth=1, **look)
    axis.set_yticks(range(len(tasks)), [_short(task, 48) for task in tasks])
    axis.set(ylim=(len(tasks) - 0.5, -0.5), xlim=(-2, 102), xlabel="accuracy %")
    axis.grid(axis="x", linewidth=0.4, alpha=0.4)
    return with_legend(figure, [axis])


def kl_by_layer(runs: Sequence[RunFacts]) -> Figure | None:
    """A panel a run, a line a module, over the blocks of the model."""
    runs = [run for run in runs if len(run.kl_by_layer)]
    if not runs:
        return None
    figure, axes = panel_axes(len(runs), columns=2, width=4.6, height=3.2)
    for axis, run in zip(axes, runs, strict=True):
        count = math.ceil(len(run.kl_by_layer) / LAST)
        means = run.kl_by_layer.head(count).mean(), run.kl_by_layer.tail(count).mean()
        first, last = map(by_module, means)
        for number, module in enumerate(last):
            axis.plot(*_line(last[module]), color=f"C{number % 10}", marker=".", label=label(module))
            axis.plot(*_line(first[module]), color=f"C{number % 10}", linestyle=":", linewidth=1)
        positive = all((mean > 0).all() for mean in means)
        _log_scale(axis, "log" if positive else "symlog")  # an estimate from one sample may be negative
        _by_block(axis, run, runs, "KL, nats")
    return figure


def deviation_by_layer(runs: Sequence[RunFacts]) -> Figure | None:
    """A panel a run, a line a module: the centre, in a band of one standard deviation of the logarithm."""
    found = {run.name: deviations(run) for run in runs}
    runs = [run for run in runs if found[run.name]]
    if not runs:
        return None
    figure, axes = panel_axes(len(runs), columns=2, width=4.6, height=3.2)
    for axis, run in zip(axes, runs, strict=True):
        modules = by_module(found[run.name])
        for number, (module, curve) in enumerate(modules.items()):
            block, mean, spread = (
                np.array(part) for part in zip(*((b, *curve[b]) for b in sorted(curve)), strict=True)
            )
            low, high = np.exp(mean - spread), np.exp(mean + spread)
            look = {"color": f"C{number % 10}", "linewidth": 0.8}
            axis.plot(block, np.exp(mean), **{**look, "linewidth": 1.6}, marker=".", label=label(module))
            axis.plot(block, low, block, high, **look, marker="_")
            axis.fill_between(block, low, high, color=look["color"], alpha=0.08, linewidth=0)
        _log_scale(axis, "log")
        _by_block(axis, run, runs, f"standard deviation ({posterior_kind(run)})")
    return figure


def cost_curves(runs: Sequence[RunFacts]) -> Figure | None:
    trained, styles = [run for run in runs if len(run.steps)], _styles(runs)
    if not trained:
        return None
    figure, axes = panel_axes(2, width=4.6)
    for run in trained:
        steps = run.steps.set_index("episode")
        axes[0].plot(
            thinned(steps["real_tokens_per_second"], max(1, len(steps) // LAST)),
            label=label(run.name),
            **styles[run.name],
        )
        axes[1].plot(thinned(steps["peak_memory_bytes"] / 2**30, 1), label=label(run.name), **styles[run.name])
    for axis, heading in zip(axes, ("tokens/s", "peak memory, GiB"), strict=True):
        axis.set_ylabel(heading, fontsize=9)
        axis.set_ylim(0, 1.1 * axis.get_ylim()[1])
    return _finished(figure, axes, "episodes")


def _styles(runs: Sequence[RunFacts]) -> dict[str, dict]:
    return styles_of(run.name for run in runs)


def _short(text: str, most: int) -> str:
    return text if len(text) <= most else f"{text[: most - 1]}…"


def _line(curve: dict[int, float]) -> tuple[list[int], list[float]]:
    blocks = sorted(curve)
    return blocks, [curve[block] for block in blocks]


def _log_scale(axis: Axes, kind: str) -> None:
    """With plain numbers at its ticks, the more of them the fewer decades there are."""
    axis.set_yscale(kind)
    low, high = axis.get_ylim()
    if 0 < 10 * low <= high < 1000 * low:
        axis.yaxis.set_major_locator(LogLocator(subs=(1, 2, 5)))
    plain = FuncFormatter(lambda value, _: f"{value:.3g}")
    axis.yaxis.set_major_formatter(plain)
    axis.yaxis.set_minor_formatter(plain if 0 < high < 10 * low else NullFormatter())
    axis.tick_params(which="minor", labelsize=7)


def _by_block(axis: Axes, run: RunFacts, runs: Sequence[RunFacts], heading: str) -> None:
    axis.set_xlabel("block of the model", fontsize=9)
    axis.set_ylabel(heading, fontsize=9)
    axis.xaxis.set_major_locator(MaxNLocator(integer=True))
    axis.legend(fontsize=8, frameon=False, ncols=3, loc="upper center", bbox_to_anchor=(0.5, -0.18))
    if len(runs) > 1:
        axis.set_title(_short(run.name, 44), fontsize=9)


def _finished(figure: Figure, axes: Sequence[Axes], below: str) -> Figure:
    for axis in axes:
        axis.set_xlabel(below, fontsize=9)
        axis.xaxis.set_major_locator(MaxNLocator(nbins=6, integer=True))
    names = {text for axis in axes for text in axis.get_legend_handles_labels()[1]}
    return with_legend(figure, axes) if len(names) > 1 else figure
