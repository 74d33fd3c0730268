"""Intervals and tests for means over tasks.

The task is the unit. Examples of one task share its wording and its labels, so an interval over examples would be far
too narrow (Miller, "Adding error bars to evals", 2024, on clustered questions): tasks are drawn, each with all of its
examples. Methods are compared by their differences task by task, which takes away what makes a task hard for all.

Seeds are averaged before. Three of them are too few to tell a variance from, and a method's seeds see the same tasks,
so that they are no further clusters. An interval therefore speaks about other tasks of the same kind and these very
seeds; the tables put the standard deviation over seeds beside it.

Intervals come from the means of the tasks' subsets, as the permutation test does, so that both say the same. A
bootstrap's interval can leave out a zero that the test does not reject, and with six or fifteen tasks, many of whose
differences are zero, it misses too often (`benchmarks/interval_coverage.py`).
"""

from __future__ import annotations

import math
from typing import NamedTuple

import numpy as np
from scipy import stats

CONFIDENCE = 0.95
EXACT = 16  # up to so many values all subsets are taken, beyond that random ones, 2^16 - 1 at most
SUBSET_VALUES = 2**22  # held at a time; of more than 64 values there are SUBSET_VALUES / n subsets
FEWEST_SUBSETS = 9_999  # of however many values
ROUNDING = 1e-12  # of the values: less is a sum's rounding
FEWEST = math.ceil(-math.log2((1 - CONFIDENCE) / 2))  # values with an interval; 5 have a confidence of 94 % at most


class Estimate(NamedTuple):
    """A mean and its interval, in the values' own unit; NaN bounds where the values are too few for one."""

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

    The 2^n - 1 means of the values' non-empty subsets cut the line into 2^n parts. Where the values are independent,
    and each from a continuous distribution that is symmetric around one centre, every part is as likely to hold it
    (Hartigan, "Using subsample values as typical values", 1969). So the interval leaves out 2.5 % of the parts at each
    end. Equal values make it wider than it must be; of skewed ones it is an approximation, as others are. It is what
    `permutation_p` does not reject: p <= .05 where zero lies outside, and nowhere else.

    Values are finite or NaN. NaN where one is NaN, and for the bounds of fewer than FEWEST. ValueError if there are no
    tasks.
    """
    if not len(tasks):
        raise ValueError("estimate: 0 tasks: the methods that are compared have none in common; score them on the same")
    mean = float(_without_rounding(np.mean(tasks), tasks))
    if math.isnan(mean) or len(tasks) < FEWEST:
        return Estimate(mean, math.nan, math.nan)
    if np.ptp(tasks) == 0:  # their subsets' means differ in the last digit
        return Estimate(mean, mean, mean)
    means = np.sort(subset_means(tasks))
    outside = math.floor((1 - CONFIDENCE) / 2 * (len(means) + 1))
    return Estimate(mean, float(means[outside - 1]), float(means[-outside]))


def subset_means(values: np.ndarray) -> np.ndarray:
    """The means of all non-empty subsets of values [n]; beyond EXACT values of random ones, the same at each call."""
    count = len(values)
    if count <= EXACT:
        chosen = (np.arange(1, 2**count)[:, None] >> np.arange(count) & 1).astype(bool)
        means = chosen @ values / chosen.sum(axis=1)
    else:
        generator = np.random.default_rng(0)
        means = np.empty(max(FEWEST_SUBSETS, min(2**EXACT - 1, SUBSET_VALUES // count)))
        rows = max(1, SUBSET_VALUES // count)
        for start in range(0, len(means), rows):
            part = means[start : start + rows]
            chosen = generator.random((len(part), count)) < 0.5
            chosen[~chosen.any(axis=1)] = True  # hardly ever
            part[:] = chosen @ values / chosen.sum(axis=1)
    return _without_rounding(means, values)


def _without_rounding(means: np.ndarray, values: np.ndarray) -> np.ndarray:
    """Means of some of the values, zero where only a sum's rounding is left."""
    return np.where(np.abs(means) <= ROUNDING * np.abs(values).max(), 0.0, means)


def permutation_p(differences: np.ndarray) -> float:
    """Two-sided p of the paired permutation test: were the methods alike, every task's difference [n] could as well
    have the other sign. Never below 2^(1-n). NaN where a difference is NaN.

    Flipping the signs of a subset leaves a sum that is at least as large where the subset's own is not positive. So of
    the subsets, the empty one counted too, those with a mean on zero's other side are counted, and doubled for both
    tails. Exact up to EXACT tasks.
    """
    if np.isnan(differences).any():
        return math.nan
    means = subset_means(differences)
    beyond = min(np.count_nonzero(means <= 0), np.count_nonzero(means >= 0)) + 1
    return min(1.0, 2 * beyond / (len(means) + 1))


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


def differences(mine: np.ndarray, theirs: np.ndarray) -> np.ndarray:
    """Of two methods' values [n] by task, without the rounding of equal ones; NaN where either diverged."""
    found = mine - theirs
    found[np.isclose(mine, theirs, rtol=0, atol=ROUNDING)] = 0.0
    return found


def outcomes(mine: np.ndarray, theirs: np.ndarray) -> np.ndarray:
    """1, 0 or -1 by task, of two methods' values [n], more being better. NaN, which diverged, loses to a number."""
    signs, broken = np.sign(differences(mine, theirs)), np.isnan(theirs).astype(int) - np.isnan(mine)
    return np.where(np.isnan(signs), broken, signs).astype(int)


def record(found: np.ndarray) -> Record:
    """The count of each of `outcomes` [n]."""
    return Record(*(int((found == value).sum()) for value in (1, 0, -1)))
