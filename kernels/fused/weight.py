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


def _product(a: Tensor, b: Tensor) -> Tensor:
    """a [T, K] b [K, N] in a's dtype; b may be wider."""
    return a @ b if a.dtype == b.dtype else (a.to(b.dtype) @ b).to(a.dtype)


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
    groups = groups_of(factors)
    grouped, outputs = rows_of(x, groups), factors[1].shape[-2]
    rows, tickets = grouped.flatten(0, 1), launch.new_tickets(groups, x.device, cleared=True)
    ys, sums = [], []
    for group in range(groups):
        own = rows if groups == 1 else grouped[group]
        scalars = Scalars(settings, names if groups == 1 else names[group : group + 1], layer)
        y, of_group = _forward(own, _of_group(factors, group), scalars, tickets, with_sums)
        ys.append(y)
        sums += of_group
    y = _joined(ys)
    if bias is not None:
        y += bias
    if weight is None:
        y += product.reshape(y.shape)
    else:
        # last, onto the change's part: what is small is rounded at its own size, and the sum once
        y.addmm_(rows, weight.mT)
    return y.view(*x.shape[:-1], outputs), tickets, *separate(_total(sums), x)


def _forward(
    x: Tensor, factors: Sequence[Tensor], scalars: Scalars, tickets: Tensor, with_sums: bool
) -> tuple[Tensor, list[Sums | None]]:
    """(D x [T, N], the sums of each band) of one group's x [T, K]."""
    a, b, _ = factors_of(factors)
    columns, outputs, inputs = Columns.of_weights(a), factors[1].shape[-2], x.shape[-1]
    dtype = _scratch_dtype(x.dtype)
    y, sums = None, []
    for band in bands(outputs, inputs, dtype.itemsize):
        change = torch.empty(1, band.stop - band.start, inputs, dtype=dtype, device=x.device)
        of_band = Rows.of_weights(_of_band(b, band, outputs))
        sums.append(launch.sample(of_band, columns, change, None, scalars, tickets, False, with_sums, None, band.start))
        if band == slice(0, outputs):
            return _product(x, change.squeeze(0).mT), sums
        if y is None:
            y = x.new_empty(x.shape[0], outputs)
        y[:, band] = _product(x, change.squeeze(0).mT)
    return y, sums


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
    groups, count = groups_of(factors), 2 * need_phi + 2 * need_theta
    grouped, grouped_dz = rows_of(x, groups), None if dy is None else rows_of(dy, groups)
    rows, dz = grouped.flatten(0, 1), None if dy is None else grouped_dz.flatten(0, 1)
    db = torch.empty(count, groups, *factors[1].shape[-2:], dtype=torch.float32, device=x.device)
    dxs, das = [], []
    for group in range(groups):
        own = rows if groups == 1 else grouped[group]
        scalars = Scalars(settings, names if groups == 1 else names[group : group + 1], layer)
        upstream = (dz if dz is None or groups == 1 else grouped_dz[group], dkl, dprior)
        needs = (need_x, need_phi, need_theta)
        of_group = db if groups == 1 else db[:, group : group + 1]
        dx, da = _backward(own, _of_group(factors, group), upstream, scalars, tickets, needs, of_group)
        dxs.append(dx)
        das.append(da)
    dx = da = factors[0].new_empty(0) if not (need_x and count) else None
    if need_x:
        dx = _joined(dxs)
        if weight is not None:
            dx.addmm_(dz, weight)
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
    dx = da = None
    for band in bands(outputs, inputs, dtype.itemsize):
        whole = band == slice(0, outputs)
        change = of_change = None  # the band before is freed first: `scratch_bytes` is what two tensors take
        rows = Rows.of_weights(_of_band(b, band, outputs))
        dy_band = dy if whole or dy is None else dy[:, band]
        if need_x:
            change = torch.empty(1, band.stop - band.start, inputs, dtype=dtype, device=x.device)
        if need_phi or need_theta:
            if dy is not None:
                of_change = _change_gradient(dy_band, x, dtype).unsqueeze(0)
            found = launch.adjoint(
                rows, columns, inputs, of_change, dkl, dprior, None, scalars, tickets, wanted,
                db if whole else db[:, :, band], x.dtype == torch.float32, change, band.start,
            )  # fmt: skip
            part = found.dq.squeeze(0) if len(found.dq) == 1 else found.dq.sum(dim=0)
            da = part if da is None else da.add_(part)
        else:
            launch.sample(rows, columns, change, None, scalars, tickets, False, False, None, band.start)
        if need_x and whole:
            dx = _product(dy, change.squeeze(0))
        elif need_x:  # in fp32: rounded once and not once a band
            dx = launch.wide_product(dy_band, change.squeeze(0), dx)
    return None if dx is None else dx.to(x.dtype), da


def _joined(groups: list[Tensor]) -> Tensor:
    """[G * T, N]."""
    return groups[0] if len(groups) == 1 else torch.cat(groups)


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
