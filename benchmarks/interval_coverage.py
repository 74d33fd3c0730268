"""How often does a 95 % interval for a mean over few tasks miss it? Ours against the usual ones.

    python benchmarks/interval_coverage.py --output benchmarks/results/interval_coverage.json

Differences by task are drawn from made-up populations as comparisons have them: methods that agree on half of the
tasks, or differ much on a few. An interval that keeps its word misses the population's mean in 5 % of the draws.
"""

from __future__ import annotations

import argparse
import json
import math
from collections.abc import Callable
from pathlib import Path

import numpy as np
from scipy import stats

from abmll.compare.statistics import CONFIDENCE, estimate
from abmll.provenance import provenance

RESAMPLES = 1_999  # of the bootstraps
Bounds = tuple[float, float]
Population = tuple[Callable[[np.random.Generator, int], np.ndarray], float]  # draws n differences; their mean


def of_subsets(values: np.ndarray) -> Bounds:
    """`abmll.compare.statistics.estimate`."""
    return estimate(values)[1:]


def of_t(values: np.ndarray) -> Bounds:
    half = stats.t.ppf((1 + CONFIDENCE) / 2, len(values) - 1) * values.std(ddof=1) / math.sqrt(len(values))
    return values.mean() - half, values.mean() + half


def of_bootstrap(values: np.ndarray, method: str) -> Bounds:
    if np.ptp(values) == 0:  # BCa is not defined
        return values[0], values[0]
    generator = np.random.default_rng(0)
    found = stats.bootstrap(
        (values,), np.mean, n_resamples=RESAMPLES, confidence_level=CONFIDENCE, method=method, rng=generator
    )
    return found.confidence_interval.low, found.confidence_interval.high


INTERVALS: dict[str, Callable[[np.ndarray], Bounds]] = {
    "subset means (ours)": of_subsets,
    "Student's t": of_t,
    "bootstrap, BCa": lambda values: of_bootstrap(values, "BCa"),
    "bootstrap, percentile": lambda values: of_bootstrap(values, "percentile"),
}
POPULATIONS: dict[str, Population] = {
    "normal": (lambda random, n: random.normal(0, 1, n), 0.0),
    "half of them zero, else normal": (lambda random, n: random.normal(0, 1, n) * (random.random(n) < 0.5), 0.0),
    "half of them zero, else exponential": (lambda random, n: random.exponential(1, n) * (random.random(n) < 0.5), 0.5),
    "exponential": (lambda random, n: random.exponential(1, n), 1.0),
    "one in ten larger by 50 standard deviations": (
        lambda random, n: random.normal(0, 0.02, n) + (random.random(n) < 0.1),
        0.1,
    ),
}


def measure(tasks: int, sets: int, random: np.random.Generator) -> list[dict[str, object]]:
    """A row a population and interval: the share of `sets` draws of so many tasks that it misses, its mean width."""
    rows: list[dict[str, object]] = []
    for population, (draw, mean) in POPULATIONS.items():
        drawn = [draw(random, tasks) for _ in range(sets)]
        for name, interval in INTERVALS.items():
            bounds = np.array([interval(values) for values in drawn])
            missed = float(np.mean(~((bounds[:, 0] <= mean) & (mean <= bounds[:, 1]))))  # no interval holds nothing
            width = float(np.mean(bounds[:, 1] - bounds[:, 0]))
            rows.append({"tasks": tasks, "population": population, "interval": name, "missed": missed, "width": width})
    return rows


def table(rows: list[dict[str, object]]) -> str:
    """Markdown: a line a number of tasks and population, the share that each interval misses in %."""
    lines = [["tasks", "differences by task", *INTERVALS], ["---"] * (2 + len(INTERVALS))]
    for start in range(0, len(rows), len(INTERVALS)):
        own = rows[start : start + len(INTERVALS)]
        lines.append([str(own[0]["tasks"]), str(own[0]["population"]), *(f"{100 * row['missed']:.1f}" for row in own)])
    return "\n".join(f"| {' | '.join(line)} |" for line in lines)


def main(argv: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--tasks", type=int, nargs="+", default=[6, 15, 100])
    parser.add_argument("--sets", type=int, default=1_000, help="comparisons drawn of each kind")
    parser.add_argument("--output", help="JSON file")
    arguments = parser.parse_args(argv)
    random = np.random.default_rng(0)
    rows = [row for tasks in arguments.tasks for row in measure(tasks, arguments.sets, random)]
    print(f"Missed, % of {arguments.sets:,} (5 is right):\n\n{table(rows)}")
    if arguments.output:
        facts = {"sets": arguments.sets, "resamples": RESAMPLES, "rows": rows, "provenance": provenance()}
        Path(arguments.output).write_text(json.dumps(facts, indent=1) + "\n")


if __name__ == "__main__":
    main()
