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
in the product's fp32 accumulator: a change of 1e-5 would be lost in a 16-bit weight; where D has several bands, dy D
is summed in fp32. Saved: x and integers. Arguments as in `activation`.

Five products have W0's size, 2.5 times those of the frozen layer, and nine launches are made where one band holds D.
For a bf16 model dy^T x is rounded to bf16, as dy was: an error of at most 2^-8 of each of its elements, independent of
one another, of which a factor's gradient sums thousands. It halves what the largest tensor of the step takes and moves.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from abmll.kernels.autocast import without_autocast
from abmll.kernels.bands import bands
from abmll.kernels.fused import launch
from abmll.kernels.fused.arguments import factors_of, groups_of, number, rows_of, separate
from abmll.kernels.fused.derivative import check_once, gradients_of_factors, needs
from abmll.kernels.fused.launch import Columns, Factors, Rows, Scalars, Sums, Wanted
from abmll.kernels.fused.operators import below_autograd, differentiate, operator, shapes_of


def scratch_bytes(outputs: int, inputs: int, dtype: torch.dtype) -> int:
    """Most bytes that the bands of a layer [outputs, inputs] take at a time: dy^T x and the change itself."""
    size = _scratch_dtype(dtype).itemsize
    return 2 * next(bands(outputs, inputs, size)).stop * inputs * size


def _scratch_dtype(dtype: torch.dtype) -> torch.dtype:
    """bf16 has fp32's range; fp16 has not: a standard deviation of exp(-10) is subnormal there."""
    return dtype if dtype == torch.bfloat16 else torch.float32


def _of_group(factors: Sequence[Tensor], group: int) -> Sequence[Tensor]:
    """Phi's factors of one group, and theta's, which all share."""
    return factors if factors[0].dim() == 2 else [*(f[group] for f in factors[:4]), *factors[4:]]


def _of_band(b: Factors, band: slice, outputs: int) -> Factors:
    return b if band == slice(0, outputs) else Factors([factor[band] for factor in b.tensors], b.rank)


def _write_product(y: Tensor, a: Tensor, b: Tensor) -> None:
    """y [T, N] = a b; b may be wider than y and a."""
    if b.dtype == y.dtype:
        torch.mm(a, b, out=y)
    else:
        y.copy_(a.to(b.dtype) @ b)


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
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """(y [..., N], tickets, KL, -log prior) of x [..., K]; product [..., N] and the rest as in `activation_forward`."""
    groups, outputs, inputs = groups_of(factors), factors[1].shape[-2], x.shape[-1]
    rows = rows_of(x, groups)
    y = x.new_empty(*rows.shape[:-1], outputs)
    tickets = launch.new_tickets(groups, x.device, cleared=True)
    dtype = _scratch_dtype(x.dtype)
    sums = []
    for group in range(groups):
        a, b, _ = factors_of(_of_group(factors, group))
        scalars = Scalars(settings, names[group : group + 1], layer)
        for band in bands(outputs, inputs, dtype.itemsize):
            change = torch.empty(1, band.stop - band.start, inputs, dtype=dtype, device=x.device)
            of_band = Rows.of_weights(_of_band(b, band, outputs))
            columns = Columns.of_weights(a)
            sums.append(
                launch.sample(of_band, columns, change, None, scalars, tickets, False, with_sums, None, band.start)
            )
            _write_product(y[group, :, band], rows[group], change[0].mT)
    if bias is not None:
        y += bias
    if weight is None:
        y += product.reshape(y.shape)
    else:
        _add_base_product(y, rows, weight.mT)
    return y.view(*x.shape[:-1], outputs), tickets, *separate(_total(sums), x)


def _total(sums: list[Sums | None]) -> Sums | None:
    if len(sums) == 1 or sums[0] is None:
        return sums[0]
    return Sums(*(torch.stack(term).sum() for term in zip(*sums, strict=True)))


@shapes_of(weight_forward)
def _(x, weight, bias, product, factors, settings, names, layer, with_sums):
    sums = [x.new_empty(() if with_sums else (0,), dtype=torch.float32) for _ in range(2)]
    return x.new_empty(*x.shape[:-1], factors[1].shape[-2]), launch.new_tickets(groups_of(factors), x.device), *sums


@operator
def weight_backward(
    dy: Tensor | None,
    dkl: Tensor | None,
    dprior: Tensor | None,
    x: Tensor,
    tickets: Tensor,
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
    groups = groups_of(factors)
    rows, dz = rows_of(x, groups), None if dy is None else rows_of(dy, groups)
    count = 2 * need_phi + 2 * need_theta
    new = {"dtype": torch.float32, "device": x.device}
    db = torch.empty(count, groups, *factors[1].shape[-2:], **new)
    dxs, das = [], []
    for group in range(groups):
        own, scalars = _of_group(factors, group), Scalars(settings, names[group : group + 1], layer)
        dz_own, db_own = None if dz is None else dz[group], db[:, group : group + 1]
        upstream = (dz_own, dkl, dprior)
        dx, da = _backward(rows[group], own, upstream, scalars, tickets, (need_x, need_phi, need_theta), db_own)
        dxs.append(dx)
        das.append(da)
    dx = da = factors[0].new_empty(0)
    if need_x:
        dx = dxs[0].unsqueeze(0) if groups == 1 else torch.stack(dxs)
        if weight is not None:
            _add_base_product(dx, dz, weight)
        dx = dx.view(x.shape)
    if count:
        da = torch.stack(das, dim=1) if factors[0].dim() == 3 else das[0]
    return dx, da, db if factors[0].dim() == 3 else db.squeeze(1)


def _backward(
    x: Tensor,
    factors: Sequence[Tensor],
    upstream: tuple[Tensor | None, Tensor | None, Tensor | None],
    scalars: Scalars,
    tickets: Tensor,
    needs: tuple[bool, bool, bool],
    db: Tensor,
) -> tuple[Tensor | None, Tensor | None]:
    """(dy D [T, K], da [pairs, r, K]) of one group's x [T, K], and db [pairs, 1, N, r] written."""
    (dy, dkl, dprior), (need_x, need_phi, need_theta) = upstream, needs
    a, b, _ = factors_of(factors)
    outputs, inputs, dtype = db.shape[-2], x.shape[-1], _scratch_dtype(x.dtype)
    columns, wanted = Columns.of_weights(a), Wanted(need_phi, need_theta, need_phi, need_theta)
    parts = list(bands(outputs, inputs, dtype.itemsize))
    dx = da = None
    for band in parts:
        rows, change = Rows.of_weights(_of_band(b, band, outputs)), None
        if need_x:
            change = torch.empty(1, band.stop - band.start, inputs, dtype=dtype, device=x.device)
        if need_phi or need_theta:
            of_change = None if dy is None else _change_gradient(dy[:, band], x, dtype).unsqueeze(0)
            found = launch.adjoint(
                rows, columns, inputs, of_change, dkl, dprior, None, scalars, tickets, wanted, db[:, :, band],
                x.dtype == torch.float32, change, band.start,
            )  # fmt: skip
            part = found.dq[0] if len(found.dq) == 1 else found.dq.sum(dim=0)
            da = part if da is None else da.add_(part)
        else:
            launch.sample(rows, columns, change, None, scalars, tickets, False, False, None, band.start)
        if need_x and len(parts) == 1:
            dx = torch.empty_like(x, memory_format=torch.contiguous_format)
            _write_product(dx, dy, change[0])
        elif need_x:  # in fp32: rounded once and not once a band
            dx = launch.wide_product(dy[:, band], change[0], dx)
    return None if dx is None else dx.to(x.dtype), da


def _change_gradient(dy: Tensor, x: Tensor, dtype: torch.dtype) -> Tensor:
    """dy^T x [n, K] of dy [T, n] and x [T, K]."""
    return dy.mT @ x if dtype == x.dtype else launch.wide_product(dy.mT, x)


@shapes_of(weight_backward)
def _(dy, dkl, dprior, x, tickets, weight, factors, settings, names, layer, need_x, need_phi, need_theta):
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
        ctx.mark_non_differentiable(*(found[1:2] if with_sums else found[1:]))
        ctx.save_for_backward(x, found[1], weight, names, *factors)
        return found

    @staticmethod
    def backward(ctx, dy, _, dkl, dprior):
        x, tickets, weight, names, *factors = ctx.saved_tensors
        check_once()
        need_x = ctx.needs_input_grad[0] and dy is not None  # x has no part in the KL
        wanted = needs(need_x, ctx.needs_input_grad[8:], dy, dkl, dprior)
        dx = da = db = None
        if any(wanted):
            with without_autocast(x.device.type):  # a backward pass inside the user's own would lose fp32
                dx, da, db = weight_backward(
                    dy, dkl, dprior, x, tickets, weight, factors, ctx.settings, names, ctx.layer, *wanted
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
    a, b, groups = factors_of(factors)
    (rank, inputs), outputs = factors[4].shape, factors[5].shape[0]
    tickets, wanted = (
        launch.new_tickets(groups, factors[0].device, cleared=True),
        Wanted(False, True, False, True, True),
    )
    db = torch.empty(2, groups, outputs, rank, dtype=torch.float32, device=factors[0].device)
    weights = number(kl_weight, factors[0]), number(prior_weight, factors[0])
    rows, columns = Rows.of_weights(b), Columns.of_weights(a)
    found = launch.adjoint(rows, columns, inputs, None, *weights, None, Scalars(settings), tickets, wanted, db, True)
    da = found.dq.sum(dim=0 if factors[0].dim() == 2 else (0, 2))  # over slots and groups
    return da, db.squeeze(1) if groups == 1 else db.sum(dim=1), *found.sums


@shapes_of(weight_theta_gradient)
def _(factors, settings, kl_weight, prior_weight):
    new = factors[0].new_empty
    return new(2, *factors[4].shape), new(2, *factors[5].shape), new(()), new(())
