"""The fused activation posterior as opaque PyTorch operators, with shapes for tracing and their derivative.

Opaque: `torch.compile` of a model keeps them as they are and does not break its graph at them. Saved for the backward
pass: x, the rank-sized projections p in fp32, and integers.

The base is a dense weight (with or without a bias), or a product y0 that another library made, to which the sample is
added: then weight and bias are None. Arguments of all operators: factors are phi's mean a, b, log-variance a, b, then
theta's the same, or phi's alone; x [..., K] is [G, ..., K] where phi's factors have groups, [G, r, K] and [G, N, r],
else all of it is one group; settings are those of `PosteriorSettings`; names [G, 3] those of `NoiseKey.rows`. Tensors
are taken as the caller has them: every view that autograd sees costs the host time, forward and backward.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from abmll.kernels.autocast import without_autocast
from abmll.kernels.fused import launch
from abmll.kernels.fused.arguments import gradients_of_sums, like_factors, mask_bytes, pairs_of, rows_of, separate
from abmll.kernels.fused.derivative import check_once, gradients_of_factors, needs
from abmll.kernels.fused.launch import Matrix, Pairs, Scalars, Wanted
from abmll.kernels.fused.operators import below_autograd, differentiate, operator, shapes_of


@operator
def activation_forward(
    x: Tensor,
    weight: Tensor | None,
    bias: Tensor | None,
    product: Tensor | None,
    mask: Tensor | None,
    factors: Sequence[Tensor],
    settings: Sequence[float],
    names: Tensor,
    layer: int,
    with_sums: bool,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """(y [..., N], p [G, T, pairs * r] fp32, KL, -log prior) of x [..., K]; mask bool as x without its last dimension.

    product [..., N] is x's with the base layer, its bias included. KL and -log prior are fp32 numbers, or empty.
    """
    pairs, scalars = pairs_of(factors), Scalars(*settings, names, layer)
    groups, outputs = pairs.a[0].shape[0], pairs.b[0].shape[-2]
    weight = None if weight is None else launch.rows_contiguous(weight)
    y, p = launch.project(rows_of(x, groups), weight, bias, pairs)
    if y is None:  # the sample is added in place
        y = product.reshape(groups, -1, outputs).clone(memory_format=torch.contiguous_format)
    matrix = Matrix.of_activations(p, pairs)
    sums = launch.sample(matrix, y, mask_bytes(mask, groups), scalars, True, with_sums)
    return y.view(*x.shape[:-1], outputs), p, *separate(sums)


@shapes_of(activation_forward)
def _(x, weight, bias, product, mask, factors, settings, names, layer, with_sums):
    sums = [x.new_empty(() if with_sums else (0,), dtype=torch.float32) for _ in range(2)]
    return x.new_empty(*x.shape[:-1], factors[1].shape[-2]), _empty_p(x, factors), *sums


def _empty_p(x: Tensor, factors: Sequence[Tensor]) -> Tensor:
    groups = factors[0].shape[0] if factors[0].dim() == 3 else 1
    tokens, rank = x.shape[:-1].numel() // groups, factors[0].shape[-2]
    return x.new_empty(groups, tokens, len(factors) // 2 * rank, dtype=torch.float32)


@operator
def activation_backward(
    dy: Tensor | None,
    dkl: Tensor | None,
    dprior: Tensor | None,
    x: Tensor,
    p: Tensor,
    weight: Tensor | None,
    mask: Tensor | None,
    factors: Sequence[Tensor],
    settings: Sequence[float],
    names: Tensor,
    layer: int,
    need_x: bool,
    need_phi: bool,
    need_theta: bool,
) -> tuple[Tensor, Tensor, Tensor]:
    """(dx as x, da [pairs, G, r, K], db [pairs, G, N, r]), phi's two pairs before theta's; empty where not needed.

    dy, dkl, dprior: gradients of y, KL and -log prior; None is zero, and saves the work. Without groups no G.
    """
    pairs, scalars = pairs_of(factors), Scalars(*settings, names, layer)
    groups = pairs.a[0].shape[0]
    rows, dz = rows_of(x, groups), None if dy is None else rows_of(dy, groups)
    dsums = gradients_of_sums(dkl, dprior)
    # x has a part in the KL through theta's statistics as well
    dp_phi, dp_theta = need_x or need_phi, dsums is not None and (need_x or need_theta)
    wanted = Wanted(dp_phi, dp_theta, need_phi, need_theta)
    adjoints = launch.adjoint(Matrix.of_activations(p, pairs), dz, dsums, mask_bytes(mask, groups), scalars, wanted)
    count = 2 * need_phi + 2 * need_theta
    first = 0 if need_phi or not dp_phi else 2
    dx, da, db = (p.new_empty(0) for _ in range(3))
    if count:  # before dx: their partial sums are gone when the largest tensor is made
        da, db = launch.factor_gradient(adjoints.dp, rows, pairs.rank, first, count), adjoints.dq
        da, db = like_factors(da, db, factors)
    if need_x:
        read = pairs if dp_theta else Pairs(pairs.a[:2], pairs.b[:2])
        weight = None if weight is None else launch.rows_contiguous(weight)
        dx = launch.input_gradient(dz, weight, adjoints.dp, read, x.dtype).view(x.shape)
    return dx, da, db


@shapes_of(activation_backward)
def _(dy, dkl, dprior, x, p, weight, mask, factors, settings, names, layer, need_x, need_phi, need_theta):
    count = 2 * need_phi + 2 * need_theta
    return (
        x.new_empty(x.shape) if need_x else p.new_empty(0),
        p.new_empty(count, *factors[0].shape) if count else p.new_empty(0),
        p.new_empty(count, *factors[1].shape) if count else p.new_empty(0),
    )


class _Derivative(torch.autograd.Function):
    @staticmethod
    def forward(ctx, x, weight, bias, product, mask, settings, names, layer, with_sums, *factors):
        found = below_autograd(
            activation_forward, x, weight, bias, product, mask, factors, settings, names, layer, with_sums
        )
        ctx.settings, ctx.layer = settings, layer
        ctx.set_materialize_grads(False)
        ctx.mark_non_differentiable(*(found[1:2] if with_sums else found[1:]))
        ctx.save_for_backward(x, found[1], weight, mask, names, *factors)
        return found

    @staticmethod
    def backward(ctx, dy, _, dkl, dprior):
        x, p, weight, mask, names, *factors = ctx.saved_tensors
        check_once()
        wanted = needs(ctx.needs_input_grad[0], ctx.needs_input_grad[9:], dy, dkl, dprior)
        dx = da = db = None
        if any(wanted):
            with without_autocast(x.device.type):  # a backward pass inside the user's own would lose fp32
                dx, da, db = activation_backward(
                    dy, dkl, dprior, x, p, weight, mask, factors, ctx.settings, names, ctx.layer, *wanted
                )
        dproduct = dy if weight is None else None
        of_factors = gradients_of_factors(da, db, factors, wanted)
        return dx if wanted[0] else None, None, None, dproduct, None, None, None, None, None, *of_factors


def _differentiable(x, weight, bias, product, mask, factors, settings, names, layer, with_sums):
    return _Derivative.apply(x, weight, bias, product, mask, settings, names, layer, with_sums, *factors)


differentiate(activation_forward, _differentiable)


@operator
def activation_project(x: Tensor, factors: Sequence[Tensor]) -> Tensor:
    """p [G, T, pairs * r] in fp32 alone: A x of all pairs from one pass over x."""
    pairs = pairs_of(factors)
    return launch.project(rows_of(x, pairs.a[0].shape[0]), None, None, pairs)[1]


@shapes_of(activation_project)
def _(x, factors):
    return _empty_p(x, factors)


@operator
def activation_theta_gradient(
    x: Tensor,
    p: Tensor,
    mask: Tensor | None,
    factors: Sequence[Tensor],
    settings: Sequence[float],
    kl_weight: float,
    prior_weight: float,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """(da [2, r, K], db [2, N, r], KL, -log prior) of theta's two pairs, from x and all four pairs' p: no noise."""
    pairs, scalars = pairs_of(factors), Scalars(*settings)
    groups = pairs.a[0].shape[0]
    weights = launch.constants(kl_weight, prior_weight, device=x.device)
    wanted = Wanted(False, True, False, True, sums=True)
    matrix = Matrix.of_activations(p, pairs)
    adjoints = launch.adjoint(matrix, None, weights, mask_bytes(mask, groups), scalars, wanted)
    da = launch.factor_gradient(adjoints.dp, rows_of(x, groups), pairs.rank, 0, 2)
    return da.sum(dim=1), adjoints.dq.sum(dim=1), *separate(adjoints.sums)


@shapes_of(activation_theta_gradient)
def _(x, p, mask, factors, settings, kl_weight, prior_weight):
    new = p.new_empty
    return new(2, *factors[4].shape), new(2, *factors[5].shape), new(()), new(())
