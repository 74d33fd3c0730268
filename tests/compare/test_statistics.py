from __future__ import annotations

import math
from fractions import Fraction
from itertools import product

import numpy as np
import pytest
from scipy import stats

from abmll.compare.statistics import FEWEST, differences, estimate, holm, outcomes, permutation_p, record, subset_means


def test_interval_covers_the_mean_as_often_as_it_says():
    """400 comparisons of 40 tasks: the hits of a 95 % interval lie within the binomial's 99.9 % range.

    Tasks differ much more than the methods on them: unpaired, the intervals would cover every time.
    """
    random = np.random.default_rng(1)
    sets, tasks, seeds, gain = 400, 40, 3, 0.02
    difficulty = random.normal(0.6, 0.2, size=(sets, tasks, 1))
    one = (
        difficulty + gain + random.normal(0, 0.03, size=(sets, tasks, 1)) + random.normal(0, 0.03, (sets, tasks, seeds))
    )
    other = difficulty + random.normal(0, 0.03, size=(sets, tasks, seeds))
    found = [estimate(differences) for differences in (one - other).mean(axis=2)]
    hits = sum(interval.low <= gain <= interval.high for interval in found)
    fewest, most = stats.binom.interval(0.999, sets, 0.95)
    assert fewest <= hits <= most
    assert sets - 1 > most  # an interval that always covers would be seen


def test_interval_of_the_mean_by_the_normal_distribution():
    """Of many tasks the interval is the normal one: 1.96 standard errors to each side."""
    values = np.random.default_rng(0).normal(size=2_000)
    found, error = estimate(values), values.std(ddof=1) / math.sqrt(len(values))
    assert found.mean == pytest.approx(values.mean())
    assert found.high - found.low == pytest.approx(2 * 1.96 * error, rel=0.05)


def test_interval_of_few_and_of_equal_tasks():
    """Of six values the interval is all that they span, which misses by 2 of 64; of five it would miss by 2 of 32."""
    assert FEWEST == 6
    assert estimate(np.array([0.5, 0.1, 0.3, 0.2, 0.9, 0.4])) == (pytest.approx(0.4), 0.1, 0.9)
    assert estimate(np.full(6, 0.3)) == (pytest.approx(0.3),) * 3
    assert estimate(np.array([0.1, 0.2, -0.3, 0, 0, 0])).mean == 0  # and no 9e-18, which may print as -0.0
    for few in ([0.3], [0.3] * 5):
        found = estimate(np.array(few))
        assert found.mean == pytest.approx(0.3) and math.isnan(found.low) and math.isnan(found.high)
    assert all(map(math.isnan, estimate(np.array([0.3, math.nan]))))
    with pytest.raises(ValueError, match="0 tasks"):
        estimate(np.array([]))


def test_subset_means_by_hand():
    assert sorted(subset_means(np.array([1.0, 2.0, 6.0]))) == [1.0, 1.5, 2.0, 3.0, 3.5, 4.0, 6.0]
    assert len(subset_means(np.arange(16.0))) == 2**16 - 1
    many = subset_means(np.arange(500.0))
    # half of the values are in: a mean's variance is about that of one of them, 500^2 / 12, over 500
    assert len(many) == 9_999 and abs(many.mean() - 249.5) < 5 * math.sqrt(500 / 12 / 9_999)
    assert len(subset_means(np.arange(17.0))) == 2**16 - 1


def test_same_scores_make_the_same_interval():
    values = np.random.default_rng(0).normal(size=40)  # more than all subsets are taken of
    assert estimate(values) == estimate(values)


@pytest.mark.parametrize("count", [6, 9, 16, 17, 30])
def test_zero_lies_outside_of_the_interval_where_the_permutation_test_rejects_it(count):
    """Of accuracies, whose differences are hundredths with a rounding and often zero, and of normal values."""
    random = np.random.default_rng(count)
    rejected = 0
    for _ in range(40):
        hundredths = random.integers(-4, 9, size=count) * (random.random(count) < 0.8)
        before = random.integers(0, 80, size=count)
        for values in ((before + hundredths) / 100 - before / 100, random.normal(0.4, 1, size=count)):
            found = estimate(values)
            outside = found.low > 0 or found.high < 0
            assert outside == (permutation_p(values) <= 0.05)
            rejected += outside
    shifted = estimate(values + 7)
    assert shifted.low == pytest.approx(found.low + 7) and shifted.high == pytest.approx(found.high + 7)
    assert 0 < rejected < 80


@pytest.mark.parametrize("count", [5, 8, 11])
def test_p_of_accuracies_is_that_of_exact_fractions(count):
    """Subsets whose hundredths add up to zero do so in floating point only but for a rounding."""
    random = np.random.default_rng(count)
    for _ in range(8):
        before, after = random.integers(0, 9, size=(2, count))
        exact = [Fraction(int(a) - int(b), 100) for a, b in zip(after, before, strict=True)]
        sums = [
            sum(sign * value for sign, value in zip(signs, exact, strict=True))
            for signs in product((1, -1), repeat=count)
        ]
        want = sum(abs(value) >= abs(sum(exact)) for value in sums) / 2**count
        assert permutation_p(after / 100 - before / 100) == want


@pytest.mark.parametrize("count", [6, 15])
def test_interval_of_few_tasks_misses_as_seldom_as_it_says(count):
    """Of symmetric values with many zeros, where a bootstrap's interval misses in a sixth of the cases."""
    random = np.random.default_rng(count)
    sets = 400
    values = random.normal(0, 1, size=(sets, count)) * (random.random((sets, count)) < 0.5)
    found = [estimate(own) for own in values]
    misses = sum(not interval.low <= 0 <= interval.high for interval in found)
    assert misses <= stats.binom.ppf(0.999, sets, 0.05)


@pytest.mark.parametrize("n", [2, 5, 8])
def test_p_is_that_of_all_sign_flips(n):
    differences = np.random.default_rng(n).normal(0.5, 1, size=n)
    means = [abs(np.mean(np.array(signs) * differences)) for signs in product((1, -1), repeat=n)]
    want = np.mean([mean >= abs(differences.mean()) - 1e-12 for mean in means])
    assert permutation_p(differences) == pytest.approx(want)


def test_p_by_hand():
    assert permutation_p(np.array([1.0, 2.0, 3.0])) == pytest.approx(2 / 8)  # of 8 flips only +++ and --- reach 2
    assert permutation_p(np.zeros(4)) == permutation_p(np.array([0.7])) == 1.0
    assert math.isnan(permutation_p(np.array([0.1, math.nan])))


def test_p_of_many_tasks_is_small_where_all_agree():
    assert permutation_p(np.linspace(0.1, 0.2, 45)) < 1e-4


def test_holm_by_hand():
    # in order .01, .02, .03, .04: times 4, 3, 2, 1 are .04, .06, .06, .04, and the last is held up by those before it
    np.testing.assert_allclose(holm(np.array([0.04, 0.01, 0.03, 0.02])), [0.06, 0.04, 0.06, 0.06])
    np.testing.assert_allclose(holm(np.array([0.9, 0.6])), [1.0, 1.0])
    np.testing.assert_allclose(holm(np.array([math.nan, 0.02, 0.4])), [math.nan, 0.06, 0.8])  # three were asked for


def test_record():
    assert differences(np.array([0.1 + 0.2, 0.5]), np.array([0.3, 0.4])).tolist() == [0, pytest.approx(0.1)]
    mine = np.array([0.6, 0.5, 0.3, 0.5 + 1e-15, 0.8, math.nan, 0.1, math.nan])
    theirs = np.array([0.5, 0.5, 0.5, 0.5, 0.5, 0.0, math.nan, math.nan])
    found = outcomes(mine, theirs)
    assert found.tolist() == [1, 0, -1, 0, 1, -1, 1, 0]  # what diverged loses to any number
    assert record(found) == (3, 3, 2)
