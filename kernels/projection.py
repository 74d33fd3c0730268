"""The call that an adapted layer makes: which posterior, which noise, which backend. `reference` is the contract."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor
from torch.nn.functional import linear

from abmll.kernels import plain
from abmll.kernels.autocast import autocast_inputs, without_autocast
from abmll.kernels.backends import Backend, Posterior, choose
from abmll.kernels.checks import Terms, check_groups, check_projection, check_theta_gradient, factors_of
from abmll.kernels.groups import Groups, rows_of_groups
from abmll.kernels.noise import NoiseKey
from abmll.kernels.reference import (
    FrozenLinear,
    GaussianFactors,
    LowRank,
    PosteriorSettings,
    Projection,
    ThetaGradient,
    compute_dtype,
)


def posterior_projection(
    posterior: Posterior,
    x: Tensor,
    base: FrozenLinear | Tensor,
    phi: GaussianFactors,
    theta: GaussianFactors,
    settings: PosteriorSettings,
    key: NoiseKey | Tensor,
    layer: int,
    token_mask: Tensor | None = None,
    terms: Terms = "divergence",
    backend: Backend = "auto",
    groups: Groups | None = None,
) -> Projection:
    """A sampled projection y [..., N] of x [..., K], and with terms="divergence" the sums of KL and -log prior.

    base: the frozen layer; or, where it has a product of its own (4-bit weights), that product y0 [..., N], in which
    the result is differentiable too: y's gradient is y0's, and x gets the low-rank part's alone from here. Factors as
    in `reference`, theta's without a group; token_mask as x without its last dimension, true where a token counts. With
    phi factors [G, r, K] and [G, N, r] every group (an episode beside others) has rows of x, noise and sums of its own:
    `groups` says which rows, x of any shape [..., K]; without it x is [G, ..., K]. The noise
    is named by (key, layer, group) and a row's place in its group alone, so that a recomputed forward pass draws it
    again, and an episode draws the same beside others as alone. key may be the rows that `NoiseKey.rows` makes of one,
    or rows [G, 3] of several: that spares a copy to the device a call, and a captured CUDA graph draws other noise
    where they are written over. Differentiable in x and all factors. Under autocast x and base take its dtype (a copy
    of the weight, which the backward pass keeps), and the low-rank arithmetic stays in fp32.

    Raises ValueError for shapes that do not fit each other, and where `backend` is triton and cannot run.
    """
    x, base = autocast_inputs(x, base)
    weight, bias, product = (None, None, base) if isinstance(base, Tensor) else (*base, None)
    factors, names = factors_of(phi, theta), key if isinstance(key, Tensor) else None
    check_projection(posterior, terms, x, weight, bias, product, token_mask, names, factors, groups is not None)
    check_groups(groups, x, factors)
    with without_autocast(x.device.type):
        if choose(backend, posterior, x, factors[0].shape[-2]) == "torch":
            y0 = linear(x, weight, bias) if product is None else product
            return _plain(posterior, x, y0, phi, theta, settings, key, layer, token_mask, terms, groups)
        if torch.is_grad_enabled():
            _check_frozen(weight, bias)
        if names is None:
            names = key.rows(factors[0].shape[0] if factors[0].dim() == 3 else 1, x.device)
        layer_and_mask = (x, weight, bias, product, token_mask)
        return _fused(posterior, layer_and_mask, factors, settings, names, layer, terms, groups)


def mean_linear(
    x: Tensor, base: FrozenLinear | Tensor, mean: LowRank, scaling: float, groups: Groups | None = None
) -> Tensor:
    """The posterior mean's output W0 x + bias + s B A x [..., N] of x [..., K]: also a plain LoRA layer.

    mean: a [r, K], b [N, r], or [G, r, K] and [G, N, r]. Base, groups and autocast as in `posterior_projection`.
    """
    x, base = autocast_inputs(x, base)
    check_groups(groups, x, mean)
    with without_autocast(x.device.type):
        y0 = base if isinstance(base, Tensor) else linear(x, *base)
        rows, sizes = rows_of_groups(x, mean.a, groups)
        return plain.mean_projection(rows, y0.reshape(-1, y0.shape[-1]), mean, scaling, sizes).view(y0.shape)


def theta_gradient(
    posterior: Posterior,
    x: Tensor | None,
    phi: GaussianFactors,
    theta: GaussianFactors,
    settings: PosteriorSettings,
    kl_weight: float,
    prior_weight: float,
    token_mask: Tensor | None = None,
    projection: Projection | None = None,
    backend: Backend = "auto",
    groups: Groups | None = None,
) -> ThetaGradient:
    """Theta's whole gradient under `meta_gradient: kl`, from the layer's input and its factors, without a graph.

    Where phi has groups, each has a gradient of its own. `groups` as in `posterior_projection`.

    `projection` of the same x and factors with terms="theta" saves a pass over x. The weight posterior's divergence
    does not depend on x: it may be None there, and no forward pass is needed.
    """
    factors, factor = factors_of(phi, theta), phi.mean.a
    if x is not None and posterior == "activation":
        x, _ = autocast_inputs(x, x)  # as the projection saw it
    dtype = factor.dtype if x is None else compute_dtype(x)
    check_theta_gradient(posterior, x, token_mask, dtype, factors, groups is not None)
    if posterior == "activation":
        check_groups(groups, x, factors)
    with torch.no_grad(), without_autocast(factor.device.type):
        where = x if posterior == "activation" else factor
        if choose(backend, posterior, where, factor.shape[-2]) == "triton":
            weights = (kl_weight, prior_weight)
            return _fused_theta(posterior, x, factors, settings, weights, token_mask, projection, groups)
        if posterior == "weight":
            return plain.weight_theta_gradient(phi, theta, settings, kl_weight, prior_weight)
        x, sizes = rows_of_groups(x, factor, groups)
        mask = None if token_mask is None else token_mask.reshape(-1)
        return plain.activation_theta_gradient(x, phi, theta, settings, mask, kl_weight, prior_weight, sizes)


def _plain(
    posterior: Posterior,
    x: Tensor,
    y0: Tensor,
    phi: GaussianFactors,
    theta: GaussianFactors,
    settings: PosteriorSettings,
    key: NoiseKey | Tensor,
    layer: int,
    token_mask: Tensor | None,
    terms: Terms,
    groups: Groups | None,
) -> Projection:
    rows, sizes = rows_of_groups(x, phi.mean.a, groups)
    compared = theta if terms == "divergence" else None
    arguments = (rows, y0.reshape(-1, y0.shape[-1]), phi, compared, settings, key, layer)
    if posterior == "activation":
        found = plain.activation_projection(*arguments, None if token_mask is None else token_mask.reshape(-1), sizes)
    else:
        found = plain.weight_projection(*arguments, sizes)
    return found._replace(y=found.y.view(y0.shape))


def _fused(
    posterior: Posterior,
    layer_and_mask: tuple[Tensor | None, ...],
    factors: tuple[Tensor, ...],
    settings: PosteriorSettings,
    names: Tensor,
    layer: int,
    terms: Terms,
    groups: Groups | None,
) -> Projection:
    with_sums, low_rank = terms == "divergence", None
    if posterior == "activation":
        from abmll.kernels.fused.activation import activation_forward

        used = factors[:4] if terms == "none" else factors
        named = (settings, names, layer, with_sums)
        y, low_rank, _, kl, prior = activation_forward(*layer_and_mask, used, *named, *_split(groups))
    else:
        from abmll.kernels.fused.weight import weight_forward

        used = factors if with_sums else factors[:4]
        sizes = _split(groups)[:1]
        y, _, kl, prior = weight_forward(*layer_and_mask[:4], used, settings, names, layer, with_sums, *sizes)
    return Projection(y, kl, prior, low_rank) if with_sums else Projection(y, None, None, low_rank)


def _split(groups: Groups | None) -> tuple[Sequence[int], Tensor] | tuple[()]:
    """Sizes and bounds as the operators take them: not at all where groups are equal."""
    return () if groups is None else (groups.sizes, groups.bounds)


def _fused_theta(
    posterior: Posterior,
    x: Tensor | None,
    factors: tuple[Tensor, ...],
    settings: PosteriorSettings,
    weights: tuple[float, float],
    mask: Tensor | None,
    projection: Projection | None,
    groups: Groups | None,
) -> ThetaGradient:
    if posterior == "activation":
        from abmll.kernels.fused.activation import activation_project, activation_theta_gradient

        low_rank = None if projection is None else projection.low_rank
        if low_rank is None or low_rank.shape[-1] != 4 * factors[0].shape[-2]:  # phi's two pairs alone: terms="none"
            low_rank = activation_project(x, factors, *_split(groups))
        found = activation_theta_gradient(x, low_rank, mask, factors, settings, *weights, *_split(groups))
    else:
        from abmll.kernels.fused.weight import weight_theta_gradient

        found = weight_theta_gradient(factors, settings, *weights)
    da, db, kl, prior = found
    return ThetaGradient(GaussianFactors(LowRank(da[0], db[0]), LowRank(da[1], db[1])), kl, prior)


def _check_frozen(weight: Tensor | None, bias: Tensor | None) -> None:
    if (weight is not None and weight.requires_grad) or (bias is not None and bias.requires_grad):
        raise ValueError("weight, bias: require a gradient: the base layer is frozen here; call requires_grad_(False)")
