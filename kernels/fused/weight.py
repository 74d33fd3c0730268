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

from abmll.kernels.bands import bands
from abmll.kernels.fused import launch
from abmll.kernels.fused.derivative import Needs
from abmll.kernels.fused.launch import Matrix, Pairs, Scalars, Wanted
from abmll.kernels.fused.operators import operator


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


@operator("abmll::weight_forward")
def weight_forward(
    x: Tensor,
    weight: Tensor | None,
    bias: Tensor | None,
    product: Tensor | None,
    phi: Sequence[Tensor],
    theta: Sequence[Tensor],
    settings: Sequence[float],
    names: Tensor,
    layer: int,
    with_sums: bool,
) -> tuple[Tensor, Tensor]:
    """(y [G, T, N], [KL, -log prior] or empty) of x [G, T, K]; product [G, T, N] as in `activation_forward`."""
    pairs, scalars = Pairs.of(*phi, *theta), Scalars(*settings, names, layer)
    outputs, inputs = phi[1].shape[-2], x.shape[-1]
    y = x.new_empty(*x.shape[:-1], outputs)
    dtype = _scratch_dtype(x.dtype)
    sums = []
    for group in range(x.shape[0]):
        own, named = _of_group(pairs, group), scalars._replace(names=names[group : group + 1])
        for band in bands(outputs, inputs, dtype.itemsize):
            change = torch.empty(1, band.stop - band.start, inputs, dtype=dtype, device=x.device)
            matrix = Matrix.of_weights(own, band)
            sums.append(launch.sample(matrix, change, None, named, False, with_sums, band.start))
            _add_product(y[group, :, band], x[group], change[0].mT, fresh=True)
    if bias is not None:
        y += bias
    if weight is None:
        y += product
    else:
        _add_base_product(y, x, weight.mT)
    return y, torch.stack(sums).sum(dim=0) if with_sums else sums[0]


@weight_forward.register_fake
def _(x, weight, bias, product, phi, theta, settings, names, layer, with_sums):
    y = x.new_empty(*x.shape[:-1], phi[1].shape[-2])
    return y, x.new_empty(2 if with_sums else 0, dtype=torch.float32)


@operator("abmll::weight_backward")
def weight_backward(
    dy: Tensor | None,
    dsums: Tensor | None,
    x: Tensor,
    weight: Tensor | None,
    phi: Sequence[Tensor],
    theta: Sequence[Tensor],
    settings: Sequence[float],
    names: Tensor,
    layer: int,
    need_x: bool,
    need_phi: bool,
    need_theta: bool,
) -> tuple[Tensor, Tensor, Tensor]:
    """(dx, da [pairs, G, r, K], db [pairs, G, N, r]), phi's two pairs before theta's; empty where not needed."""
    pairs, scalars = Pairs.of(*phi, *theta), Scalars(*settings, names, layer)
    groups, outputs, inputs, rank = x.shape[0], phi[1].shape[-2], x.shape[-1], pairs.rank
    wanted = Wanted(need_phi, need_theta, need_phi, need_theta)
    count = 2 * need_phi + 2 * need_theta
    da = torch.zeros(count, groups, inputs, rank, dtype=torch.float32, device=x.device)
    db = torch.empty(count, groups, outputs, rank, dtype=torch.float32, device=x.device)
    dx = torch.empty_like(x, memory_format=torch.contiguous_format) if need_x else x.new_empty(0)
    dtype = _scratch_dtype(x.dtype)
    for group in range(groups):
        own, named = _of_group(pairs, group), scalars._replace(names=names[group : group + 1])
        for band in bands(outputs, inputs, torch.float32.itemsize):
            matrix = Matrix.of_weights(own, band)
            change = None
            if need_x:
                change = torch.empty(1, band.stop - band.start, inputs, dtype=dtype, device=x.device)
            if count:
                dz = None if dy is None else launch.wide_product(dy[group, :, band].mT, x[group]).unsqueeze(0)
                found = launch.adjoint(matrix, dz, dsums, None, named, wanted, change, band.start)
                da[:, group] += found.dq[:, 0]
                db[:, group, band] = found.dp[0].unflatten(-1, (count, rank)).movedim(1, 0)
            else:
                launch.sample(matrix, change, None, named, False, False, band.start)
            if need_x:
                _add_product(dx[group], dy[group, :, band], change[0], fresh=band.start == 0)
    if need_x and weight is not None:
        _add_base_product(dx, dy, weight)
    return dx, da.mT.contiguous(), db


@weight_backward.register_fake
def _(dy, dsums, x, weight, phi, theta, settings, names, layer, need_x, need_phi, need_theta):
    outputs, (rank, inputs), count = phi[1].shape[-2], phi[0].shape[-2:], 2 * need_phi + 2 * need_theta
    return (
        x.new_empty(x.shape) if need_x else x.new_empty(0),
        x.new_empty(count, x.shape[0], rank, inputs, dtype=torch.float32),
        x.new_empty(count, x.shape[0], outputs, rank, dtype=torch.float32),
    )


def _setup_context(ctx, inputs, output):
    x, weight, _, _, phi, theta, ctx.settings, names, ctx.layer, _ = inputs
    ctx.set_materialize_grads(False)
    ctx.save_for_backward(x, weight, names, *phi, *theta)


def _backward(ctx, dy, dsums):
    x, weight, names, *factors = ctx.saved_tensors
    # x has no part in the KL
    needs = Needs.of(ctx.needs_input_grad[0] and dy is not None, ctx.needs_input_grad[4:6], dy, dsums)
    dx, phi, theta = None, [None] * 4, [None] * len(factors[4:])
    if needs.anything:
        with torch.autocast(x.device.type, enabled=False):  # a backward pass inside the user's own would lose fp32
            dx, da, db = torch.ops.abmll.weight_backward(
                dy, needs.dsums, x, weight, factors[:4], factors[4:], ctx.settings, names, ctx.layer, *needs.flags
            )
        dx, phi, theta = needs.distribute(dx, da, db, len(theta))
    return dx, None, None, dy if weight is None else None, phi, theta, None, None, None, None


weight_forward.register_autograd(_backward, setup_context=_setup_context)


@operator("abmll::weight_theta_gradient")
def weight_theta_gradient(
    phi: Sequence[Tensor],
    theta: Sequence[Tensor],
    settings: Sequence[float],
    kl_weight: float,
    prior_weight: float,
) -> tuple[Tensor, Tensor, Tensor]:
    """(da [2, r, K], db [2, N, r], [KL, -log prior]) of theta's two pairs: one pass over tiles, without x or noise."""
    pairs, scalars = Pairs.of(*phi, *theta), Scalars(*settings)
    weights = launch.constants(kl_weight, prior_weight, device=phi[0].device)
    matrix = Matrix.of_weights(pairs, slice(None))
    found = launch.adjoint(matrix, None, weights, None, scalars, Wanted(False, True, False, True, sums=True))
    db = found.dp.sum(dim=0).unflatten(-1, (2, pairs.rank)).movedim(1, 0)
    return found.dq.sum(dim=1).mT.contiguous(), db.contiguous(), found.sums


@weight_theta_gradient.register_fake
def _(phi, theta, settings, kl_weight, prior_weight):
    (rank, inputs), outputs = theta[0].shape, theta[1].shape[0]
    new = theta[0].new_empty
    return new(2, rank, inputs), new(2, outputs, rank), new(2)
