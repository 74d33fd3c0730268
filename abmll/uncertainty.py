"""What a model's confidence is worth: risk against coverage, refinement and calibration, and what points at errors."""

from __future__ import annotations

import math
from dataclasses import dataclass, fields

import torch
from scipy.optimize import minimize_scalar
from scipy.stats import mannwhitneyu

from abmll.metrics import SMALLEST, Predictions

LARGEST_SCALE = 1e3  # 1 / temperature lies between this and its inverse; a perfectly separated set would ask for more


@dataclass(frozen=True)
class Uncertainty:
    """Scores of one set of examples; refinement and calibration in nats, the others fractions."""

    aurc: float  # area under the risk-coverage curve: the mean error rate of the k surest examples, over k = 1..n
    accuracy_at_80: float  # of the surest 80 %
    accuracy_at_50: float
    refinement: float  # NLL among the options that the best temperature leaves
    calibration: float  # what that temperature takes away: nll_options = refinement + calibration
    commonest_prediction: float  # its share of the examples; 1: the predictions are constant
    # probability that a wrong prediction has the larger value than a right one; NaN without either, or without samples
    auroc_confidence: float  # by 1 - confidence
    auroc_variance: float
    auroc_mutual_information: float


def uncertainty(predictions: Predictions) -> Uncertainty:
    """Scores of the examples as one set, all NaN where a prediction is NaN. ValueError if there are no examples."""
    options = predictions.options
    if not len(options):
        raise ValueError("uncertainty: 0 examples: a task needs at least one test example; check the task's test split")
    if options.isnan().any():
        return Uncertainty(**{field.name: math.nan for field in fields(Uncertainty)})
    confidence, choice = options.max(dim=1)
    correct = choice == predictions.label
    risk = selective_risk(confidence, correct)
    refined, removed = refine(options, predictions.label)
    return Uncertainty(
        aurc=float(risk.mean()),
        accuracy_at_80=1 - float(risk[_kept(0.8, len(risk)) - 1]),
        accuracy_at_50=1 - float(risk[_kept(0.5, len(risk)) - 1]),
        refinement=refined,
        calibration=removed,
        commonest_prediction=float(choice.bincount().max()) / len(choice),
        auroc_confidence=error_auroc(1 - confidence, correct),
        auroc_variance=error_auroc(predictions.variance, correct),
        auroc_mutual_information=error_auroc(predictions.mutual_information, correct),
    )


def selective_risk(confidence: torch.Tensor, correct: torch.Tensor) -> torch.Tensor:
    """Error rate [n] among the k examples of the highest confidence, for k = 1..n (Geifman and El-Yaniv, 2017).

    `confidence` [n] and `correct` [n] bool, in any order. Examples of equal confidence are taken in the mean over all
    of their orders, where each of them costs the error rate of all.
    """
    _, group, size = (-confidence).unique(return_inverse=True, return_counts=True)  # the surest group first
    errors = torch.zeros(len(size), dtype=torch.float64).index_add_(0, group, (~correct).double())
    one_by_one = (errors / size).repeat_interleave(size)
    return one_by_one.cumsum(0) / torch.arange(1, len(correct) + 1)


def refine(options: torch.Tensor, label: torch.Tensor) -> tuple[float, float]:
    """(refinement, calibration) in nats: the NLL after the best temperature, and the part that this removes.

    `options` [n, C] as in `Predictions`, `label` [n]. After Berta et al., "Rethinking early stopping: refine, then
    calibrate" (2025): calibration is the error that a rescaling removes, refinement what is left. The temperature is
    fitted to the same examples, so that calibration is never negative; its one parameter flatters every method by
    about 1 / 2n nats. NLL is convex in 1 / temperature, so scipy's search in one dimension finds the minimum. That
    suffices: probmetrics, the authors' package, is a beta that brings scikit-learn and three more, and scikit-learn's
    temperature scaling, as it does, wants the same options for all examples.
    """
    # beyond an example's options stands 0; its logarithm must stay -inf under every temperature
    logits = options.clamp(min=SMALLEST).log().where(options > 0, -math.inf)
    right = options.gather(1, label[:, None])[:, 0].clamp(min=SMALLEST).log()

    def nll(log_scale: float) -> float:
        scale = math.exp(log_scale)
        return float(((scale * logits).logsumexp(dim=1) - scale * right).mean())

    limit = math.log(LARGEST_SCALE)
    best = minimize_scalar(nll, bounds=(-limit, limit), method="bounded", options={"xatol": 1e-8}).fun
    unscaled = -float(right.mean())
    refined = min(float(best), unscaled)
    return refined, unscaled - refined


def error_auroc(signal: torch.Tensor, correct: torch.Tensor) -> float:
    """Probability that `signal` [n] is larger on a wrong prediction than on a right one, ties counted half.

    NaN where `correct` [n] bool does not hold both, or where there is no signal: a NaN in it.
    """
    if correct.all() or not correct.any() or signal.isnan().any():
        return math.nan
    wrong, right = signal[~correct], signal[correct]
    return float(mannwhitneyu(wrong.numpy(), right.numpy()).statistic) / (len(wrong) * len(right))


def _kept(coverage: float, n: int) -> int:
    """The fewest examples that are at least this share of n."""
    return math.ceil(coverage * n - 1e-9)
