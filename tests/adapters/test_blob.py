"""BLoB's layer against its formulas, token by token, and its KL against torch.distributions."""

from __future__ import annotations

import pytest
import torch
from torch import nn
from torch.distributions import Normal, kl_divergence

from abmll.adapters.blob import SIGNS, BlobLinear, normal_kl
from abmll.adapters.context import AdapterContext
from abmll.kernels import Groups, NoiseKey, rows_of_keys, standard_normal

RANK, SCALING, PRIOR_STD, INITIAL = 3, 2.0, 0.2, 0.05
KEYS = [NoiseKey(11, 4), NoiseKey(12, 7)]


def layer_of(groups: int = 1) -> BlobLinear:
    torch.manual_seed(0)
    layer = BlobLinear(nn.Linear(8, 5), RANK, SCALING, PRIOR_STD, INITIAL, AdapterContext(), index=6).double()
    with torch.no_grad():
        for name, parameter in layer.phi.named_parameters():
            parameter.data = torch.randn(groups, *parameter.shape[1:], dtype=torch.float64).mul(0.3)
            if name == "deviations.root":
                parameter.abs_()
    return layer


def test_the_kl_is_that_of_two_normals():
    mean, std = torch.randn(4, 5, dtype=torch.float64), torch.rand(4, 5, dtype=torch.float64) + 0.01
    expected = kl_divergence(Normal(mean, std), Normal(*torch.tensor([0.0, PRIOR_STD], dtype=torch.float64)))
    torch.testing.assert_close(normal_kl(mean, std, PRIOR_STD), expected, rtol=1e-12, atol=1e-12)
    assert float(normal_kl(torch.zeros(1), torch.full((1,), PRIOR_STD), PRIOR_STD)) == pytest.approx(0, abs=1e-6)


def test_a_forward_pass_equals_the_formula_token_by_token():
    """A_t = M + t_t u_t^T o (Omega o E), its own signs for every token, one E a group."""
    layer, sizes = layer_of(groups=2), [4, 3]
    x = torch.randn(7, 8, dtype=torch.float64)
    groups = Groups.of(sizes, "cpu")
    with layer.context.forward_pass(rows_of_keys(KEYS, "cpu"), kl=True, groups=groups) as recorded:
        y = layer(x)
    row = 0
    for group, (size, key) in enumerate(zip(sizes, KEYS, strict=True)):
        mean, b = (factor[group] for factor in layer.phi.mean.factors())
        std = layer.phi.deviations.root[group] ** 2
        draw = standard_normal(RANK, 8, key, 6).double()
        signs = standard_normal(size, 8 + RANK, key, 6 + SIGNS).sign().double()
        for token in range(size):
            own = mean + torch.outer(signs[token, 8:], signs[token, :8]) * std * draw
            expected = layer.base(x[row].float().double()) + SCALING * b @ own @ x[row]
            torch.testing.assert_close(y[row], expected, rtol=1e-6, atol=1e-6)
            row += 1
        expected = kl_divergence(Normal(mean, std), Normal(*torch.tensor([0.0, PRIOR_STD], dtype=torch.float64))).sum()
        torch.testing.assert_close(recorded.kl[layer.index][group], expected, rtol=1e-10, atol=1e-10)


def test_without_names_it_is_the_mean():
    layer = layer_of()
    x = torch.randn(4, 8, dtype=torch.float64)
    with layer.context.forward_pass(None) as recorded:
        y = layer(x)
    change = SCALING * x @ layer.phi.mean.a[0].T @ layer.phi.mean.b[0].T
    torch.testing.assert_close(y, layer.base(x) + change)
    assert recorded.kl == {}


def test_deviations_start_where_the_authors_start_them():
    layer = layer_of()
    layer.theta.deviations.initialise(torch.Generator().manual_seed(0))
    root = layer.theta.deviations.root.detach()
    assert float(root.min()) >= INITIAL / 2**0.5 and float(root.max()) <= INITIAL
    assert torch.equal(layer.theta.deviations.std(), root**2)


@pytest.mark.parametrize("checkpointing", [False, True])
def test_a_runs_gradient_is_that_of_nll_and_kl(checkpointing, build_tiny):
    """By finite differences in float64, along a random direction; the recomputed pass draws the same noise."""
    method = {"name": "blob", "beta": 1e-2, "blob_initial_std": 0.3}
    trainer = {"activation_checkpointing": checkpointing}
    tiny = build_tiny(torch.float64, method=method, trainer=trainer).scatter(0.1)
    tiny.adapters.reset_phi()
    key, batch = tiny.keys[0], tiny.batch
    gradient, terms = tiny.learner.theta_gradient_at_phi(batch, key)
    generator = torch.Generator().manual_seed(3)
    direction = {n: torch.randn(p.shape, generator=generator, dtype=p.dtype) for n, p in tiny.adapters.phi.items()}

    def objective(step):
        with torch.no_grad():
            for name, parameter in tiny.adapters.phi.items():
                parameter += step * direction[name]
            logits, recorded = tiny.learner.forward(batch, key, "kl")
            value = tiny.learner.nll(logits.double(), batch) + 1e-2 * recorded.total_kl()
            for name, parameter in tiny.adapters.phi.items():
                parameter -= step * direction[name]
        return float(value)

    slope = sum(float((gradient[name] * direction[name]).sum()) for name in gradient)
    # the logits are fp32: a difference of 1e-3 along a direction of norm 100 stands far above their rounding
    found = (objective(1e-3) - objective(-1e-3)) / 2e-3
    assert slope == pytest.approx(found, rel=5e-3)
    assert float(terms.kl) > 0
