"""The contract in plain PyTorch: low-rank Gaussian posteriors over activations or weights, their KL and prior.

Fast versions are held to these functions. Low-rank arithmetic is done in fp32, or in fp64 for fp64 inputs; only the
frozen product W0 x runs in the model's own dtype. A leading group dimension G (several episodes side by side) is
plain broadcasting: x [G, T, K] with phi factors [G, r, K] and [G, N, r] works as x [T, K] does, and each group has sums
and gradients of its own, as in a call of its own: a NaN in one does not reach the others. Groups of unequal size are
calls of their own.

Source of the formulas: Zhang, Snell and Griffiths, "Amortized Bayesian meta-learning for low-rank adaptation of large
language models", section 4; the Gamma prior follows Ravi and Beatson, "Amortized Bayesian meta-learning", ICLR 2019.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

import torch
from torch import Tensor
from torch.nn.functional import linear


class LowRank(NamedTuple):
    """A low-rank product B A: `a` [r, K], `b` [N, r] (or with a leading G)."""

    a: Tensor
    b: Tensor


class GaussianFactors(NamedTuple):
    """Factors of a posterior's mean and log-variance."""

    mean: LowRank
    log_variance: LowRank

    def of_rows(self, band: slice) -> GaussianFactors:
        """The factors of a band of output units."""
        return GaussianFactors(*(LowRank(pair.a, pair.b[..., band, :]) for pair in self))

    def grouped(self) -> bool:
        """Whether the factors have a group dimension."""
        return self.mean.a.dim() == 3

    def of_groups(self) -> list[GaussianFactors]:
        """Each group's factors. Of one group a view whose derivative is a view as well."""
        if not self.grouped():
            return [self]
        factors = [factor for pair in self for factor in pair]
        if len(self.mean.a) == 1:
            return [GaussianFactors.of_list([factor.squeeze(0) for factor in factors])]
        return [GaussianFactors.of_list(own) for own in zip(*(factor.unbind() for factor in factors), strict=True)]

    @classmethod
    def of_list(cls, factors: Sequence[Tensor]) -> GaussianFactors:
        """From mean a, b, log-variance a, b."""
        mean_a, mean_b, log_variance_a, log_variance_b = factors
        return cls(LowRank(mean_a, mean_b), LowRank(log_variance_a, log_variance_b))

    def expand(self, groups: int) -> GaussianFactors:
        """The same factors for every one of G groups: views [G, r, K] and [G, N, r]."""
        return GaussianFactors(*(LowRank(*(f.expand(groups, *f.shape) for f in pair)) for pair in self))


class FrozenLinear(NamedTuple):
    """A dense frozen layer: weight [N, K], bias [N] or None."""

    weight: Tensor
    bias: Tensor | None = None


class PosteriorSettings(NamedTuple):
    """alpha / rank of the mean's and of the log-variance's pairs; log_variance_offset = c; shape and rate of the Gamma
    prior on the precision.
    """

    scaling: float
    log_variance_scaling: float
    log_variance_offset: float
    prior_shape: float
    prior_rate: float


class Projection(NamedTuple):
    """A sampled projection y [..., T, N] and what its posterior adds to the objective, in nats: a number, or one for
    each group [G] where phi has groups.

    `kl` and `negative_log_prior` are None where they were not asked for. `low_rank` [T, 4r] holds A x of all pairs
    where a fast version keeps them for theta's gradient; it is nobody else's business.
    """

    y: Tensor
    kl: Tensor | None
    negative_log_prior: Tensor | None
    low_rank: Tensor | None = None


def compute_dtype(x: Tensor) -> torch.dtype:
    """Dtype of the adapter's arithmetic: bf16 has a spacing of 0.125 near -20, so never less than fp32."""
    return torch.promote_types(x.dtype, torch.float32)


def add_change(base: Tensor, change: Tensor) -> Tensor:
    """The base product and what is added to it, summed in the change's dtype and rounded to the base's once."""
    return (base.to(change.dtype) + change).to(base.dtype)


def low_rank_product(x: Tensor, pair: LowRank, scaling: float) -> Tensor:
    """s * B (A x): x [..., T, K] -> [..., T, N]."""
    return (scaling * (x @ pair.a.mT)) @ pair.b.mT


def low_rank_matrix(pair: LowRank, scaling: float) -> Tensor:
    """s * B A: [..., N, K]."""
    return (scaling * pair.b) @ pair.a


def noise_change(log_variance: Tensor, noise: Tensor) -> Tensor:
    """What noise adds to the mean, exp(log_variance / 2) * noise; half of it is its derivative by log_variance."""
    return (0.5 * log_variance).exp() * noise


class Divergence(NamedTuple):
    """KL(q || p) of two normals, elementwise in nats, its derivatives, and p's precision."""

    kl: Tensor
    by_mean_q: Tensor
    by_log_variance_q: Tensor
    square: Tensor  # half the means' squared distance, in units of p's variance
    precision_p: Tensor

    @property
    def by_mean_p(self) -> Tensor:
        return -self.by_mean_q

    @property
    def by_log_variance_p(self) -> Tensor:
        return -(self.by_log_variance_q + self.square)


def divergence(mean_q: Tensor, log_variance_q: Tensor, mean_p: Tensor, log_variance_p: Tensor) -> Divergence:
    """KL( N(mean_q, exp log_variance_q) || N(mean_p, exp log_variance_p) ), with its derivatives in closed form."""
    shift, gap = mean_q - mean_p, log_variance_q - log_variance_p
    precision = (-log_variance_p).exp()
    by_mean = shift * precision
    by_log_variance = 0.5 * (gap.exp() - 1.0)
    square = 0.5 * shift * by_mean
    return Divergence(by_log_variance + square - 0.5 * gap, by_mean, by_log_variance, square, precision)


def kl_divergence(mean_q: Tensor, log_variance_q: Tensor, mean_p: Tensor, log_variance_p: Tensor) -> Tensor:
    """KL( N(mean_q, exp log_variance_q) || N(mean_p, exp log_variance_p) ), elementwise, in nats."""
    return divergence(mean_q, log_variance_q, mean_p, log_variance_p).kl


def negative_log_prior(
    mean: Tensor, log_variance: Tensor, settings: PosteriorSettings, precision: Tensor | None = None
) -> Tensor:
    """-log[ N(mean; 0, 1) Gamma(exp(-log_variance); shape, rate) ] without its constants, elementwise, in nats.

    precision: exp(-log_variance), where it is there already.
    """
    precision = (-log_variance).exp() if precision is None else precision
    return 0.5 * mean.square() + (settings.prior_shape - 1.0) * log_variance + settings.prior_rate * precision


def mean_linear(x: Tensor, weight: Tensor, bias: Tensor | None, mean: LowRank, scaling: float) -> Tensor:
    """The posterior mean's output W0 x + bias + s B A x, in x's dtype: also a plain LoRA layer."""
    return add_change(linear(x, weight, bias), low_rank_product(x.to(compute_dtype(x)), mean, scaling))


def activation_statistics(x: Tensor, factors: GaussianFactors, settings: PosteriorSettings) -> tuple[Tensor, Tensor]:
    """Mean and log-variance of every token's activation, [..., T, N] each."""
    log_variance = low_rank_product(x, factors.log_variance, settings.log_variance_scaling)
    log_variance = log_variance + settings.log_variance_offset
    return low_rank_product(x, factors.mean, settings.scaling), log_variance


def weight_statistics(factors: GaussianFactors, settings: PosteriorSettings) -> tuple[Tensor, Tensor]:
    """Mean (of the change to W0) and log-variance of every weight, [..., N, K] each."""
    log_variance = low_rank_matrix(factors.log_variance, settings.log_variance_scaling)
    log_variance = log_variance + settings.log_variance_offset
    return low_rank_matrix(factors.mean, settings.scaling), log_variance


class Sample(NamedTuple):
    """What a posterior adds to the base product, [..., T, N], and its terms as in `Projection`."""

    change: Tensor
    kl: Tensor | None
    negative_log_prior: Tensor | None


def activation_sample(
    x: Tensor,
    phi: GaussianFactors,
    theta: GaussianFactors | None,
    settings: PosteriorSettings,
    noise: Tensor,
    token_mask: Tensor | None,
) -> Sample:
    """m_phi(x) + exp(l_phi(x) / 2) * noise, the KL to theta's, theta's prior: see `activation_linear`."""
    inputs = x.to(compute_dtype(x))
    mean_phi, log_variance_phi = activation_statistics(inputs, phi, settings)
    change = mean_phi + noise_change(log_variance_phi, noise.to(inputs.dtype))
    if theta is None:
        return Sample(change, None, None)
    mean_theta, log_variance_theta = activation_statistics(inputs, theta, settings)
    kl, *_, precision = divergence(mean_phi, log_variance_phi, mean_theta, log_variance_theta)
    prior = negative_log_prior(mean_theta, log_variance_theta, settings, precision)
    if token_mask is not None:
        kl, prior = kl * token_mask.unsqueeze(-1), prior * token_mask.unsqueeze(-1)
    return Sample(change, _total(kl, phi), _total(prior, phi))


def _total(terms: Tensor, phi: GaussianFactors) -> Tensor:
    """The sum over all, or over each group's own [G]."""
    return terms.flatten(1).sum(dim=1) if phi.grouped() else terms.sum()


def weight_sample(
    x: Tensor, phi: GaussianFactors, theta: GaussianFactors | None, settings: PosteriorSettings, noise: Tensor
) -> Sample:
    """(M_phi + exp(L_phi / 2) * noise) x, the KL to theta's, theta's prior: see `weight_linear`."""
    dtype = compute_dtype(x)
    mean_phi, log_variance_phi = weight_statistics(phi, settings)
    change = x.to(dtype) @ (mean_phi + noise_change(log_variance_phi, noise.to(dtype))).mT
    if theta is None:
        return Sample(change, None, None)
    mean_theta, log_variance_theta = weight_statistics(theta, settings)
    kl, *_, precision = divergence(mean_phi, log_variance_phi, mean_theta, log_variance_theta)
    prior = negative_log_prior(mean_theta, log_variance_theta, settings, precision).expand_as(kl)
    return Sample(change, _total(kl, phi), _total(prior, phi))


def activation_linear(
    x: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    phi: GaussianFactors,
    theta: GaussianFactors | None,
    settings: PosteriorSettings,
    noise: Tensor,
    token_mask: Tensor | None,
) -> Projection:
    """Activation posterior: y = W0 x + bias + m_phi(x) + exp(l_phi(x) / 2) * noise, the KL to theta's, theta's prior.

    x [..., T, K]; weight [N, K]; noise [..., T, N]; token_mask [..., T], true where a token counts (None: all).
    Returns y [..., T, N] in x's dtype; KL and -log prior are summed over counted tokens and output units (None without
    theta), each group's own.
    """
    base = linear(x, weight, bias)
    change, *terms = activation_sample(x, phi, theta, settings, noise, token_mask)
    return Projection(add_change(base, change), *terms)


def weight_linear(
    x: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    phi: GaussianFactors,
    theta: GaussianFactors | None,
    settings: PosteriorSettings,
    noise: Tensor,
) -> Projection:
    """Weight posterior: y = (W0 + M_phi + exp(L_phi / 2) * noise) x + bias, the KL to theta's, theta's prior.

    x [..., T, K]; weight [N, K]; noise [..., N, K], shared by all tokens. W0 x and the sampled change are multiplied
    separately: a change of 1e-5 added to 16-bit weights would be lost. Returns y [..., T, N] in x's dtype; KL and
    -log prior are summed over all N x K weights (None without theta), each group's own.
    """
    base = linear(x, weight, bias)
    change, *terms = weight_sample(x, phi, theta, settings, noise)
    return Projection(add_change(base, change), *terms)


class ThetaGradient(NamedTuple):
    """Local gradient of kl_weight * KL + prior_weight * (-log prior) at theta, and the two unweighted sums.

    Where phi has groups each has a gradient of its own, [G, r, K] and [G, N, r], and sums [G].
    """

    gradient: GaussianFactors
    kl: Tensor
    negative_log_prior: Tensor


def activation_theta_gradient(
    x: Tensor,
    phi: GaussianFactors,
    theta: GaussianFactors,
    settings: PosteriorSettings,
    token_mask: Tensor | None,
    kl_weight: float,
    prior_weight: float,
) -> ThetaGradient:
    """Theta's gradient in the activation posterior, in closed form: no graph is built, so a forward pass suffices.

    Theta enters the objective only through this layer's KL and prior, given the layer's input.
    """
    inputs = x.detach().to(compute_dtype(x))
    mean_phi, log_variance_phi = activation_statistics(inputs, phi, settings)
    mean, log_variance = activation_statistics(inputs, theta, settings)
    mask = 1.0 if token_mask is None else token_mask.unsqueeze(-1).to(mean.dtype)
    by_mean, by_log_variance, kl, prior = _elementwise_theta_gradient(
        mean_phi, log_variance_phi, mean, log_variance, settings, kl_weight, prior_weight, mask
    )
    groups = phi.grouped()
    gradient = GaussianFactors(
        _factor_gradient(inputs, theta.mean, by_mean, settings.scaling, groups),
        _factor_gradient(inputs, theta.log_variance, by_log_variance, settings.log_variance_scaling, groups),
    )
    return ThetaGradient(gradient, _total(kl, phi), _total(prior, phi))


def weight_theta_gradient(
    phi: GaussianFactors,
    theta: GaussianFactors,
    settings: PosteriorSettings,
    kl_weight: float,
    prior_weight: float,
) -> ThetaGradient:
    """Theta's gradient in the weight posterior, in closed form: it depends on the factors alone."""
    mean_phi, log_variance_phi = weight_statistics(phi, settings)
    mean, log_variance = weight_statistics(theta, settings)
    by_mean, by_log_variance, kl, prior = _elementwise_theta_gradient(
        mean_phi, log_variance_phi, mean, log_variance, settings, kl_weight, prior_weight, 1.0
    )

    def factors(pair: LowRank, gradient: Tensor, scaling: float) -> LowRank:
        return LowRank(scaling * pair.b.mT @ gradient, scaling * gradient @ pair.a.mT)

    gradient = GaussianFactors(
        factors(theta.mean, by_mean, settings.scaling),
        factors(theta.log_variance, by_log_variance, settings.log_variance_scaling),
    )
    return ThetaGradient(gradient, _total(kl, phi), _total(prior, phi))


def _elementwise_theta_gradient(
    mean_phi: Tensor,
    log_variance_phi: Tensor,
    mean: Tensor,
    log_variance: Tensor,
    settings: PosteriorSettings,
    kl_weight: float,
    prior_weight: float,
    mask: Tensor | float,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Gradients by theta's means and log-variances, and the masked KL and -log prior, all elementwise."""
    found = divergence(mean_phi, log_variance_phi, mean, log_variance)
    by_mean = kl_weight * found.by_mean_p + prior_weight * mean
    by_log_variance = settings.prior_shape - 1.0 - settings.prior_rate * found.precision_p
    by_log_variance = kl_weight * found.by_log_variance_p + prior_weight * by_log_variance
    prior = (negative_log_prior(mean, log_variance, settings, found.precision_p) * mask).expand_as(found.kl)
    return by_mean * mask, by_log_variance * mask, found.kl * mask, prior


def _factor_gradient(x: Tensor, pair: LowRank, gradient: Tensor, scaling: float, groups: bool) -> LowRank:
    """Gradients of the factors of s B (A x), given the product's gradient [..., T, N], summed over all but groups."""
    first = 1 if groups else 0
    x, gradient = x.flatten(first, -2), gradient.flatten(first, -2)
    return LowRank(scaling * (gradient @ pair.b).mT @ x, scaling * gradient.mT @ (x @ pair.a.mT))
