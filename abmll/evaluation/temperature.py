"""Temperature scaling (Guo et al., "On calibration of modern neural networks", ICML 2017), one T a task, fitted to the
few examples that a task has: with a prior on log T, which a few examples move a little and many overrule.
"""

from __future__ import annotations

import math

from abmll.metrics import Predictions

RANGE = (1 / 20, 20.0)  # of T
PRIOR_STD = 0.5  # of log T, whose prior is a normal around 0: T from 0.37 to 2.7 with 95 %


def fit_temperature(predictions: Predictions) -> float:
    """The T in RANGE of the greatest posterior density in log T, for options ∝ p^(1/T); NaN where a prediction is.

    The prior says that predictions are right as they are, and how far one may think that they are not. Without it a few
    right answers would be made into certainty, T = 0, which costs without bound at the first wrong one, and a few wrong
    ones into T without end.

    Of examples that adaptation has trained on the model is surer and more often right than of new ones, so that T comes
    out too low.
    """
    if predictions.options.isnan().any():
        return math.nan
    from scipy.optimize import minimize_scalar  # slow to import, and few runs ask for a temperature

    logits = predictions.options.log()  # -inf: there is no such option

    def negative_log_posterior(log_temperature: float) -> float:
        logs = (logits / math.exp(log_temperature)).log_softmax(dim=1)
        nll = -logs.gather(1, predictions.label[:, None]).sum()
        return float(nll) + 0.5 * (log_temperature / PRIOR_STD) ** 2

    bounds = [math.log(end) for end in RANGE]
    return math.exp(minimize_scalar(negative_log_posterior, bounds=bounds, method="bounded").x)
