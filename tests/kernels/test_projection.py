"""The call of an adapted layer: what names its noise, and what it refuses."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch
from torch.nn.functional import linear

from abmll.kernels import GaussianFactors, LowRank, NoiseKey, checks, posterior_projection, theta_gradient
from abmll.kernels.checks import _check_projection
from abmll.kernels.reference import activation_theta_gradient, weight_theta_gradient

POSTERIORS = ("activation", "weight")
KEY = NoiseKey(3, 4)


def project(posterior, inputs, settings, key=KEY, layer=0, mask=None):
    return posterior_projection(posterior, inputs.x, inputs.base, inputs.phi, inputs.theta, settings, key, layer, mask)


def residual(posterior, inputs, settings, **named):
    """What the noise alone adds to the projection."""
    quiet = settings._replace(log_variance_offset=-2000.0)
    return project(posterior, inputs, settings, **named)[0] - project(posterior, inputs, quiet, **named)[0]


@pytest.mark.parametrize("posterior", POSTERIORS)
def test_noise_is_named_by_key_and_layer_alone(posterior, make_inputs, settings):
    inputs = make_inputs(tokens=6)
    y, kl, *_ = project(posterior, inputs, settings)
    torch.manual_seed(99)
    again, kl_again, *_ = project(posterior, inputs, settings, key=NoiseKey(3, 4))
    assert torch.equal(y, again) and torch.equal(kl, kl_again)
    for named in ({"layer": 1}, {"key": NoiseKey(3, 5)}, {"key": NoiseKey(4, 4)}):
        other, other_kl, *_ = project(posterior, inputs, settings, **named)
        assert not torch.isclose(y, other).any(dim=-1).all(), named
        assert torch.equal(kl, other_kl)  # closed form: no noise in it


@pytest.mark.parametrize("posterior", POSTERIORS)
def test_the_base_layer_adds_to_the_sample(posterior, make_inputs, settings):
    inputs = make_inputs()
    bare = replace(inputs, weight=torch.zeros_like(inputs.weight), bias=None)
    base = linear(inputs.x, inputs.weight, inputs.bias)
    change = project(posterior, inputs, settings)[0] - project(posterior, bare, settings)[0]
    torch.testing.assert_close(change, base)


def test_tokens_share_the_noise_of_the_weight_posterior_only(make_inputs, settings):
    inputs = make_inputs(tokens=4)
    inputs.x = inputs.x[:1].repeat(4, 1)
    shared = residual("weight", inputs, settings)
    torch.testing.assert_close(shared, shared[:1].expand(4, -1))
    own = residual("activation", inputs, settings)
    assert own.std(dim=0).min() > 1e-3

    more = make_inputs(tokens=4)
    more.x = torch.cat([inputs.x[:1], more.x])
    torch.testing.assert_close(residual("weight", more, settings)[0], shared[0])


@pytest.mark.parametrize("posterior", POSTERIORS)
def test_a_batch_of_rows_equals_its_tokens_in_a_row(posterior, make_inputs, settings):
    inputs, flat = make_inputs(tokens=6), make_inputs(tokens=6)
    mask = torch.tensor([[True, True, False], [True, False, False]])
    inputs.x = inputs.x.view(2, 3, 4)
    y, kl, *_ = project(posterior, inputs, settings, mask=mask)
    y_flat, kl_flat, *_ = project(posterior, flat, settings, mask=mask.flatten())
    torch.testing.assert_close(y.flatten(0, 1), y_flat)
    torch.testing.assert_close(kl, kl_flat)


@pytest.mark.parametrize("posterior", POSTERIORS)
def test_theta_gradient_builds_no_graph(posterior, make_inputs, settings):
    inputs = make_inputs()
    for value in (inputs.x, *inputs.factors):
        value.requires_grad_(True)
    mask = torch.tensor([True, True, False])
    found = theta_gradient(posterior, inputs.x, inputs.phi, inputs.theta, settings, 0.7, 0.2, mask)
    values = [*(factor for pair in found.gradient for factor in pair), found.kl, found.negative_log_prior]
    assert not any(value.requires_grad for value in values)
    with torch.no_grad():
        if posterior == "activation":
            right = activation_theta_gradient(inputs.x, inputs.phi, inputs.theta, settings, mask, 0.7, 0.2)
        else:
            right = weight_theta_gradient(inputs.phi, inputs.theta, settings, 0.7, 0.2)
    torch.testing.assert_close(found, right)
    for shapes, pair in zip(found.gradient, inputs.theta, strict=True):
        assert shapes.a.shape == pair.a.shape and shapes.b.shape == pair.b.shape


@pytest.mark.parametrize("posterior", POSTERIORS)
def test_shapes_that_do_not_fit_are_refused(posterior, make_inputs, settings):
    inputs = make_inputs()
    inputs.x = inputs.x[:, :3]
    with pytest.raises(ValueError, match=r"x: shape \(3, 3\).*4 columns"):
        project(posterior, inputs, settings)
    inputs = make_inputs()
    mean, log_variance = inputs.phi
    for wrong in (LowRank(mean.a[:, :3], mean.b), LowRank(mean.a, mean.b[:4]), LowRank(mean.a[:1], mean.b)):
        inputs.phi = GaussianFactors(wrong, log_variance)
        with pytest.raises(ValueError, match=r"phi mean: a .* for a weight 5 x 4"):
            project(posterior, inputs, settings)
        inputs.phi = GaussianFactors(mean, wrong)
        with pytest.raises(ValueError, match="phi log_variance: a "):
            project(posterior, inputs, settings)


@pytest.mark.parametrize("posterior", POSTERIORS)
def test_checks_run_once_for_each_kind_of_call(posterior, make_inputs, settings, monkeypatch):
    """And for every call that is refused: what was found good is remembered, by shapes, dtypes and devices."""
    checked = []

    def counted(*arguments):
        checked.append(arguments)
        _check_projection(*arguments)

    monkeypatch.setattr(checks, "_check_projection", counted)
    inputs, other = make_inputs(tokens=6, seed=1), make_inputs(tokens=7)
    for made in (inputs, make_inputs(tokens=6, seed=2), other, inputs, other):
        project(posterior, made, settings)
    assert len(checked) == 2
    inputs.x = inputs.x.float()
    for _ in range(2):
        with pytest.raises(ValueError, match=r"x: dtype torch.float32: the weight is torch.float64"):
            project(posterior, inputs, settings)
    assert len(checked) == 4
