"""The fused activation posterior as opaque PyTorch operators, with shapes for tracing and their derivative.

Opaque: `torch.compile` of a model keeps them as they are and does not break its graph at them. Saved for the backward
pass: x, the rank-sized projections p in fp32, and integers.

The base is a dense weight (with or without a bias), or a product y0 that another library made, to which the sample is
added: then weight and bias are None. Arguments of all operators: phi and theta are lists of mean a, b, log-variance a,
b (theta may be empty); settings those of `PosteriorSettings`; names [G, 3] those of `NoiseKey.rows`.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from abmll.kernels.fused import launch
from abmll.kernels.fused.derivative import Needs
from abmll.kernels.fused.launch import Matrix, Pairs, Scalars, Wanted
from abmll.kernels.fused.operators import operator


def _mask_bytes(mask: Tensor | None) -> Tensor | None:
    """[G, T] as bytes."""
    return None if mask is None else launch.rows_contiguous(mask.to(torch.bool)).view(torch.uint8)


@operator("abmll::activation_forward")
def activation_forward(
    x: Tensor,
    weight: Tensor | None,
    bias: Tensor | None,
    product: Tensor | None,
    mask: Tensor | None,
    phi: Sequence[Tensor],
    theta: Sequence[Tensor],
    settings: Sequence[float],
    names: Tensor,
    layer: int,
    with_sums: bool,
) -> tuple[Tensor, Tensor, Tensor]:
    """(y [G, T, N], p [G, T, pairs * r] fp32, [KL, -log prior] or empty) of x [G, T, K]; mask [G, T] bool.

    product [G, T, N] is x's with the base layer, its bias included.
    """
    pairs = Pairs.of(*phi, *theta)
    weight = None if weight is None else launch.rows_contiguous(weight)
    y, p = launch.project(launch.rows_contiguous(x), weight, bias, pairs)
    if y is None:
        y = product.clone(memory_format=torch.contiguous_format)  # the sample is added in place
    scalars = Scalars(*settings, names, layer)
    return y, p, launch.sample(Matrix.of_activations(p, pairs), y, _mask_bytes(mask), scalars, True, with_sums)


@activation_forward.register_fake
def _(x, weight, bias, product, mask, phi, theta, settings, names, layer, with_sums):
    shape, pairs = x.shape[:-1], (len(phi) + len(theta)) // 2
    return (
        x.new_empty(*shape, phi[1].shape[-2]),
        x.new_empty(*shape, pairs * phi[0].shape[-2], dtype=torch.float32),
        x.new_empty(2 if with_sums else 0, dtype=torch.float32),
    )


@operator("abmll::activation_backward")
def activation_backward(
    dy: Tensor | None,
    dsums: Tensor | None,
    x: Tensor,
    p: Tensor,
    weight: Tensor | None,
    mask: Tensor | None,
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
    x = launch.rows_contiguous(x)
    dy = None if dy is None else launch.rows_contiguous(dy)
    # x has a part in the KL through theta's statistics as well
    dp_phi, dp_theta = need_x or need_phi, dsums is not None and (need_x or need_theta)
    wanted = Wanted(dp_phi, dp_theta, need_phi, need_theta)
    adjoints = launch.adjoint(Matrix.of_activations(p, pairs), dy, dsums, _mask_bytes(mask), scalars, wanted)
    count = 2 * need_phi + 2 * need_theta
    first = 0 if need_phi or not dp_phi else 2
    # before dx: their partial sums are gone when the largest tensor is made
    da = launch.factor_gradient(adjoints.dp, x, pairs.rank, first, count) if count else p.new_empty(0)
    dx = x.new_empty(0)
    if need_x:
        read = pairs if dp_theta else Pairs(pairs.a[:2], pairs.b[:2])
        weight = None if weight is None else launch.rows_contiguous(weight)
        dx = launch.input_gradient(dy, weight, adjoints.dp, read, x.dtype)
    return dx, da, adjoints.dq


@activation_backward.register_fake
def _(dy, dsums, x, p, weight, mask, phi, theta, settings, names, layer, need_x, need_phi, need_theta):
    rank, groups, count = phi[0].shape[-2], x.shape[0], 2 * need_phi + 2 * need_theta
    return (
        x.new_empty(x.shape) if need_x else x.new_empty(0),
        p.new_empty(count, groups, rank, x.shape[-1]) if count else p.new_empty(0),
        p.new_empty(count, groups, phi[1].shape[-2], rank),
    )


def _setup_context(ctx, inputs, output):
    x, weight, _, _, mask, phi, theta, ctx.settings, names, ctx.layer, _ = inputs
    ctx.set_materialize_grads(False)
    ctx.save_for_backward(x, output[1], weight, mask, names, *phi, *theta)


def _backward(ctx, dy, _, dsums):
    x, p, weight, mask, names, *factors = ctx.saved_tensors
    needs = Needs.of(ctx.needs_input_grad[0], ctx.needs_input_grad[5:7], dy, dsums)
    dx, phi, theta = None, [None] * 4, [None] * len(factors[4:])
    if needs.anything:
        with torch.autocast(x.device.type, enabled=False):  # a backward pass inside the user's own would lose fp32
            dx, da, db = torch.ops.abmll.activation_backward(
                dy, needs.dsums, x, p, weight, mask, factors[:4], factors[4:], ctx.settings, names, ctx.layer,
                *needs.flags,
            )  # fmt: skip
        dx, phi, theta = needs.distribute(dx, da, db, len(theta))
    return dx, None, None, dy if weight is None else None, None, phi, theta, None, None, None, None


activation_forward.register_autograd(_backward, setup_context=_setup_context)


@operator("abmll::activation_project")
def activation_project(x: Tensor, phi: Sequence[Tensor], theta: Sequence[Tensor]) -> Tensor:
    """p [G, T, pairs * r] in fp32 alone: A x of all pairs from one pass over x [G, T, K]."""
    return launch.project(launch.rows_contiguous(x), None, None, Pairs.of(*phi, *theta))[1]


@activation_project.register_fake
def _(x, phi, theta):
    return x.new_empty(*x.shape[:-1], (len(phi) + len(theta)) // 2 * phi[0].shape[-2], dtype=torch.float32)


@operator("abmll::activation_theta_gradient")
def activation_theta_gradient(
    x: Tensor,
    p: Tensor,
    mask: Tensor | None,
    phi: Sequence[Tensor],
    theta: Sequence[Tensor],
    settings: Sequence[float],
    kl_weight: float,
    prior_weight: float,
) -> tuple[Tensor, Tensor, Tensor]:
    """(da [2, r, K], db [2, N, r], [KL, -log prior]) of theta's two pairs, from x and all four pairs' p: no noise."""
    pairs, scalars = Pairs.of(*phi, *theta), Scalars(*settings)
    x = launch.rows_contiguous(x)
    weights = launch.constants(kl_weight, prior_weight, device=x.device)
    wanted = Wanted(False, True, False, True, sums=True)
    adjoints = launch.adjoint(Matrix.of_activations(p, pairs), None, weights, _mask_bytes(mask), scalars, wanted)
    da = launch.factor_gradient(adjoints.dp, x, pairs.rank, 0, 2)
    return da.sum(dim=1), adjoints.dq.sum(dim=1), adjoints.sums


@activation_theta_gradient.register_fake
def _(x, p, mask, phi, theta, settings, kl_weight, prior_weight):
    rank, outputs = theta[0].shape[-2], theta[1].shape[-2]
    return p.new_empty(2, rank, x.shape[-1]), p.new_empty(2, outputs, rank), p.new_empty(2)
