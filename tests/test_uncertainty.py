from __future__ import annotations

import math
from dataclasses import astuple
from itertools import permutations

import numpy as np
import pytest
import torch

from abmll.metrics import Predictions
from abmll.uncertainty import error_auroc, refine, selective_risk, uncertainty


def of_options(rows: list[list[float]], labels: list[int], variance: list[float] | None = None) -> Predictions:
    options, label = torch.tensor(rows, dtype=torch.float64), torch.tensor(labels)
    drawn = torch.full((len(label),), math.nan) if variance is None else torch.tensor(variance)
    return Predictions(options, options.argmax(dim=1) == label, torch.zeros(len(label)), label, drawn, 2 * drawn)


def test_risk_coverage_by_hand():
    # surest first: right .9, wrong .8, right .7, wrong .6, right .55
    got = uncertainty(of_options([[0.3, 0.7], [0.9, 0.1], [0.6, 0.4], [0.2, 0.8], [0.55, 0.45]], [1, 0, 1, 0, 0]))
    assert got.aurc == pytest.approx((0 + 1 / 2 + 1 / 3 + 2 / 4 + 2 / 5) / 5)
    assert got.accuracy_at_80 == pytest.approx(2 / 4)
    assert got.accuracy_at_50 == pytest.approx(2 / 3)  # 3 of 5: the fewest that are at least half
    assert got.commonest_prediction == 3 / 5


def test_ties_are_the_mean_over_all_orders():
    confidence = torch.tensor([0.9, 0.6, 0.6, 0.6, 0.5])
    correct = torch.tensor([True, False, True, True, False])
    curves = []
    for order in permutations([1, 2, 3]):
        wrong = [0.0, *(float(not correct[i]) for i in order), 1.0]
        curves.append(np.cumsum(wrong) / np.arange(1, 6))
    want = np.mean(curves, axis=0)
    for shuffled in (torch.arange(5), torch.tensor([4, 2, 0, 3, 1])):
        np.testing.assert_allclose(selective_risk(confidence[shuffled], correct[shuffled]), want)


def test_equal_confidences_have_the_error_rate_everywhere():
    got = uncertainty(of_options([[0.6, 0.4]] * 4, [0, 0, 0, 1]))
    assert (got.aurc, got.accuracy_at_80, got.accuracy_at_50) == pytest.approx((0.25, 0.75, 0.75))
    assert got.commonest_prediction == 1.0


def test_refinement_of_one_confidence_is_the_entropy_of_the_accuracy():
    """All say .9 and 7 of 10 are right: the best temperature brings .7."""
    refined, removed = refine(torch.tensor([[0.9, 0.1]] * 10, dtype=torch.float64), torch.tensor([0] * 7 + [1] * 3))
    entropy = -0.7 * math.log(0.7) - 0.3 * math.log(0.3)
    assert refined == pytest.approx(entropy, abs=1e-9)
    assert removed == pytest.approx(-0.7 * math.log(0.9) - 0.3 * math.log(0.1) - entropy, abs=1e-9)


def test_a_temperature_that_was_applied_is_taken_away():
    """Labels in the proportions that the model says: calibrated, and 4 times as cold the same refinement."""
    rows = torch.tensor([[0.5, 0.3, 0.2], [0.8, 0.2, 0.0]], dtype=torch.float64)
    calibrated, label = rows.repeat_interleave(10, dim=0), torch.tensor([0] * 5 + [1] * 3 + [2] * 2 + [0] * 8 + [1] * 2)
    cold = calibrated**4 / (calibrated**4).sum(dim=1, keepdim=True)
    entropy = -float(torch.special.xlogy(rows, rows).sum(dim=1).mean())
    assert refine(calibrated, label) == pytest.approx((entropy, 0), abs=1e-9)
    refined, removed = refine(cold, label)
    assert refined == pytest.approx(entropy, abs=1e-9)
    assert removed == pytest.approx(-float(cold.gather(1, label[:, None]).log().mean()) - entropy, abs=1e-9)


@pytest.mark.parametrize(("label", "want"), [(0, 0.0), (1, math.log(2))])
def test_extremes_of_refinement(label, want):
    """All right: nothing is left; all wrong: a coin's toss. Both within what the bounded temperature leaves."""
    refined, _ = refine(torch.tensor([[0.9, 0.1]] * 5, dtype=torch.float64), torch.full((5,), label))
    assert refined == pytest.approx(want, abs=2e-3)


def test_auroc_of_errors():
    correct = torch.tensor([True, True, False, False])
    # pairs (wrong, right): .5 > .1, .5 = .5, .2 > .1, .2 < .5
    assert error_auroc(torch.tensor([0.1, 0.5, 0.5, 0.2]), correct) == pytest.approx((1 + 0.5 + 1 + 0) / 4)
    assert math.isnan(error_auroc(torch.tensor([0.1, 0.5]), torch.tensor([True, True])))
    assert math.isnan(error_auroc(torch.tensor([math.nan] * 4), correct))


def test_signals_of_an_error():
    """The wrong one is the least sure and has the smallest variance."""
    options, labels = [[0.9, 0.1], [0.8, 0.2], [0.6, 0.4]], [0, 0, 1]
    got = uncertainty(of_options(options, labels, variance=[0.2, 0.3, 0.1]))
    assert (got.auroc_confidence, got.auroc_variance, got.auroc_mutual_information) == (1, 0, 0)
    assert math.isnan(uncertainty(of_options(options, labels)).auroc_variance)


def test_predictions_that_diverged_and_none_at_all():
    assert all(map(math.isnan, astuple(uncertainty(of_options([[math.nan, math.nan], [0.6, 0.4]], [0, 0])))))
    with pytest.raises(ValueError, match="0 examples"):
        uncertainty(of_options([[0.6, 0.4]], [0]).take(torch.tensor([], dtype=torch.int64)))
