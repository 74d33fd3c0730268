"""The contract in plain PyTorch against torch.distributions, autograd, loops and float64."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch
from torch.distributions import Gamma, Normal
from torch.distributions import kl_divergence as torch_kl
from torch.nn.functional import linear

from abmll.kernels import GaussianFactors, LowRank, NoiseKey, PosteriorSettings, standard_normal
from abmll.kernels import reference as ref

POSTERIORS = ("activation", "weight")


def sampled(posterior, inputs, settings, noise, mask=None):
    arguments = (inputs.x, inputs.weight, inputs.bias, inputs.phi, inputs.theta, settings, noise)
    return ref.activation_linear(*arguments, mask) if posterior == "activation" else ref.weight_linear(*arguments)


def noise_shape(posterior, inputs):
    return (*inputs.x.shape[:-1], inputs.weight.shape[0]) if posterior == "activation" else inputs.weight.shape


def noise_for(posterior, inputs, seed=3):
    generator = torch.Generator().manual_seed(seed)
    return torch.randn(noise_shape(posterior, inputs), generator=generator, dtype=torch.float64)


def statistics(posterior, x, factors, settings):
    """Means and log-variances from the definition: B A as one matrix, applied to x for activations."""
    scalings = (settings.scaling, settings.log_variance_scaling)
    mean, log_variance = (scaling * pair.b @ pair.a for scaling, pair in zip(scalings, factors, strict=True))
    if posterior == "activation":
        mean, log_variance = x @ mean.mT, x @ log_variance.mT
    return mean, log_variance + settings.log_variance_offset


@pytest.mark.parametrize("posterior", POSTERIORS)
def test_gradcheck(posterior, make_inputs, settings):
    inputs = make_inputs()
    noise = noise_for(posterior, inputs)
    mask = torch.tensor([True, False, True])

    def function(x, bias, *factors):
        a, b, c, d, e, f, g, h = factors
        phi, theta = (GaussianFactors(LowRank(*p), LowRank(*q)) for p, q in (((a, b), (c, d)), ((e, f), (g, h))))
        if posterior == "activation":
            return ref.activation_linear(x, inputs.weight, bias, phi, theta, settings, noise, mask)[:3]
        return ref.weight_linear(x, inputs.weight, bias, phi, theta, settings, noise)[:3]

    variables = [value.clone().requires_grad_(True) for value in (inputs.x, inputs.bias, *inputs.factors)]
    assert torch.autograd.gradcheck(function, variables, atol=1e-7, rtol=1e-5)


@pytest.mark.parametrize("posterior", POSTERIORS)
def test_output_and_kl_follow_their_definitions(posterior, make_inputs, settings):
    inputs = make_inputs()
    noise = noise_for(posterior, inputs)
    y, kl, *_ = sampled(posterior, inputs, settings, noise)
    mean, log_variance = statistics(posterior, inputs.x, inputs.phi, settings)
    mean_theta, log_variance_theta = statistics(posterior, inputs.x, inputs.theta, settings)
    draw = mean + (log_variance / 2).exp() * noise
    delta = draw if posterior == "activation" else linear(inputs.x, draw)
    torch.testing.assert_close(y, linear(inputs.x, inputs.weight, inputs.bias) + delta)
    phi, theta = Normal(mean, log_variance.exp().sqrt()), Normal(mean_theta, log_variance_theta.exp().sqrt())
    torch.testing.assert_close(kl, torch_kl(phi, theta).sum())


def test_kl_equals_torch_distributions_and_a_monte_carlo_estimate():
    generator = torch.Generator().manual_seed(0)
    mean_q, log_q, mean_p, log_p = torch.randn(4, 6, generator=generator, dtype=torch.float64)
    q, p = Normal(mean_q, (log_q / 2).exp()), Normal(mean_p, (log_p / 2).exp())
    closed = ref.kl_divergence(mean_q, log_q, mean_p, log_p)
    torch.testing.assert_close(closed, torch_kl(q, p))
    assert (closed > 0).all() and not ref.kl_divergence(mean_q, log_q, mean_q, log_q).any()
    z = mean_q + (log_q / 2).exp() * torch.randn(200_000, 6, generator=generator, dtype=torch.float64)
    estimates = q.log_prob(z) - p.log_prob(z)
    standard_error = estimates.std(dim=0) / len(estimates) ** 0.5
    assert ((estimates.mean(dim=0) - closed).abs() < 5 * standard_error).all()


@pytest.mark.parametrize(("shape", "rate"), [(1.0, 0.01), (2.5, 0.7)])
def test_prior_is_normal_times_gamma_up_to_a_constant(shape, rate):
    settings = PosteriorSettings(1.0, 1.0, 0.0, shape, rate)
    generator = torch.Generator().manual_seed(1)
    mean, log_variance = torch.randn(2, 20, generator=generator, dtype=torch.float64)
    gamma = Gamma(*torch.tensor([shape, rate], dtype=torch.float64))
    log_density = Normal(0.0, 1.0).log_prob(mean) + gamma.log_prob((-log_variance).exp())
    difference = ref.negative_log_prior(mean, log_variance, settings) + log_density
    torch.testing.assert_close(difference, difference[:1].expand(20))


def test_theta_s_log_variance_moves_as_is_documented():
    """docs/method.md, of prior shape 1: autograd's derivative is the formula there, whose later parts only push up."""
    settings, tasks = PosteriorSettings(1.0, 1.0, 0.0, 1.0, 0.01), 23
    generator = torch.Generator().manual_seed(2)
    mean_phi, mean, low_phi, low = torch.randn(4, 50, generator=generator, dtype=torch.float64)
    low.requires_grad_()
    prior = ref.negative_log_prior(mean, low, settings).sum() / tasks
    (found,) = torch.autograd.grad(ref.kl_divergence(mean_phi, low_phi, mean, low).sum() + prior, low)
    gap, precision = (low_phi - low).detach(), (-low).exp().detach()
    never_positive = -(0.5 * (mean_phi - mean).square() + settings.prior_rate / tasks) * precision
    torch.testing.assert_close(found, 0.5 * (1 - gap.exp()) + never_positive)
    assert (never_positive < 0).all()


@pytest.mark.parametrize("kl_weight", [0.0, 0.7])
def test_masked_tokens_contribute_nothing(kl_weight, make_inputs, settings):
    inputs = make_inputs(tokens=4)
    noise, mask = noise_for("activation", inputs), torch.tensor([True, False, True, False])
    _, kl, *_ = sampled("activation", inputs, settings, noise, mask)
    short = make_inputs(tokens=4)
    short.x = inputs.x[mask]
    _, kl_short, *_ = sampled("activation", short, settings, noise[mask])
    torch.testing.assert_close(kl, kl_short)
    other = make_inputs(tokens=4)
    other.x[~mask] += 1.0
    assert torch.equal(sampled("activation", other, settings, noise, mask)[1], kl)

    arguments = inputs.phi, inputs.theta, settings
    masked = ref.activation_theta_gradient(inputs.x, *arguments, mask, kl_weight, 0.4)
    kept = ref.activation_theta_gradient(short.x, *arguments, None, kl_weight, 0.4)
    torch.testing.assert_close(masked, kept)


def test_the_mask_does_not_touch_the_output(make_inputs, settings):
    inputs = make_inputs()
    noise = noise_for("activation", inputs)
    y, *_ = sampled("activation", inputs, settings, noise, torch.tensor([True, False, False]))
    assert torch.equal(y, sampled("activation", inputs, settings, noise)[0])


@pytest.mark.parametrize("posterior", POSTERIORS)
def test_groups_by_broadcasting_equal_a_loop(posterior, make_inputs, settings):
    inputs = make_inputs(groups=3)
    shape = (3, *noise_shape(posterior, make_inputs()))
    noise = torch.randn(shape, generator=torch.Generator().manual_seed(5), dtype=torch.float64)
    mask = torch.tensor([[True, True, False], [True, True, True], [False, True, False]])
    y, kl, *_ = sampled(posterior, inputs, settings, noise, mask)
    gradient = theta_gradient(posterior, inputs, settings, mask)
    for g in range(3):
        phi = GaussianFactors(*(LowRank(pair.a[g], pair.b[g]) for pair in inputs.phi))
        alone = replace(inputs, x=inputs.x[g], phi=phi)
        y_alone, kl_alone, *_ = sampled(posterior, alone, settings, noise[g], mask[g])
        torch.testing.assert_close(y[g], y_alone)
        torch.testing.assert_close(kl[g], kl_alone)
        found = flat(theta_gradient(posterior, alone, settings, mask[g]))
        torch.testing.assert_close([each[g] for each in flat(gradient)], found)


def theta_gradient(posterior, inputs, settings, mask, kl_weight=0.7, prior_weight=0.2):
    if posterior == "activation":
        return ref.activation_theta_gradient(
            inputs.x, inputs.phi, inputs.theta, settings, mask, kl_weight, prior_weight
        )
    return ref.weight_theta_gradient(inputs.phi, inputs.theta, settings, kl_weight, prior_weight)


def flat(found):
    return [*(factor for pair in found.gradient for factor in pair), found.kl, found.negative_log_prior]


@pytest.mark.parametrize("weights", [(0.7, 0.0), (0.0, 0.2), (0.7, 0.2)], ids=str)
@pytest.mark.parametrize("posterior", POSTERIORS)
def test_theta_gradient_in_closed_form_equals_autograd(posterior, weights, make_inputs, settings):
    inputs, mask = make_inputs(), torch.tensor([True, False, True])
    found = theta_gradient(posterior, inputs, settings, mask, *weights)
    leaves = [factor.requires_grad_(True) for pair in inputs.theta for factor in pair]
    _, kl, *_ = sampled(posterior, inputs, settings, noise_for(posterior, inputs), mask)
    mean, log_variance = statistics(posterior, inputs.x, inputs.theta, settings)
    prior = ref.negative_log_prior(mean, log_variance, settings)
    prior = prior[mask].sum() if posterior == "activation" else prior.sum()
    expected = torch.autograd.grad(weights[0] * kl + weights[1] * prior, leaves)
    torch.testing.assert_close(flat(found), [*expected, kl.detach(), prior.detach()], rtol=1e-12, atol=1e-12)
    assert all(value.abs().max() > 1e-3 for value in expected)


# 16-bit inputs


def cancelling(make_inputs, b_size=1e-5):
    """bf16 x and weight whose product is exactly 0, so that y holds the adapter's tiny part and nothing else."""
    inputs = make_inputs(tokens=6, inputs=64, outputs=48, rank=8, dtype=torch.float32)
    half = inputs.x[:, :32]
    inputs.x = torch.cat([half, -half], dim=1).bfloat16()
    inputs.weight = torch.cat([inputs.weight[:, :32]] * 2, dim=1).bfloat16()
    inputs.bias = torch.zeros(48, dtype=torch.bfloat16)
    for side in (inputs.phi, inputs.theta):
        side.mean.b.mul_(b_size)
        side.log_variance.b.mul_(b_size)
    return inputs


def in_float64(inputs, make_inputs):
    """The same numbers, after their rounding to bf16."""
    exact = make_inputs()
    exact.x, exact.weight, exact.bias = inputs.x.double(), inputs.weight.double(), inputs.bias.double()
    exact.phi, exact.theta = (
        GaussianFactors(*(LowRank(pair.a.double(), pair.b.double()) for pair in side))
        for side in (inputs.phi, inputs.theta)
    )
    return exact


def relative_error(found, exact):
    return float((found.double() - exact).norm() / exact.norm())


@pytest.mark.parametrize("posterior", POSTERIORS)
def test_bf16_does_not_lose_a_tiny_change(posterior, make_inputs):
    settings = PosteriorSettings(2.0, 2.0, -20.0, 1.0, 0.01)
    inputs = cancelling(make_inputs)
    exact = in_float64(inputs, make_inputs)
    noise = noise_for(posterior, inputs).float()
    y, kl, *_ = sampled(posterior, inputs, settings, noise)
    y_exact, kl_exact, *_ = sampled(posterior, exact, settings, noise.double())
    assert y.dtype == torch.bfloat16 and kl.dtype == torch.float32
    assert 0 < y_exact.abs().max() < 1e-2
    assert relative_error(y, y_exact) < 0.01
    assert relative_error(kl, kl_exact) < 0.01
    mean = ref.mean_linear(inputs.x, inputs.weight, None, inputs.phi.mean, settings.scaling)
    mean_exact = ref.mean_linear(exact.x, exact.weight, None, exact.phi.mean, settings.scaling)
    assert mean.dtype == torch.bfloat16
    assert relative_error(mean, mean_exact) < 0.01
    merged = inputs.weight + (settings.scaling * inputs.phi.mean.b @ inputs.phi.mean.a).bfloat16()
    assert relative_error(linear(inputs.x, merged), mean_exact) > 0.5  # what this test is there to catch


@pytest.mark.parametrize("posterior", POSTERIORS)
def test_bf16_keeps_tiny_steps_of_the_log_variance_in_the_gradients(posterior, make_inputs):
    """At c = -20 the spacing of bf16 is 0.125: arithmetic in it would see no difference of the log-variances."""
    settings = PosteriorSettings(2.0, 2.0, -20.0, 1.0, 0.01)
    inputs = cancelling(make_inputs, b_size=1e-3)
    exact = in_float64(inputs, make_inputs)
    found, expected = (theta_gradient(posterior, one, settings, None, 1.0, 1e-9) for one in (inputs, exact))
    for value, right in zip(flat(found), flat(expected), strict=True):
        assert value.dtype == torch.float32
        assert relative_error(value, right) < 0.01


def zero_b(side):
    return GaussianFactors(*(LowRank(pair.a, torch.zeros_like(pair.b)) for pair in side))


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32, torch.float64])
def test_at_initialisation_the_mean_is_the_base_layer(dtype, make_inputs):
    inputs = make_inputs(tokens=9, inputs=32, outputs=24, dtype=dtype)
    phi = zero_b(inputs.phi)
    for bias in (inputs.bias, None):
        y = ref.mean_linear(inputs.x, inputs.weight, bias, phi.mean, 2.0)
        assert y.dtype == dtype
        assert torch.equal(y, linear(inputs.x, inputs.weight, bias))


@pytest.mark.parametrize("posterior", POSTERIORS)
def test_at_initialisation_the_kl_is_zero_and_the_prior_as_the_offset_says(posterior, make_inputs):
    settings = PosteriorSettings(2.0, 2.0, -20.0, 1.0, 0.01)
    inputs = make_inputs(dtype=torch.float32)
    inputs.phi = inputs.theta = zero_b(inputs.phi)
    _, kl, *_ = sampled(posterior, inputs, settings, noise_for(posterior, inputs).float())
    assert float(kl) == 0.0
    found = theta_gradient(posterior, inputs, settings, None)
    elements = 3 * 5 if posterior == "activation" else 5 * 4
    expected = elements * 0.01 * torch.tensor(20.0, dtype=torch.float64).exp()
    assert float(found.negative_log_prior) == pytest.approx(float(expected), rel=1e-6)


@pytest.mark.parametrize("posterior", POSTERIORS)
def test_mean_and_variance_over_many_draws(posterior, make_inputs, settings):
    """Activations: var y = exp(l). Weights: var y = x^2 exp(L), and a draw's tokens are correlated."""
    inputs, draws = make_inputs(), 20_000
    mean, log_variance = statistics(posterior, inputs.x, inputs.phi, settings)
    if posterior == "activation":
        expected_mean, variance = mean, log_variance.exp()
        covariance = torch.zeros(5, dtype=torch.float64)
    else:
        expected_mean, variance = linear(inputs.x, mean), linear(inputs.x.square(), log_variance.exp())
        covariance = log_variance.exp() @ (inputs.x[0] * inputs.x[1])
    expected_mean = expected_mean + linear(inputs.x, inputs.weight, inputs.bias)
    rows, columns = noise_shape(posterior, inputs)
    noise = standard_normal(draws * rows, columns, NoiseKey(11, 0), 0).double().view(draws, rows, columns)
    y, *_ = sampled(posterior, inputs, settings, noise)
    assert y.shape == (draws, 3, 5)
    assert ((y.mean(dim=0) - expected_mean).abs() < 5 * (variance / draws).sqrt()).all()
    assert ((y.var(dim=0) / variance - 1).abs() < 5 * (2 / draws) ** 0.5).all()
    found = ((y[:, 0] - expected_mean[0]) * (y[:, 1] - expected_mean[1])).mean(dim=0)
    assert ((found - covariance).abs() < 6 * (variance[0] * variance[1] / draws).sqrt() * 2**0.5).all()
