"""Intervals and tests for means over tasks.

The task is the unit. Examples of one task share its wording and its labels, so an interval over examples would be far
too narrow (Miller, "Adding error bars to evals", 2024, on clustered questions): tasks are resampled, each with all of
its examples. Methods are compared by their differences task by task, which takes away what makes a task hard for all.

Seeds are averaged before. Three of them have ten distinct resamples, too few to tell a variance from, and a method's
seeds see the same tasks, so that they are no further clusters. An interval therefore speaks about other tasks of the
same kind and these very seeds; the tables put the standard deviation over seeds beside it.
"""

from __future__ import annotations

import math
from typing import NamedTuple

import numpy as np
from scipy import stats

CONFIDENCE = 0.95
RESAMPLES = 9_999
RESAMPLED_AT_A_TIME = 2**22  # values
SIGN_FLIPS = 2**16  # all of them up to 16 tasks, so many random ones beyond


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
    """Mean of one value a task [n] and its 95 % bootstrap interval (bias-corrected and accelerated).

    For the difference of two methods give the differences by task: resampling them is the paired bootstrap. NaN where
    a value is NaN. ValueError if there are no tasks.
    """
    if not len(tasks):
        raise ValueError("estimate: 0 tasks: the methods that are compared have none in common; score them on the same")
    mean = float(np.mean(tasks))
    if math.isnan(mean) or len(tasks) == 1:
        return Estimate(mean, math.nan, math.nan)
    if np.ptp(tasks) == 0:
        return Estimate(mean, mean, mean)
    generator = np.random.default_rng(0)  # the same tables from the same scores
    batch = max(1, RESAMPLED_AT_A_TIME // len(tasks))  # the resamples are the same, and the memory bounded
    found = stats.bootstrap(
        (tasks,), np.mean, n_resamples=RESAMPLES, confidence_level=CONFIDENCE, batch=batch, rng=generator
    ).confidence_interval
    return Estimate(mean, float(found.low), float(found.high))


def permutation_p(differences: np.ndarray) -> float:
    """Two-sided p of the paired permutation test: were the methods alike, every task's difference [n] could as well
    have the other sign. Exact up to 16 tasks. NaN where a difference is NaN."""
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

    The i-th smallest times (m - i), never below a smaller one's and at most 1. NaN stays NaN and is not counted.
    statsmodels has it too, and brings five packages.
    """
    corrected = np.full(len(p), math.nan)
    order = np.argsort(p)[: np.isfinite(p).sum()]  # NaN sorts last
    factors = len(order) - np.arange(len(order))
    corrected[order] = np.minimum(np.maximum.accumulate(p[order] * factors), 1.0)
    return corrected


def record(improvements: np.ndarray) -> Record:
    """Wins, ties and losses by task, of improvements [n] that are positive where the method is better."""
    tie = np.isclose(improvements, 0, rtol=0, atol=1e-12)
    return Record(int((improvements[~tie] > 0).sum()), int(tie.sum()), int((improvements[~tie] < 0).sum()))
