"""Calibration over bins of confidence: reliability, what chance adds to an ECE, and the ECE of all tasks' examples."""

from __future__ import annotations

import math

import numpy as np
import pandas as pd
import torch

from abmll.metrics import CALIBRATION_BINS

GAPS = [f"gap{number}" for number in range(CALIBRATION_BINS)]


def _bins_of(confidence: np.ndarray) -> np.ndarray:
    """By the very edges of torchmetrics' ECE: a confidence of 11/15 would else stand in another bin than there."""
    edges = torch.linspace(0, 1, CALIBRATION_BINS + 1, dtype=torch.float64)
    number = torch.bucketize(torch.tensor(confidence, dtype=torch.float64), edges, right=True).numpy() - 1
    return np.minimum(number, CALIBRATION_BINS - 1)


def reliability_bins(confidence: np.ndarray, correct: np.ndarray) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Of each bin, closed on the left and the last on both sides: share of the examples, mean confidence, accuracy."""
    number = _bins_of(confidence)
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


def chance_ece(confidence: np.ndarray) -> float:
    """Expected ECE of answers that are right as often as these confidences [n] say; NaN where one is.

    What is left of an ECE in a perfectly calibrated model, by the chance of n examples alone (Bröcker and Smith, 2007,
    resample it). Exact: the count of right answers in a bin is Poisson-binomial, and the ECE is the sum of its mean
    absolute deviations over n. Few examples a bin and confidences in the middle make it large.
    """
    if np.isnan(confidence).any():
        return math.nan
    number, total = _bins_of(confidence), 0.0
    for bin_number in np.unique(number):
        own = confidence[number == bin_number].astype(np.float64)
        counts = np.ones(1)  # the probability of each count of right answers, an answer after the other
        for right in own:
            counts = np.append(counts * (1 - right), 0.0) + np.append(0.0, counts * right)
        total += float(counts @ np.abs(np.arange(len(counts)) - own.sum()))
    return total / len(confidence)


def pooled_ece(own: pd.DataFrame) -> float:
    """ECE of one label's examples of all tasks as one set, the mean over seeds; NaN where a task diverged.

    `own`: a row a task and seed, with n and the columns GAPS. It has no interval: noise of its own makes a resample's
    ECE larger, by so much that a bootstrap's interval need not hold the value itself.
    """
    if own[GAPS].isna().any(axis=None):
        return math.nan
    totals = own.groupby("seed")[[*GAPS, "n"]].sum()
    return float((totals[GAPS].abs().sum(axis=1) / totals["n"]).mean())
