"""Calibration over bins of confidence: reliability, and the ECE of all tasks' examples as one set."""

from __future__ import annotations

import math

import numpy as np
import pandas as pd
from scipy import stats

from abmll.compare.statistics import CONFIDENCE, RESAMPLES, Estimate
from abmll.metrics import CALIBRATION_BINS

GAPS = [f"gap{number}" for number in range(CALIBRATION_BINS)]


def reliability_bins(confidence: np.ndarray, correct: np.ndarray) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Of each bin, closed on the left and the last on both sides: share of the examples, mean confidence, accuracy."""
    number = np.minimum((confidence * CALIBRATION_BINS).astype(int), CALIBRATION_BINS - 1)
    size, *sums = (np.bincount(number, values, CALIBRATION_BINS) for values in (None, confidence, correct))
    with np.errstate(invalid="ignore"):  # an empty bin has no mean
        return size / len(confidence), *(total / size for total in sums)


def gaps(confidence: np.ndarray, correct: np.ndarray) -> dict[str, float]:
    """Sum over each bin's examples of confidence - correctness, by the names in GAPS; all NaN where a confidence is.

    These sums add up over tasks, which a task's ECE does not: its absolute values are taken before.
    """
    if np.isnan(confidence).any():
        return dict.fromkeys(GAPS, math.nan)
    share, mean, accuracy = reliability_bins(confidence, correct)
    return dict(zip(GAPS, np.nan_to_num(len(confidence) * share * (mean - accuracy)), strict=True))


def pooled_ece(own: pd.DataFrame) -> Estimate:
    """ECE of one label's examples of all tasks as one set, the mean over seeds; its 95 % BCa interval over tasks.

    `own`: a row a task and seed, with n and the columns GAPS. Tasks are resampled with all of their seeds, and the ECE
    is computed again: noise of its own makes a resample's ECE larger, a bias that BCa takes away, so that the interval
    reaches further down than up. NaN where a task diverged; NaN bounds of a single task.
    """
    columns = [*GAPS, "n"]
    table = own.set_index(["task", "seed"])[columns].unstack(fill_value=0).to_numpy(dtype=float)
    table = table.reshape(len(table), len(columns), -1)  # task, bins and n, seed

    def ece(tasks: np.ndarray, axis: int = -1) -> np.ndarray:
        total = table[tasks].sum(axis=axis - 2)
        return (np.abs(total[..., :-1, :]).sum(axis=-2) / total[..., -1, :]).mean(axis=-1)

    tasks = np.arange(len(table))
    value = float(ece(tasks))
    if math.isnan(value) or len(table) == 1:
        return Estimate(value, math.nan, math.nan)
    if not np.ptp(table, axis=0).any():
        return Estimate(value, value, value)
    generator = np.random.default_rng(0)  # the same tables from the same scores
    found = stats.bootstrap(
        (tasks,), ece, n_resamples=RESAMPLES, confidence_level=CONFIDENCE, batch=1000, vectorized=True, rng=generator
    ).confidence_interval
    return Estimate(value, float(found.low), float(found.high))
