"""The fused activation posterior as opaque PyTorch operators, with shapes for tracing and their derivative.

Opaque: `torch.compile` of a model keeps them as they are and does not break its graph at them. Saved for the backward
pass: x, the rank-sized projections p in fp32, and integers. Six launches forward and backward, of which W0's two
products are the library's:

    forward     y0 = W0 x     p = A x in parts     y = y0 + sample, p, KL, -log prior
    backward    adjoints of p and B     dA, dB, dx = dp A     dx += dy W0

The base is a dense weight (with or without a bias), or a product y0 that another library made, to which the sample is
added: then weight and bias are None. Arguments of all operators: factors are phi's mean a, b, log-variance a, b, then
theta's the same, or phi's alone; where phi's factors have groups, [G, r, K] and [G, N, r], the rows of x [..., K] are
the groups' one after another, sizes[g] (`sizes`, int32 `bounds` [G + 1]: those of `kernels.Groups`) or as many for
each, and one launch serves all groups; settings are those of `PosteriorSettings`; names [G, 3] those of
`NoiseKey.rows`. Sums are numbers, or [G] where phi has groups. Tensors are taken as the caller has them: every view
that autograd sees costs the host time, forward and backward.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor
from torch.nn.functional import linear

from abmll.kernels.autocast import without_autocast
from abmll.kernels.fused import launch
from abmll.kernels.fused.arguments import (
    factors_of,
    groups_of,
    lead_of,
    mask_bytes,
    new_sums,
    number,
    rows_of,
    separate,
    shaped,
    stretches_of,
)
from abmll.kernels.fused.derivative import check_once, gradients_of_factors, needs
from abmll.kernels.fused.launch import Columns, Rows, Scalars, Wanted
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
    sizes: Sequence[int] | None = None,
    bounds: Tensor | None = None,
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:
    """(y [..., N], p [T, pairs * r] fp32, tickets, KL, -log prior) of x [..., K], T rows; mask bool as x without its
    last dimension.

    product [..., N] is x's with the base layer, its bias included. KL and -log prior are fp32, or empty. The tickets
    are integers that the kernels of one projection count with.
    """
    (a, b), stretches = factors_of(factors), stretches_of(x, factors, sizes, bounds)
    rows, sums = rows_of(x), new_sums(with_sums, factors, x.device)
    # the sample is added in place
    y = linear(rows, weight, bias) if product is None else product.clone(memory_format=torch.contiguous_format)
    tickets = launch.new_tickets(groups_of(factors), x.device)
    p = torch.empty(stretches.counts.total, len(a.tensors) * a.rank, dtype=torch.float32, device=x.device)
    parts = Rows.of_projections(launch.project(rows, a, stretches, tickets), a.rank)
    columns, scalars = Columns.of_activations(b), Scalars(settings, names, layer)
    launch.sample(parts, columns, y, stretches, mask_bytes(mask), scalars, tickets, True, sums, p)
    return shaped(y, x.shape[:-1]), p, tickets, *separate(sums, p)


@shapes_of(activation_forward)
def _(x, weight, bias, product, mask, factors, settings, names, layer, with_sums, sizes=None, bounds=None):
    sums = [x.new_empty(lead_of(factors) if with_sums else (0,), dtype=torch.float32) for _ in range(2)]
    tickets = launch.new_tickets(groups_of(factors), x.device)
    return x.new_empty(*x.shape[:-1], factors[1].shape[-2]), _empty_p(x, factors), tickets, *sums


def _empty_p(x: Tensor, factors: Sequence[Tensor]) -> Tensor:
    return x.new_empty(x.shape[:-1].numel(), len(factors) // 2 * factors[0].shape[-2], dtype=torch.float32)


@operator
def activation_backward(
    dy: Tensor | None,
    dkl: Tensor | None,
    dprior: Tensor | None,
    x: Tensor,
    p: Tensor,
    tickets: Tensor,
    weight: Tensor | None,
    mask: Tensor | None,
    factors: Sequence[Tensor],
    settings: Sequence[float],
    names: Tensor,
    layer: int,
    need_x: bool,
    need_phi: bool,
    need_theta: bool,
    sizes: Sequence[int] | None = None,
    bounds: Tensor | None = None,
) -> tuple[Tensor, Tensor, Tensor]:
    """(dx as x, da [pairs, G, r, K], db [pairs, G, N, r]), phi's two pairs before theta's; empty where not needed.

    dy, dkl, dprior: gradients of y, KL and -log prior; None is zero, and saves the work. Without groups no G.
    """
    (a, b), stretches = factors_of(factors), stretches_of(x, factors, sizes, bounds)
    rows, dz = rows_of(x), None if dy is None else rows_of(dy)
    # x has a part in the KL through theta's statistics as well
    divergence = dkl is not None or dprior is not None
    dp_phi, dp_theta = need_x or need_phi, divergence and (need_x or need_theta)
    wanted = Wanted(dp_phi, dp_theta, need_phi, need_theta)
    dp = _side_by_side(2 * dp_phi + 2 * dp_theta, p, a.rank)
    dq = launch.adjoint(
        Rows.of_projections(p, a.rank), Columns.of_activations(b), stretches, factors[1].shape[-2], dz, dkl, dprior,
        mask_bytes(mask), Scalars(settings, names, layer), tickets, wanted, dp, x.dtype == torch.float32,
    )  # fmt: skip
    count = 2 * need_phi + 2 * need_theta
    # dp's pairs, and whose A go with them
    read = a if dp_phi and dp_theta else a._replace(tensors=a.tensors[:2] if dp_phi else a.tensors[2:])
    first = 0 if need_phi else len(read.tensors) - 2
    dx, da, db = launch.gradients(dp, rows, read, stretches, dq if count else None, first, count, need_x)
    if need_x and dz is not None and weight is not None:
        dx.flatten(0, -2).addmm_(dz.flatten(0, -2), weight)
    dx = shaped(dx, x.shape[:-1]) if need_x else p.new_empty(0)
    return (dx, da, db) if count else (dx, p.new_empty(0), p.new_empty(0))


def _side_by_side(pairs: int, p: Tensor, rank: int) -> Tensor:
    """dp [pairs, T, r], in memory [T, pairs * r], for as many rows as p has."""
    return torch.empty_strided((pairs, p.shape[0], rank), (rank, pairs * rank, 1), dtype=torch.float32, device=p.device)


@shapes_of(activation_backward)
def _(
    dy, dkl, dprior, x, p, tickets, weight, mask, factors, settings, names, layer, need_x, need_phi, need_theta,
    sizes=None, bounds=None,
):  # fmt: skip
    count = 2 * need_phi + 2 * need_theta
    return (
        x.new_empty(x.shape) if need_x else p.new_empty(0),
        p.new_empty(count, *factors[0].shape) if count else p.new_empty(0),
        p.new_empty(count, *factors[1].shape) if count else p.new_empty(0),
    )


class _Derivative(torch.autograd.Function):
    @staticmethod
    def forward(ctx, x, weight, bias, product, mask, settings, names, layer, with_sums, sizes, bounds, *factors):
        named = (settings, names, layer, with_sums, sizes, bounds)
        found = below_autograd(activation_forward, x, weight, bias, product, mask, factors, *named)
        ctx.settings, ctx.layer, ctx.sizes = settings, layer, sizes
        ctx.set_materialize_grads(False)
        ctx.mark_non_differentiable(*(found[1:3] if with_sums else found[1:]))
        ctx.save_for_backward(x, *found[1:3], weight, mask, names, bounds, *factors)
        return found

    @staticmethod
    def backward(ctx, dy, _p, _tickets, dkl, dprior):
        x, p, tickets, weight, mask, names, bounds, *factors = ctx.saved_tensors
        check_once()
        wanted = needs(ctx.needs_input_grad[0], ctx.needs_input_grad[11:], dy, dkl, dprior)
        dx = da = db = None
        if any(wanted):
            with without_autocast(x.device.type):  # a backward pass inside the user's own would lose fp32
                dx, da, db = activation_backward(
                    dy, dkl, dprior, x, p, tickets, weight, mask, factors, ctx.settings, names, ctx.layer, *wanted,
                    ctx.sizes, bounds,
                )  # fmt: skip
        dproduct = dy if weight is None else None
        of_factors = gradients_of_factors(da, db, factors, wanted)
        return dx if wanted[0] else None, None, None, dproduct, *[None] * 7, *of_factors


def _differentiable(
    x, weight, bias, product, mask, factors, settings, names, layer, with_sums, sizes=None, bounds=None
):
    named = (settings, names, layer, with_sums, sizes, bounds)
    return _Derivative.apply(x, weight, bias, product, mask, *named, *factors)


differentiate(activation_forward, _differentiable)


@operator
def activation_project(
    x: Tensor, factors: Sequence[Tensor], sizes: Sequence[int] | None = None, bounds: Tensor | None = None
) -> Tensor:
    """p [T, pairs * r] in fp32 alone: A x of all pairs from one pass over x."""
    stretches, tickets = stretches_of(x, factors, sizes, bounds), launch.new_tickets(groups_of(factors), x.device)
    return launch.project(rows_of(x), factors_of(factors)[0], stretches, tickets).sum(dim=0)


@shapes_of(activation_project)
def _(x, factors, sizes=None, bounds=None):
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
    sizes: Sequence[int] | None = None,
    bounds: Tensor | None = None,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """(da [2, G, r, K], db [2, G, N, r], KL, -log prior) of theta's two pairs, each group's own, from x and all four
    pairs' p: no noise. Without groups no G.
    """
    (a, b), stretches = factors_of(factors), stretches_of(x, factors, sizes, bounds)
    rows, sums = rows_of(x), new_sums(True, factors, x.device)
    tickets = launch.new_tickets(groups_of(factors), x.device, cleared=True)
    wanted, dp = Wanted(False, True, False, True), _side_by_side(2, p, a.rank)
    dq = launch.adjoint(
        Rows.of_projections(p, a.rank), Columns.of_activations(b), stretches, factors[1].shape[-2], None,
        number(kl_weight, p), number(prior_weight, p), mask_bytes(mask), Scalars(settings), tickets, wanted, dp,
        x.dtype == torch.float32, sums,
    )  # fmt: skip
    _, da, db = launch.gradients(dp, rows, a._replace(tensors=a.tensors[2:]), stretches, dq, 0, 2, False)
    return da, db, *sums


@shapes_of(activation_theta_gradient)
def _(x, p, mask, factors, settings, kl_weight, prior_weight, sizes=None, bounds=None):
    new, lead = p.new_empty, lead_of(factors)
    return new(2, *factors[0].shape), new(2, *factors[1].shape), new(lead), new(lead)
