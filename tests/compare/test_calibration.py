from __future__ import annotations

import itertools
import math

import numpy as np
import pandas as pd
import pytest
import torch
from made_up import examples_of

from abmll.compare.calibration import chance_ece, gaps, pooled_ece, reliability_bins
from abmll.metrics import score
from abmll.score_files import as_predictions


def test_bins_of_reliability_by_hand():
    share, confidence, accuracy = reliability_bins(
        np.array([0.5, 0.52, 0.94, 1.0]), np.array([True, False, True, True])
    )
    assert share[7] == share[14] == 0.5 and share.sum() == 1  # .5 lies in [7/15, 8/15), 1 in the last
    assert (confidence[7], accuracy[7]) == (pytest.approx(0.51), 0.5)
    assert (confidence[14], accuracy[14]) == (pytest.approx(0.97), 1.0)
    assert np.isnan(np.delete(accuracy, [7, 14])).all()


def rows(**tasks: list[list[tuple[float, bool]]]) -> pd.DataFrame:
    """Scores of tasks, each a list by seed of its examples' (confidence, correct)."""
    found = []
    for task, seeds in tasks.items():
        for seed, examples in enumerate(seeds):
            confidence, correct = (np.array(values) for values in zip(*examples, strict=True))
            found.append({"task": task, "seed": seed, "n": len(examples), **gaps(confidence, correct)})
    return pd.DataFrame(found)


def test_errors_of_two_tasks_cancel_where_they_are_pooled():
    """Each task's own ECE is a half, that of both is 0. The mean over seeds, not of all seeds' examples."""
    sure, unsure = [(0.5, True)], [(0.5, False)]
    assert pooled_ece(rows(one=[sure], other=[unsure])) == pytest.approx(0)
    assert pooled_ece(rows(one=[sure, sure], other=[unsure, sure])) == pytest.approx((0 + 0.5) / 2)
    # tasks of unequal size: 3 of 4 examples are 0.5 too low, 1 is 0.5 too high
    assert pooled_ece(rows(one=[sure * 3], other=[unsure])) == pytest.approx(abs(-1.5 + 0.5) / 4)


def test_pooled_ece_is_the_ece_of_all_examples():
    random = np.random.default_rng(0)
    frames = [examples_of(random.dirichlet([1, 1, 1], size=30), random.integers(3, size=30)) for _ in range(4)]
    found = []
    for number, frame in enumerate(frames):
        confidence, choice = as_predictions(frame).options.max(dim=1)
        correct = choice == torch.tensor(frame["label"].tolist())
        found.append({"task": number, "seed": 0, "n": 30, **gaps(confidence.numpy(), correct.numpy())})
    wanted = score(as_predictions(pd.concat(frames))).ece
    assert pooled_ece(pd.DataFrame(found)) == pytest.approx(wanted, abs=1e-6)


@pytest.mark.parametrize("edge", range(8, 15))
def test_a_confidence_on_an_edge_stands_in_the_bin_that_a_tasks_ece_has_it_in(edge):
    """Ten right answers on the edge and ten wrong ones just below are two bins, and were one at 11/15."""
    confidence = np.repeat([edge / 15, edge / 15 - 0.01], 10)
    labels = np.repeat([0, 1], 10)
    examples = as_predictions(examples_of(np.stack([confidence, 1 - confidence], axis=1), labels))
    found = rows(task=[list(zip(confidence, labels == 0, strict=True))])
    assert pooled_ece(found) == pytest.approx(score(examples).ece, abs=1e-12)


def test_what_chance_makes_of_an_ece():
    """The mean ECE over all outcomes of four answers, each as likely as their confidences say."""
    confidence = [0.5, 0.52, 0.9, 1.0]
    wanted = 0.0
    for correct in itertools.product([True, False], repeat=4):
        chance = math.prod(p if right else 1 - p for p, right in zip(confidence, correct, strict=True))
        wanted += chance * pooled_ece(rows(task=[list(zip(confidence, correct, strict=True))]))
    assert chance_ece(np.array(confidence)) == pytest.approx(wanted, rel=1e-12) and wanted > 0.1
    assert chance_ece(np.array([0.9])) == pytest.approx(2 * 0.9 * 0.1) and chance_ece(np.array([1.0, 1.0])) == 0
    assert math.isnan(chance_ece(np.array([0.9, math.nan])))


def test_chance_goes_as_the_root_of_the_number_of_answers():
    """The mean absolute deviation of a binomial: sqrt(2 / pi) of its standard deviation, for many."""
    assert chance_ece(np.full(4000, 0.64)) == pytest.approx(math.sqrt(2 / math.pi * 0.64 * 0.36 / 4000), rel=1e-3)


def test_a_diverged_task_leaves_no_value():
    assert pooled_ece(rows(one=[[(0.9, True)]])) == pytest.approx(0.1)
    assert math.isnan(pooled_ece(rows(one=[[(0.9, True)]], other=[[(math.nan, False)]])))
