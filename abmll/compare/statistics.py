"""Intervals and tests for means over tasks.

The task is the unit. Examples of one task share its wording and its labels, so an interval over examples would be far
too narrow (Miller, "Adding error bars to evals", 2024, on clustered questions): tasks are drawn, each with all of its
examples. Methods are compared by their differences task by task, which takes away what makes a task hard for all.

Seeds are averaged before. Three of them are too few to tell a variance from, and a method's seeds see the same tasks,
so that they are no further clusters. An interval therefore speaks about other tasks of the same kind and these very
seeds; the tables put the standard deviation over seeds beside it.

Intervals come from the means of the tasks' subsets and not from a bootstrap: with six or fifteen tasks, many of whose
differences are zero, a bootstrap's interval misses too often (`benchmarks/interval_coverage.py`), and can leave out a
zero that the permutation test does not.
"""

from __future__ import annotations

import math
from typing import NamedTuple

import numpy as np
from scipy import stats

CONFIDENCE = 0.95
EXACT = 16  # up to so many tasks all sign flips and all subsets are taken, beyond that random ones
SIGN_FLIPS, SUBSETS = 2**EXACT, 9_999
SUBSET_VALUES = 2**22  # held at a time
FEWEST = math.ceil(-math.log2((1 - CONFIDENCE) / 2))  # values with an interval; 5 have a confidence of 94 % at most


class Estimate(NamedTuple):
    """A mean and its interval, in the values' own unit; NaN bounds where one value tells nothing of the spread."""

    mean: float
    low: float
    high: float


class Record(NamedTuple):
    """On how many tasks a method is better than, equal to, and worse than another."""

    wins: int
    ties: int
    losses: int


def wilson(share: float, n: int) -> Estimate:
    """A share of n independent examples and Wilson's score interval (1927); NaN where the share is."""
    if math.isnan(share):
        return Estimate(math.nan, math.nan, math.nan)
    found = stats.binomtest(round(share * n), n).proportion_ci(CONFIDENCE, method="wilson")
    return Estimate(share, float(found.low), float(found.high))


def estimate(tasks: np.ndarray) -> Estimate:
    """Mean of one value a task [n] and its 95 % interval; for two methods give their differences by task.

    The 2^n - 1 means of the values' non-empty subsets cut the line into 2^n parts. Where values are drawn from any
    distributions that are symmetric around one centre, each part is as likely to hold it (Hartigan, "Using subsample
    values as typical values", 1969). So the interval leaves out 2.5 % of the parts at each end. It is what
    `permutation_p` does not reject: p <= .05 where zero lies outside, and nowhere else.

    NaN where a value is NaN, and for the bounds of fewer than FEWEST values. ValueError if there are no tasks.
    """
    if not len(tasks):
        raise ValueError("estimate: 0 tasks: the methods that are compared have none in common; score them on the same")
    mean = float(np.mean(tasks))
    if math.isnan(mean) or len(tasks) < FEWEST:
        return Estimate(mean, math.nan, math.nan)
    if np.ptp(tasks) == 0:  # their subsets' means differ in the last digit
        return Estimate(mean, mean, mean)
    means = np.sort(subset_means(tasks))
    outside = math.floor((1 - CONFIDENCE) / 2 * (len(means) + 1))
    return Estimate(mean, float(means[outside - 1]), float(means[-outside]))


def subset_means(values: np.ndarray) -> np.ndarray:
    """The means of all non-empty subsets of values [n]; of SUBSETS random ones beyond EXACT values."""
    count, parts = len(values), []
    generator = np.random.default_rng(0)  # the same tables from the same scores
    total = 2**count - 1 if count <= EXACT else SUBSETS
    rows = max(1, SUBSET_VALUES // count)
    for start in range(1, total + 1, rows):
        numbers = np.arange(start, min(start + rows, total + 1))
        if count <= EXACT:
            chosen = (numbers[:, None] >> np.arange(count) & 1).astype(bool)
        else:
            chosen = generator.random((len(numbers), count)) < 0.5  # of 17 or more values hardly ever none
            chosen[~chosen.any(axis=1)] = True
        parts.append(chosen @ values / chosen.sum(axis=1))
    return np.concatenate(parts)


def permutation_p(differences: np.ndarray) -> float:
    """Two-sided p of the paired permutation test: were the methods alike, every task's difference [n] could as well
    have the other sign. Exact up to EXACT tasks, and never below 2^(1-n). NaN where a difference is NaN."""
    if np.isnan(differences).any():
        return math.nan
    if len(differences) == 1:  # both signs are equally extreme; scipy asks for two values
        return 1.0
    found = stats.permutation_test(
        (differences,),
        lambda values, axis: np.mean(values, axis=axis),
        permutation_type="samples",
        vectorized=True,
        n_resamples=SIGN_FLIPS,
        rng=np.random.default_rng(0),
    )
    return float(found.pvalue)


def holm(p: np.ndarray) -> np.ndarray:
    """Holm's step-down correction (1979) of a family's p-values [m]: reject where it is below the level.

    The i-th smallest times (m - i), never below a smaller one's and at most 1. NaN stays NaN and counts in m: what
    could not be tested was asked for all the same. statsmodels has it too, and brings five packages.
    """
    corrected = np.full(len(p), math.nan)
    order = np.argsort(p)[: np.isfinite(p).sum()]  # NaN sorts last
    factors = len(p) - np.arange(len(order))
    corrected[order] = np.minimum(np.maximum.accumulate(p[order] * factors), 1.0)
    return corrected


def outcomes(mine: np.ndarray, theirs: np.ndarray) -> np.ndarray:
    """1, 0 or -1 by task, of two methods' values [n], more being better. NaN, which diverged, loses to a number."""
    broken = np.isnan(theirs).astype(int) - np.isnan(mine)
    compared = np.where(np.isclose(mine, theirs, rtol=0, atol=1e-12), 0, np.sign(mine - theirs))
    return np.where(np.isnan(mine) | np.isnan(theirs), broken, compared).astype(int)


def record(found: np.ndarray) -> Record:
    """The count of each of `outcomes` [n]."""
    return Record(*(int((found == value).sum()) for value in (1, 0, -1)))
