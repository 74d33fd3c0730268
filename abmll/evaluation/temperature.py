"""Temperature scaling (Guo et al., "On calibration of modern neural networks", ICML 2017), one T a task."""

from __future__ import annotations

import math

from scipy.optimize import minimize_scalar
from torch.nn.functional import nll_loss

from abmll.metrics import Predictions

RANGE = (1 / 20, 20.0)  # of T: where every answer is right (or none), the best one is beyond an end


def fit_temperature(predictions: Predictions) -> float:
    """The T in RANGE that gives the right options the least NLL, for options ∝ p^(1/T); NaN where a prediction is.

    Of examples that adaptation has trained on the model is surer and more often right than of new ones, so that T comes
    out too low.
    """
    if predictions.options.isnan().any():
        return math.nan
    logits = predictions.options.log()

    def nll(log_temperature: float) -> float:
        return float(nll_loss((logits / math.exp(log_temperature)).log_softmax(dim=1), predictions.label))

    return math.exp(minimize_scalar(nll, bounds=[math.log(end) for end in RANGE], method="bounded").x)
