"""Temperature scaling (Guo et al., "On calibration of modern neural networks", ICML 2017), one T a task, fitted to the
few examples that a task has: with the targets of Platt, "Probabilistic outputs for support vector machines" (1999).
"""

from __future__ import annotations

import math

import torch
from scipy.optimize import minimize_scalar

from abmll.metrics import Predictions

RANGE = (1 / 20, 20.0)  # of T: where the options' probabilities are worse than guesses, the best one is beyond its end


def fit_temperature(predictions: Predictions) -> float:
    """The T in RANGE that gives n examples' targets the least cross-entropy, for options ∝ p^(1/T); NaN where a
    prediction is.

    An example's target is (n + 1) / (n + k) for the right one of its k options, 1 / (n + k) for each other: what n
    right answers make of a uniform prior. A target of 1, as the likeliest T has it, makes a few right answers into
    certainty, T = 0, which costs without bound at the first wrong one.

    Of examples that adaptation has trained on the model is surer and more often right than of new ones, so that T comes
    out too low.
    """
    if predictions.options.isnan().any():
        return math.nan
    n, there = len(predictions.label), predictions.options > 0  # 0: there is no such option
    right = torch.zeros_like(predictions.options).scatter_(1, predictions.label[:, None], 1.0)
    targets = (n * right + there.double()) / (n + there.sum(dim=1, keepdim=True))
    logits = predictions.options.log()

    def cross_entropy(log_temperature: float) -> float:
        logs = (logits / math.exp(log_temperature)).log_softmax(dim=1)
        return float(-(targets * logs.where(there, 0.0)).sum(dim=1).mean())

    return math.exp(minimize_scalar(cross_entropy, bounds=[math.log(end) for end in RANGE], method="bounded").x)
