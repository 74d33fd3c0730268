"""The fused weight posterior as opaque PyTorch operators: exact, and nothing of size N x K is kept.

    forward     y = W0 x + bias + D x        D = s B_mu A_mu + exp(l / 2) E, a band of rows of D at a time
    backward    dx = dy W0 + dy D            with D drawn again
                dB, dA from the adjoint of D, a band of dy^T x at a time, and from KL and prior

A training step draws 2 N K normals, whatever the tokens, four a Philox call: once forward, once backward, where one
drawing serves both D and its adjoint (activation checkpointing draws the forward's twice). -log prior's squares and
log-variances would have closed forms through r x r products; a tile holds both numbers in registers already, so they
cost a few operations there, by count less than the launches of such products. (The KL's log-variances must not be
summed apart: they cancel.)

The bands live in scratch memory of bounded size, which the allocator hands from layer to layer. D x is added to W0 x
in the product's fp32 accumulator: a change of 1e-5 would be lost in a 16-bit weight. Saved: x and integers. Arguments
as in `activation`.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from abmll.kernels.autocast import without_autocast
from abmll.kernels.bands import bands
from abmll.kernels.fused import launch
from abmll.kernels.fused.arguments import gradients_of_sums, like_factors, pairs_of, rows_of, separate
from abmll.kernels.fused.derivative import check_once, gradients_of_factors, needs
from abmll.kernels.fused.launch import Matrix, Pairs, Scalars, Wanted
from abmll.kernels.fused.operators import below_autograd, differentiate, operator, shapes_of


def scratch_bytes(outputs: int, inputs: int, dtype: torch.dtype) -> int:
    """Most bytes that the bands of a layer [outputs, inputs] take at a time: dy^T x in fp32 and the change itself."""
    rows = next(bands(outputs, inputs, torch.float32.itemsize)).stop
    return rows * inputs * (torch.float32.itemsize + _scratch_dtype(dtype).itemsize)


def _scratch_dtype(dtype: torch.dtype) -> torch.dtype:
    """bf16 has fp32's range; fp16 has not: a standard deviation of exp(-10) is subnormal there."""
    return dtype if dtype == torch.bfloat16 else torch.float32


def _of_group(pairs: Pairs, group: int) -> Pairs:
    """Phi's factors of one group, and theta's, which all share."""

    def take(factors: tuple[Tensor, ...]) -> tuple[Tensor, ...]:
        return (*(f[group : group + 1] for f in factors[:2]), *factors[2:])

    return Pairs(take(pairs.a), take(pairs.b))


def _add_product(y: Tensor, a: Tensor, b: Tensor, fresh: bool) -> None:
    """y [T, N] += a b in place (`fresh`: y = a b); b may be wider than y and a."""
    if b.dtype != y.dtype:
        product = a.to(b.dtype) @ b
        y.copy_(product if fresh else y + product)
    elif fresh:
        torch.mm(a, b, out=y)
    else:
        y.addmm_(a, b)


def _add_base_product(y: Tensor, a: Tensor, b: Tensor) -> None:
    """y [G, T, N] += a [G, T, K] b [K, N] in place, accumulated in fp32.

    Last, onto the change's part: what is small is rounded at its own size, and the sum once.
    """
    y.flatten(0, 1).addmm_(a.flatten(0, 1), b)


@operator
def weight_forward(
    x: Tensor,
    weight: Tensor | None,
    bias: Tensor | None,
    product: Tensor | None,
    factors: Sequence[Tensor],
    settings: Sequence[float],
    names: Tensor,
    layer: int,
    with_sums: bool,
) -> tuple[Tensor, Tensor, Tensor]:
    """(y [..., N], KL, -log prior) of x [..., K]; product [..., N] and the two numbers as in `activation_forward`."""
    pairs, scalars = pairs_of(factors), Scalars(*settings, names, layer)
    outputs, inputs = factors[1].shape[-2], x.shape[-1]
    groups = pairs.a[0].shape[0]
    rows = rows_of(x, groups)
    y = x.new_empty(*rows.shape[:-1], outputs)
    dtype = _scratch_dtype(x.dtype)
    sums = []
    for group in range(groups):
        own, named = _of_group(pairs, group), scalars._replace(names=names[group : group + 1])
        for band in bands(outputs, inputs, dtype.itemsize):
            change = torch.empty(1, band.stop - band.start, inputs, dtype=dtype, device=x.device)
            matrix = Matrix.of_weights(own, band)
            sums.append(launch.sample(matrix, change, None, named, False, with_sums, band.start))
            _add_product(y[group, :, band], rows[group], change[0].mT, fresh=True)
    if bias is not None:
        y += bias
    if weight is None:
        y += product.reshape(y.shape)
    else:
        _add_base_product(y, rows, weight.mT)
    kl, prior = separate(torch.stack(sums).sum(dim=0) if with_sums else sums[0])
    return y.view(*x.shape[:-1], outputs), kl, prior


@shapes_of(weight_forward)
def _(x, weight, bias, product, factors, settings, names, layer, with_sums):
    y = x.new_empty(*x.shape[:-1], factors[1].shape[-2])
    return y, *(x.new_empty(() if with_sums else (0,), dtype=torch.float32) for _ in range(2))


@operator
def weight_backward(
    dy: Tensor | None,
    dkl: Tensor | None,
    dprior: Tensor | None,
    x: Tensor,
    weight: Tensor | None,
    factors: Sequence[Tensor],
    settings: Sequence[float],
    names: Tensor,
    layer: int,
    need_x: bool,
    need_phi: bool,
    need_theta: bool,
) -> tuple[Tensor, Tensor, Tensor]:
    """(dx, da, db) as `activation_backward` gives them."""
    pairs, scalars = pairs_of(factors), Scalars(*settings, names, layer)
    groups, outputs, inputs, rank = pairs.a[0].shape[0], factors[1].shape[-2], x.shape[-1], pairs.rank
    rows, dz = rows_of(x, groups), None if dy is None else rows_of(dy, groups)
    dsums = gradients_of_sums(dkl, dprior)
    wanted = Wanted(need_phi, need_theta, need_phi, need_theta)
    count = 2 * need_phi + 2 * need_theta
    da = torch.zeros(count, groups, inputs, rank, dtype=torch.float32, device=x.device)
    db = torch.empty(count, groups, outputs, rank, dtype=torch.float32, device=x.device)
    dx = torch.empty_like(rows, memory_format=torch.contiguous_format) if need_x else x.new_empty(0)
    dtype = _scratch_dtype(x.dtype)
    for group in range(groups):
        own, named = _of_group(pairs, group), scalars._replace(names=names[group : group + 1])
        for band in bands(outputs, inputs, torch.float32.itemsize):
            matrix = Matrix.of_weights(own, band)
            change = None
            if need_x:
                change = torch.empty(1, band.stop - band.start, inputs, dtype=dtype, device=x.device)
            if count:
                of_change = None
                if dz is not None:
                    of_change = launch.wide_product(dz[group, :, band].mT, rows[group]).unsqueeze(0)
                found = launch.adjoint(matrix, of_change, dsums, None, named, wanted, change, band.start)
                da[:, group] += found.dq[:, 0]
                db[:, group, band] = found.dp[0].unflatten(-1, (count, rank)).movedim(1, 0)
            else:
                launch.sample(matrix, change, None, named, False, False, band.start)
            if need_x:
                _add_product(dx[group], dz[group, :, band], change[0], fresh=band.start == 0)
    if need_x and weight is not None:
        _add_base_product(dx, dz, weight)
    da, db = like_factors(da.mT.contiguous(), db, factors) if count else (da.new_empty(0), da.new_empty(0))
    return dx.view(x.shape) if need_x else dx, da, db


@shapes_of(weight_backward)
def _(dy, dkl, dprior, x, weight, factors, settings, names, layer, need_x, need_phi, need_theta):
    new, count = factors[0].new_empty, 2 * need_phi + 2 * need_theta
    return (
        x.new_empty(x.shape) if need_x else x.new_empty(0),
        new(count, *factors[0].shape) if count else new(0),
        new(count, *factors[1].shape) if count else new(0),
    )


class _Derivative(torch.autograd.Function):
    @staticmethod
    def forward(ctx, x, weight, bias, product, settings, names, layer, with_sums, *factors):
        found = below_autograd(weight_forward, x, weight, bias, product, factors, settings, names, layer, with_sums)
        ctx.settings, ctx.layer = settings, layer
        ctx.set_materialize_grads(False)
        if not with_sums:
            ctx.mark_non_differentiable(*found[1:])
        ctx.save_for_backward(x, weight, names, *factors)
        return found

    @staticmethod
    def backward(ctx, dy, dkl, dprior):
        x, weight, names, *factors = ctx.saved_tensors
        check_once()
        need_x = ctx.needs_input_grad[0] and dy is not None  # x has no part in the KL
        wanted = needs(need_x, ctx.needs_input_grad[8:], dy, dkl, dprior)
        dx = da = db = None
        if any(wanted):
            with without_autocast(x.device.type):  # a backward pass inside the user's own would lose fp32
                dx, da, db = weight_backward(
                    dy, dkl, dprior, x, weight, factors, ctx.settings, names, ctx.layer, *wanted
                )
        dproduct = dy if weight is None else None
        of_factors = gradients_of_factors(da, db, factors, wanted)
        return dx if wanted[0] else None, None, None, dproduct, None, None, None, None, *of_factors


def _differentiable(x, weight, bias, product, factors, settings, names, layer, with_sums):
    return _Derivative.apply(x, weight, bias, product, settings, names, layer, with_sums, *factors)


differentiate(weight_forward, _differentiable)


@operator
def weight_theta_gradient(
    factors: Sequence[Tensor],
    settings: Sequence[float],
    kl_weight: float,
    prior_weight: float,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """(da [2, r, K], db [2, N, r], KL, -log prior) of theta's two pairs: one pass over tiles, without x or noise."""
    pairs, scalars = pairs_of(factors), Scalars(*settings)
    weights = launch.constants(kl_weight, prior_weight, device=factors[0].device)
    matrix = Matrix.of_weights(pairs, slice(None))
    found = launch.adjoint(matrix, None, weights, None, scalars, Wanted(False, True, False, True, sums=True))
    db = found.dp.sum(dim=0).unflatten(-1, (2, pairs.rank)).movedim(1, 0)
    return found.dq.sum(dim=1).mT.contiguous(), db.contiguous(), *separate(found.sums)


@shapes_of(weight_theta_gradient)
def _(factors, settings, kl_weight, prior_weight):
    new = factors[0].new_empty
    return new(2, *factors[4].shape), new(2, *factors[5].shape), new(()), new(())
