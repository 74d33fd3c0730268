"""The call that an adapted layer makes: which posterior, which noise, which backend. `reference` is the contract."""

from __future__ import annotations

from typing import Literal, get_args

import torch
from torch import Tensor
from torch.nn.functional import linear

from abmll.kernels import plain
from abmll.kernels.backends import Backend, Posterior, choose
from abmll.kernels.noise import NoiseKey, check_noise_size
from abmll.kernels.reference import (
    FrozenLinear,
    GaussianFactors,
    LowRank,
    PosteriorSettings,
    Projection,
    ThetaGradient,
    compute_dtype,
)

# What will be asked about theta: nothing; the sums of KL and -log prior, with their derivatives; or, after the
# projection, its local gradient.
Terms = Literal["none", "divergence", "theta"]


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
) -> Projection:
    """A sampled projection y [..., N] of x [..., K], and with terms="divergence" the sums of KL and -log prior.

    base: the frozen layer; or, where it has a product of its own (4-bit weights), that product y0 [..., N], in which
    the result is differentiable too: y's gradient is y0's, and x gets the low-rank part's alone from here. Factors as
    in `reference`, theta's without a group; token_mask as x without its last dimension, true where a token counts. With
    phi factors [G, r, K] and [G, N, r], x is [G, ..., K] and every group (an episode beside others) has its own noise.
    The noise is named by (key, layer, group) alone, so that a recomputed forward pass draws it again; key may be the
    rows that `NoiseKey.rows` makes of one, which spares a copy to the device a call. Differentiable in x and all
    factors. Under autocast x and base take its dtype (a copy of the weight, which the backward pass keeps),
    and the low-rank arithmetic stays in fp32.

    Raises ValueError for shapes that do not fit each other, and where `backend` is triton and cannot run.
    """
    _check_choice("posterior", posterior, Posterior)
    _check_choice("terms", terms, Terms)
    x, base = _autocast(x, base)
    _check(x, base, phi, theta, token_mask)
    outputs, columns = phi.mean.b.shape[-2], x.shape[-1]
    shape = (*x.shape[:-1], outputs)
    grouped, mask = _grouped(x, phi, token_mask)
    check_noise_size(*((grouped.shape[1], outputs) if posterior == "activation" else (outputs, columns)))
    if isinstance(base, Tensor):
        base = base.reshape(*grouped.shape[:-1], outputs)
    with torch.autocast(x.device.type, enabled=False):
        if choose(backend, posterior, x, phi.mean.a.shape[-2]) == "triton":
            names = key if isinstance(key, Tensor) else key.rows(len(grouped), x.device)
            found = _fused(posterior, grouped, base, phi, theta, settings, names, layer, mask, terms)
        else:
            compared = theta if terms == "divergence" else None
            arguments = (grouped, _product(grouped, base), phi, compared, settings, key, layer)
            if posterior == "activation":
                found = plain.activation_projection(*arguments, mask)
            else:
                found = plain.weight_projection(*arguments)
    return found._replace(y=found.y.view(shape))


def mean_linear(x: Tensor, base: FrozenLinear | Tensor, mean: LowRank, scaling: float) -> Tensor:
    """The posterior mean's output W0 x + bias + s B A x [..., N] of x [..., K]: also a plain LoRA layer.

    mean: a [r, K], b [N, r], or [G, r, K] and [G, N, r] with x [G, ..., K]. Base and autocast as in
    `posterior_projection`.
    """
    x, base = _autocast(x, base)
    with torch.autocast(x.device.type, enabled=False):
        return plain.mean_projection(x, _product(x, base), mean, scaling)


def _product(x: Tensor, base: FrozenLinear | Tensor) -> Tensor:
    return base if isinstance(base, Tensor) else linear(x, *base)


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
) -> ThetaGradient:
    """Theta's whole gradient under `meta_gradient: kl`, from the layer's input and its factors, without a graph.

    `projection` of the same x and factors with terms="theta" saves a pass over x. The weight posterior's divergence
    does not depend on x: it may be None there, and no forward pass is needed.
    """
    _check_choice("posterior", posterior, Posterior)
    factor, rows, columns = phi.mean.a, phi.mean.b.shape[-2], phi.mean.a.shape[-1]
    if posterior == "activation":
        _check_input(x, columns, phi, token_mask)
        x, _ = _autocast(x, x)  # as the projection saw it
    _check_factors(phi, theta, rows, columns, factor.dtype if x is None else compute_dtype(x))
    with torch.no_grad(), torch.autocast(factor.device.type, enabled=False):
        if posterior == "weight":
            if choose(backend, posterior, factor, factor.shape[-2]) == "triton":
                return _fused_theta_of_weights(phi, theta, settings, (kl_weight, prior_weight))
            return plain.weight_theta_gradient(phi, theta, settings, kl_weight, prior_weight)
        x, mask = _grouped(x, phi, token_mask)
        if choose(backend, posterior, x, factor.shape[-2]) == "triton":
            return _fused_theta(x, phi, theta, settings, (kl_weight, prior_weight), mask, projection)
        return plain.activation_theta_gradient(x, phi, theta, settings, mask, kl_weight, prior_weight)


def _fused(
    posterior: Posterior,
    x: Tensor,
    base: FrozenLinear | Tensor,
    phi: GaussianFactors,
    theta: GaussianFactors,
    settings: PosteriorSettings,
    names: Tensor,
    layer: int,
    mask: Tensor | None,
    terms: Terms,
) -> Projection:
    from abmll.kernels.fused.activation import activation_forward
    from abmll.kernels.fused.weight import weight_forward

    weight, bias, product = (None, None, base) if isinstance(base, Tensor) else (*base, None)
    if torch.is_grad_enabled() and any(tensor is not None and tensor.requires_grad for tensor in (weight, bias)):
        raise ValueError("weight, bias: require a gradient: the base layer is frozen here; call requires_grad_(False)")
    with_sums = terms == "divergence"
    noise, low_rank = (names, layer), None
    if posterior == "activation":
        compared = [] if terms == "none" else _flat(theta)
        factors = (_flat(phi, grouped=True), compared)
        y, low_rank, sums = activation_forward(
            x, weight, bias, product, mask, *factors, list(settings), *noise, with_sums
        )
    else:
        factors = (_flat(phi, grouped=True), _flat(theta) if with_sums else [])
        y, sums = weight_forward(x, weight, bias, product, *factors, list(settings), *noise, with_sums)
    kl, prior = sums.unbind() if with_sums else (None, None)
    return Projection(y, kl, prior, low_rank)


def _fused_theta(
    x: Tensor,
    phi: GaussianFactors,
    theta: GaussianFactors,
    settings: PosteriorSettings,
    weights: tuple[float, float],
    mask: Tensor | None,
    projection: Projection | None,
) -> ThetaGradient:
    from abmll.kernels.fused.activation import activation_project, activation_theta_gradient

    factors = (_flat(phi, grouped=True), _flat(theta))
    low_rank = None if projection is None else projection.low_rank
    if low_rank is None or low_rank.shape[-1] != 4 * theta.mean.a.shape[0]:  # phi's two pairs alone: terms="none"
        low_rank = activation_project(x, *factors)
    return _theta(activation_theta_gradient(x, low_rank, mask, *factors, list(settings), *weights))


def _fused_theta_of_weights(
    phi: GaussianFactors, theta: GaussianFactors, settings: PosteriorSettings, weights: tuple[float, float]
) -> ThetaGradient:
    from abmll.kernels.fused.weight import weight_theta_gradient as fused

    return _theta(fused(_flat(phi, grouped=True), _flat(theta), list(settings), *weights))


def _theta(found: tuple[Tensor, Tensor, Tensor]) -> ThetaGradient:
    da, db, (kl, prior) = found
    return ThetaGradient(GaussianFactors(LowRank(da[0], db[0]), LowRank(da[1], db[1])), kl, prior)


def _flat(factors: GaussianFactors, grouped: bool = False) -> list[Tensor]:
    flat = [factors.mean.a, factors.mean.b, factors.log_variance.a, factors.log_variance.b]
    return [f if f.dim() == 3 else f.unsqueeze(0) for f in flat] if grouped else flat


def _grouped(x: Tensor, phi: GaussianFactors, token_mask: Tensor | None) -> tuple[Tensor, Tensor | None]:
    """x as [G, T, K] and the mask as [G, T]; G is 1 for factors without a group."""
    groups = phi.mean.a.shape[0] if phi.mean.a.dim() == 3 else 1
    tokens = x.shape[:-1].numel() // max(groups, 1)
    x = x.reshape(groups, tokens, x.shape[-1])
    return x, None if token_mask is None else token_mask.reshape(groups, tokens)


def _autocast(x: Tensor, base: FrozenLinear | Tensor) -> tuple[Tensor, FrozenLinear | Tensor]:
    kind = x.device.type
    if not torch.is_autocast_enabled(kind) or not x.is_floating_point() or x.dtype == torch.float64:
        return x, base
    dtype = torch.get_autocast_dtype(kind)
    if isinstance(base, Tensor):
        return x.to(dtype), base.to(dtype)
    return x.to(dtype), FrozenLinear(base.weight.to(dtype), None if base.bias is None else base.bias.to(dtype))


def _check(
    x: Tensor, base: FrozenLinear | Tensor, phi: GaussianFactors, theta: GaussianFactors, mask: Tensor | None
) -> None:
    if isinstance(base, Tensor):
        _check_product(x, base, phi)
        rows, columns = phi.mean.b.shape[-2], phi.mean.a.shape[-1]
        _check_input(x, columns, phi, mask)
    else:
        rows, columns = base.weight.shape
        _check_input(x, columns, phi, mask)
        _check_layer(x, base)
    _check_factors(phi, theta, rows, columns, compute_dtype(x))


def _check_product(x: Tensor, product: Tensor, phi: GaussianFactors) -> None:
    shape = (*x.shape[:-1], phi.mean.b.shape[-2])
    if product.shape != shape or product.dtype != x.dtype or product.device != x.device:
        raise ValueError(
            f"base: {product.dtype} {tuple(product.shape)} on {product.device}: the product of this x and a layer for "
            f"these factors is {x.dtype} {shape} on {x.device}; pass FrozenLinear(weight, bias) for a layer itself"
        )


def _check_layer(x: Tensor, layer: FrozenLinear) -> None:
    weight, bias = layer
    if x.dtype != weight.dtype:
        raise ValueError(f"x: dtype {x.dtype}: the weight is {weight.dtype}; convert one, or run under torch.autocast")
    if len(weight) == 0 or weight.device != x.device:
        raise ValueError(f"weight: {tuple(weight.shape)} on {weight.device}: must have rows, and be on {x.device}")
    if bias is not None and (bias.shape != weight.shape[:1] or bias.dtype != weight.dtype):
        expected = f"{weight.dtype} ({len(weight)},)"
        raise ValueError(f"bias: {bias.dtype} {tuple(bias.shape)}: must be {expected}, as the weight is")


def _check_choice(name: str, value: str, choices: object) -> None:
    if value not in get_args(choices):
        raise ValueError(f"{name}: {value!r}: must be one of {', '.join(get_args(choices))}")


def _check_input(x: Tensor | None, columns: int, phi: GaussianFactors, token_mask: Tensor | None) -> None:
    if x is None:
        raise ValueError("x: None: the activation posterior's divergence depends on the layer's input")
    if x.dim() < 2 or x.shape[-1] != columns:
        raise ValueError(f"x: shape {tuple(x.shape)}: must be [tokens, {columns}]: the weight has {columns} columns")
    groups = phi.mean.a.shape[:-2]
    if groups and (len(groups) > 1 or x.dim() < 3 or x.shape[0] != groups[0]):
        raise ValueError(f"x: shape {tuple(x.shape)}: must be [{groups[0]}, tokens, {columns}], as phi has groups")
    if 0 in groups or columns == 0:
        raise ValueError(f"x: shape {tuple(x.shape)}: at least one group and one column")
    if token_mask is not None and token_mask.shape != x.shape[:-1]:
        shape = tuple(x.shape[:-1])
        raise ValueError(f"token_mask: shape {tuple(token_mask.shape)}: must be x's without the last, {shape}")
    if token_mask is not None and token_mask.dtype != torch.bool:
        raise ValueError(f"token_mask: dtype {token_mask.dtype}: must be torch.bool; a token counts or does not")
    tensors = {"token_mask": token_mask, "phi": phi.mean.a}
    for name, tensor in tensors.items():
        if tensor is not None and tensor.device != x.device:
            raise ValueError(f"{name}: on {tensor.device}: x is on {x.device}; move one to the other's device")


def _check_factors(phi: GaussianFactors, theta: GaussianFactors, rows: int, columns: int, dtype: torch.dtype) -> None:
    rank = phi.mean.a.shape[-2]
    for side, factors, lead in (("phi", phi, phi.mean.a.shape[:-2]), ("theta", theta, ())):
        for name, pair in zip(factors._fields, factors, strict=True):
            if pair.a.shape != (*lead, rank, columns) or pair.b.shape != (*lead, rows, rank):
                raise ValueError(
                    f"{side} {name}: a {tuple(pair.a.shape)}, b {tuple(pair.b.shape)}: for a weight {rows} x {columns} "
                    f"and rank {rank} they must be {(*lead, rank, columns)} and {(*lead, rows, rank)}"
                )
            if pair.a.device != phi.mean.a.device or pair.b.device != phi.mean.a.device:
                raise ValueError(f"{side} {name}: on {pair.a.device}, {pair.b.device}: must be on {phi.mean.a.device}")
            if pair.a.dtype != dtype or pair.b.dtype != dtype:
                raise ValueError(
                    f"{side} {name}: a {pair.a.dtype}, b {pair.b.dtype}: low-rank arithmetic is done in {dtype} here; "
                    "keep the factors in it when the model is converted"
                )
