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
is summed in fp32. Saved: x and integers. Arguments as in `activation`; of groups, one after another, the host's sizes
suffice.

Five products have W0's size, 2.5 times those of the frozen layer, and nine launches are made where one band holds D; of
several groups, six for each and four for all. For a bf16 model dy^T x is rounded to bf16, as dy was: an error of at
most 2^-8 of each of its elements, independent of one another, of which a factor's gradient sums thousands. It halves
what the largest tensor of the step takes and moves.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from abmll.kernels.autocast import without_autocast
from abmll.kernels.bands import bands
from abmll.kernels.fused import launch
from abmll.kernels.fused.arguments import (
    factors_of,
    groups_of,
    lead_of,
    new_sums,
    number,
    rows_of,
    separate,
    shaped,
)
from abmll.kernels.fused.derivative import check_once, gradients_of_factors, needs
from abmll.kernels.fused.launch import Columns, Factors, Rows, Scalars, Stretches, Sums, Wanted
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
    return b if band == slice(0, outputs) else b._replace(tensors=[factor[band] for factor in b.tensors])


def _each(rows: Tensor | None, groups: int, sizes: Sequence[int] | None) -> Sequence[Tensor | None]:
    """Each group's rows of a matrix [T, K]: `sizes`, or as many for each; of None, None."""
    if rows is None or groups == 1:
        return [rows] * groups
    return rows.split(len(rows) // groups if sizes is None else sizes) if len(rows) else [rows] * groups


def _numbers(sums: Sequence[Tensor | None], place: int) -> list[Tensor | None]:
    """The numbers of KL and -log prior at one place; one number is everyone's."""
    return [term if term is None or term.numel() == 1 else term[place] for term in sums]


def _multiply(a: Tensor, b: Tensor, to: Tensor) -> None:
    """a [T, K] b [K, N] in a's dtype, written; b may be wider."""
    if a.dtype == b.dtype:
        torch.mm(a, b, out=to)
    else:
        to.copy_(a.to(b.dtype) @ b)


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
    sizes: Sequence[int] | None = None,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """(y [..., N], tickets, KL, -log prior) of x [..., K]; product [..., N] and the rest as in `activation_forward`."""
    groups, (outputs, inputs) = groups_of(factors), (factors[1].shape[-2], x.shape[-1])
    rows, tickets = rows_of(x).flatten(0, -2), launch.new_tickets(1, x.device, cleared=True)
    y = torch.empty(rows.shape[0], outputs, dtype=x.dtype, device=x.device)
    of_bands = list(bands(outputs, inputs, _scratch_dtype(x.dtype).itemsize))
    sums = new_sums(with_sums, factors, x.device)
    # of each group, its bands' one after another
    parts = Sums.new((groups * len(of_bands),), x.device) if with_sums and len(of_bands) > 1 else sums
    for group, own in enumerate(zip(_each(rows, groups, sizes), _each(y, groups, sizes), strict=True)):
        scalars = Scalars(settings, names if groups == 1 else names[group : group + 1], layer)
        _forward(*own, _of_group(factors, group), scalars, tickets, of_bands, parts, group * len(of_bands))
    if parts is not sums:
        sums = Sums(*(term.view(groups, -1).sum(dim=1).view(lead_of(factors)) for term in parts))
    if bias is not None:
        y += bias
    if weight is None:
        y += product.reshape(y.shape)
    else:
        # last, onto the change's part: what is small is rounded at its own size, and the sum once
        y.addmm_(rows, weight.mT)
    return shaped(y, x.shape[:-1]), tickets, *separate(sums, x)


def _forward(
    x: Tensor,
    y: Tensor,
    factors: Sequence[Tensor],
    scalars: Scalars,
    tickets: Tensor,
    of_bands: Sequence[slice],
    sums: Sums | None,
    place: int,
) -> None:
    """y = D x [T, N] of one group's x [T, K], written, and the sums of its bands, from their `place` on."""
    a, b = factors_of(factors)
    columns, outputs, inputs = Columns.of_weights(a), y.shape[1], x.shape[1]
    for at, band in enumerate(of_bands):
        change = None  # the band before is freed first
        change = torch.empty(band.stop - band.start, inputs, dtype=_scratch_dtype(x.dtype), device=x.device)
        rows, stretches = Rows.of_weights(_of_band(b, band, outputs)), Stretches.equal(1, band.stop - band.start)
        of_band = None if sums is None else Sums(*_numbers(sums, place + at))
        launch.sample(rows, columns, change, stretches, None, scalars, tickets, False, of_band, None, band.start)
        _multiply(x, change.mT, y if len(of_bands) == 1 else y[:, band])


@shapes_of(weight_forward)
def _(x, weight, bias, product, factors, settings, names, layer, with_sums, sizes=None):
    sums = [x.new_empty(lead_of(factors) if with_sums else (0,), dtype=torch.float32) for _ in range(2)]
    return x.new_empty(*x.shape[:-1], factors[1].shape[-2]), launch.new_tickets(1, x.device), *sums


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
    sizes: Sequence[int] | None = None,
) -> tuple[Tensor, Tensor, Tensor]:
    """(dx, da, db) as `activation_backward` gives them."""
    groups, count, new = groups_of(factors), 2 * need_phi + 2 * need_theta, factors[0].new_empty
    rows, dz = rows_of(x).flatten(0, -2), None if dy is None else rows_of(dy).flatten(0, -2)
    db = torch.empty(count, *factors[1].shape, dtype=torch.float32, device=x.device) if count else new(0)
    dx = torch.empty(rows.shape, dtype=x.dtype, device=x.device) if need_x else None
    das, needs = [], (need_phi, need_theta)
    for group, (own, own_dz, own_dx) in enumerate(zip(*(_each(m, groups, sizes) for m in (rows, dz, dx)), strict=True)):
        scalars = Scalars(settings, names if groups == 1 else names[group : group + 1], layer)
        upstream = (own_dz, *_numbers((dkl, dprior), group))
        own_db = db[:, group] if db.dim() == 4 else db
        das.append(_backward(own, _of_group(factors, group), upstream, scalars, tickets, needs, own_dx, own_db))
    if need_x and weight is not None:
        dx.addmm_(dz, weight)
    da = new(0)
    if count and factors[0].dim() == 2:
        da = das[0]
    elif count:
        da = das[0].unsqueeze(1) if groups == 1 else torch.stack(das, dim=1)
    return shaped(dx, x.shape[:-1]) if need_x else new(0), da, db


def _backward(
    x: Tensor,
    factors: Sequence[Tensor],
    upstream: tuple[Tensor | None, Tensor | None, Tensor | None],
    scalars: Scalars,
    tickets: Tensor,
    needs: tuple[bool, bool],
    dx: Tensor | None,
    db: Tensor,
) -> Tensor | None:
    """da [pairs, r, K] of one group's x [T, K]; dx = dy D [T, K], if it is needed, and db [pairs, N, r] are written."""
    (dy, dkl, dprior), (need_phi, need_theta) = upstream, needs
    a, b = factors_of(factors)
    outputs, inputs, dtype = factors[1].shape[-2], x.shape[-1], _scratch_dtype(x.dtype)
    columns, wanted = Columns.of_weights(a), Wanted(need_phi, need_theta, need_phi, need_theta)
    wide_dx = da = None
    for band in bands(outputs, inputs, dtype.itemsize):
        whole = band == slice(0, outputs)
        change = of_change = None  # the band before is freed first: `scratch_bytes` is what two tensors take
        rows, stretches = Rows.of_weights(_of_band(b, band, outputs)), Stretches.equal(1, band.stop - band.start)
        dy_band = dy if whole or dy is None else dy[:, band]
        if dx is not None:
            change = torch.empty(band.stop - band.start, inputs, dtype=dtype, device=x.device)
        if need_phi or need_theta:
            if dy is not None:
                of_change = _change_gradient(dy_band, x, dtype)
            dq = launch.adjoint(
                rows, columns, stretches, inputs, of_change, dkl, dprior, None, scalars, tickets, wanted,
                db if whole else db[:, band], x.dtype == torch.float32, None, change, band.start,
            )  # fmt: skip
            part = dq.squeeze(0) if dq.shape[0] == 1 else dq.sum(dim=0)
            da = part if da is None else da.add_(part)
        else:
            launch.sample(rows, columns, change, stretches, None, scalars, tickets, False, None, None, band.start)
        if dx is not None and whole:
            _multiply(dy, change, dx)
        elif dx is not None:  # in fp32: rounded once and not once a band
            wide_dx = launch.wide_product(dy_band, change, wide_dx)
    if wide_dx is not None:
        dx.copy_(wide_dx)
    return da


def _change_gradient(dy: Tensor, x: Tensor, dtype: torch.dtype) -> Tensor:
    """dy^T x [n, K] of dy [T, n] and x [T, K]."""
    return dy.mT @ x if dtype == x.dtype else launch.wide_product(dy.mT, x)


@shapes_of(weight_backward)
def _(dy, dkl, dprior, x, tickets, weight, factors, settings, names, layer, need_x, need_phi, need_theta, sizes=None):
    new, count = factors[0].new_empty, 2 * need_phi + 2 * need_theta
    return (
        x.new_empty(x.shape) if need_x else x.new_empty(0),
        new(count, *factors[0].shape) if count else new(0),
        new(count, *factors[1].shape) if count else new(0),
    )


class _Derivative(torch.autograd.Function):
    @staticmethod
    def forward(ctx, x, weight, bias, product, settings, names, layer, with_sums, sizes, *factors):
        found = below_autograd(
            weight_forward, x, weight, bias, product, factors, settings, names, layer, with_sums, sizes
        )
        ctx.settings, ctx.layer, ctx.sizes = settings, layer, sizes
        ctx.set_materialize_grads(False)
        ctx.mark_non_differentiable(*(found[1:2] if with_sums else found[1:]))
        ctx.save_for_backward(x, found[1], weight, names, *factors)
        return found

    @staticmethod
    def backward(ctx, dy, _, dkl, dprior):
        x, tickets, weight, names, *factors = ctx.saved_tensors
        check_once()
        need_x = ctx.needs_input_grad[0] and dy is not None  # x has no part in the KL
        wanted = needs(need_x, ctx.needs_input_grad[9:], dy, dkl, dprior)
        dx = da = db = None
        if any(wanted):
            with without_autocast(x.device.type):  # a backward pass inside the user's own would lose fp32
                dx, da, db = weight_backward(
                    dy, dkl, dprior, x, tickets, weight, factors, ctx.settings, names, ctx.layer, *wanted, ctx.sizes
                )
        dproduct = dy if weight is None else None
        of_factors = gradients_of_factors(da, db, factors, wanted)
        return dx if wanted[0] else None, None, None, dproduct, *[None] * 5, *of_factors


def _differentiable(x, weight, bias, product, factors, settings, names, layer, with_sums, sizes=None):
    return _Derivative.apply(x, weight, bias, product, settings, names, layer, with_sums, sizes, *factors)


differentiate(weight_forward, _differentiable)


@operator
def weight_theta_gradient(
    factors: Sequence[Tensor],
    settings: Sequence[float],
    kl_weight: float,
    prior_weight: float,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """(da [2, G, r, K], db [2, G, N, r], KL, -log prior) of theta's two pairs, each group's own: one pass over tiles,
    without x or noise. Without groups no G.
    """
    (a, b), groups, device = factors_of(factors), groups_of(factors), factors[0].device
    outputs, inputs = factors[1].shape[-2], factors[0].shape[-1]
    tickets, sums = launch.new_tickets(groups, device, cleared=True), new_sums(True, factors, device)
    db = torch.empty(2, *factors[1].shape, dtype=torch.float32, device=device)
    weights = number(kl_weight, factors[0]), number(prior_weight, factors[0])
    dq = launch.adjoint(
        Rows.of_weights(b), Columns.of_weights(a), Stretches.equal(groups, groups * outputs), inputs, None, *weights,
        None, Scalars(settings), tickets, Wanted(False, True, False, True), db.view(2, -1, a.rank), True, sums,
    )  # fmt: skip
    return dq.sum(dim=0), db, *sums


@shapes_of(weight_theta_gradient)
def _(factors, settings, kl_weight, prior_weight):
    new, lead = factors[0].new_empty, lead_of(factors)
    return new(2, *factors[0].shape), new(2, *factors[1].shape), new(lead), new(lead)
