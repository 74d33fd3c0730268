"""The one-sample estimate of the KL: closed form and sampling error together are log q(z) - log p(z)."""

from __future__ import annotations

import pytest
import torch
from torch.distributions import Normal

from abmll.kernels import (
    GaussianFactors,
    Groups,
    LowRank,
    NoiseKey,
    PosteriorSettings,
    sampling_error,
    sampling_error_by_theta,
    standard_normal,
)
from abmll.kernels.reference import activation_statistics, kl_divergence, weight_statistics

SETTINGS = PosteriorSettings(2.0, 1.0, -3.0, 1.0, 0.01)
KEY, LAYER, T, N, K, RANK = NoiseKey(5, 9), 3, 7, 6, 8, 2
STATISTICS = {
    "activation": lambda x, factors: activation_statistics(x, factors, SETTINGS),
    "weight": lambda x, factors: weight_statistics(factors, SETTINGS),
}


def factors(seed, *lead):
    generator = torch.Generator().manual_seed(seed)
    shapes = [(RANK, K), (N, RANK)] * 2
    tensors = [0.4 * torch.randn(*lead, *shape, generator=generator, dtype=torch.float64) for shape in shapes]
    return GaussianFactors.of_list([tensor.requires_grad_() for tensor in tensors])


def estimate(posterior, x, phi, theta, group=0, mask=None, key=KEY):
    """log q(z) - log p(z), element by element."""
    (m, lv), (m_p, lv_p) = (STATISTICS[posterior](x, side) for side in (phi, theta))
    noise = standard_normal(*m.shape, key, LAYER, group).double()
    q, p = Normal(m, (lv / 2).exp()), Normal(m_p, (lv_p / 2).exp())
    z = m + (lv / 2).exp() * noise
    found = q.log_prob(z) - p.log_prob(z)
    return (found if mask is None else found[mask]).sum()


def closed(posterior, x, phi, theta, mask=None):
    (m, lv), (m_p, lv_p) = (STATISTICS[posterior](x, side) for side in (phi, theta))
    found = kl_divergence(m, lv, m_p, lv_p)
    return (found if mask is None else found[mask]).sum()


@pytest.mark.parametrize(("posterior", "masked"), [("activation", False), ("activation", True), ("weight", False)])
def test_value_and_gradients_are_the_estimates(posterior, masked):
    x = torch.randn(T, K, dtype=torch.float64, requires_grad=True)
    mask = torch.tensor([True, False] * 3 + [True]) if masked else None
    phi, theta = factors(1), factors(2)
    named = (SETTINGS, KEY, LAYER, mask)
    leaves = [f for side in (phi, theta) for pair in side for f in pair] + ([x] if posterior == "activation" else [])
    found = closed(posterior, x, phi, theta, mask) + sampling_error(posterior, x, phi, theta, *named)
    expected = estimate(posterior, x, phi, theta, mask=mask)
    torch.testing.assert_close(found, expected, rtol=1e-10, atol=1e-10)
    for got, want in zip(torch.autograd.grad(found, leaves), torch.autograd.grad(expected, leaves), strict=True):
        torch.testing.assert_close(got, want, rtol=1e-9, atol=1e-9)
    error, by_theta = sampling_error_by_theta(posterior, x, phi, theta, *named)
    torch.testing.assert_close(error, sampling_error(posterior, x, phi, theta, *named))
    of_theta = [f for pair in theta for f in pair]
    difference = estimate(posterior, x, phi, theta, mask=mask) - closed(posterior, x, phi, theta, mask)
    for got, want in zip(
        [f for pair in by_theta for f in pair], torch.autograd.grad(difference, of_theta), strict=True
    ):
        torch.testing.assert_close(got, want, rtol=1e-9, atol=1e-9)


@pytest.mark.parametrize("posterior", ["activation", "weight"])
def test_groups_are_each_ones_own(posterior):
    x, sizes = torch.randn(T, K, dtype=torch.float64), (4, 3)
    phi, theta = factors(1, 2), factors(2)
    keys = torch.cat([NoiseKey(5, 9).rows(1, "cpu"), NoiseKey(6, 2).rows(1, "cpu")])
    together = sampling_error_by_theta(posterior, x, phi, theta, SETTINGS, keys, LAYER, groups=Groups.of(sizes, "cpu"))
    for group, (own_x, own, key) in enumerate(
        zip(x.split(sizes), phi.of_groups(), (NoiseKey(5, 9), NoiseKey(6, 2)), strict=True)
    ):
        error, gradient = sampling_error_by_theta(posterior, own_x, own, theta, SETTINGS, key, LAYER)
        torch.testing.assert_close(together[0][group], error)
        for got, want in zip(together[1], gradient, strict=True):
            torch.testing.assert_close(got.a[group], want.a)
            torch.testing.assert_close(got.b[group], want.b)


def test_the_error_has_mean_zero():
    """Over draws: the mean lies within five of its standard errors."""
    x, phi, theta = torch.randn(T, K, dtype=torch.float64), factors(1), factors(2)
    with torch.no_grad():
        draws = torch.stack(
            [sampling_error("activation", x, phi, theta, SETTINGS, NoiseKey(5, step), LAYER) for step in range(2000)]
        )
    assert abs(float(draws.mean())) < 5 * float(draws.std()) / 2000**0.5
    assert float(draws.std()) > 0.1


def test_equal_posteriors_have_no_error():
    """Then log q(z) = log p(z) for every z."""
    x, phi = torch.randn(T, K, dtype=torch.float64), factors(1)
    found = sampling_error(
        "activation", x, phi, GaussianFactors(*(LowRank(*pair) for pair in phi)), SETTINGS, KEY, LAYER
    )
    assert float(found.detach()) == 0.0
