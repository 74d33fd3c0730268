"""The fused activation posterior as opaque PyTorch operators, with shapes for tracing and their derivative.

Opaque: `torch.compile` of a model keeps them as they are and does not break its graph at them. Saved for the backward
pass: x, the rank-sized projections p in fp32, and integers.
"""

from __future__ import annotations

import torch
from torch import Tensor

from abmll.kernels.fused import launch
from abmll.kernels.fused.launch import Matrix, Pairs, Scalars, Wanted


def _mask_bytes(mask: Tensor | None) -> Tensor | None:
    """[G, T] as bytes."""
    return None if mask is None else launch.rows_contiguous(mask.to(torch.bool)).view(torch.uint8)


@torch.library.custom_op("abmll::activation_forward", mutates_args=())
def activation_forward(
    x: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    mask: Tensor | None,
    phi_mean_a: Tensor,
    phi_mean_b: Tensor,
    phi_log_variance_a: Tensor,
    phi_log_variance_b: Tensor,
    theta_mean_a: Tensor | None,
    theta_mean_b: Tensor | None,
    theta_log_variance_a: Tensor | None,
    theta_log_variance_b: Tensor | None,
    scaling: float,
    offset: float,
    prior_shape: float,
    prior_rate: float,
    seed: int,
    step: int,
    layer: int,
    with_sums: bool,
) -> tuple[Tensor, Tensor, Tensor]:
    """(y [G, T, N], p [G, T, pairs * r] fp32, [KL, -log prior] or empty) of x [G, T, K]; mask [G, T] bool."""
    factors = (phi_mean_a, phi_mean_b, phi_log_variance_a, phi_log_variance_b)
    factors += (theta_mean_a, theta_mean_b, theta_log_variance_a, theta_log_variance_b)
    pairs = Pairs.of(*factors)
    y, p = launch.project(launch.rows_contiguous(x), launch.rows_contiguous(weight), bias, pairs)
    scalars = Scalars(scaling, offset, prior_shape, prior_rate, seed, step, layer)
    return y, p, launch.sample(Matrix.of_activations(p, pairs), y, _mask_bytes(mask), scalars, True, with_sums)


@activation_forward.register_fake
def _(x, weight, bias, mask, *arguments):
    factors, with_sums = arguments[:8], arguments[-1]
    pairs = sum(factor is not None for factor in factors) // 2
    shape = x.shape[:-1]
    return (
        x.new_empty(*shape, weight.shape[0]),
        x.new_empty(*shape, pairs * factors[0].shape[-2], dtype=torch.float32),
        x.new_empty(2 if with_sums else 0, dtype=torch.float32),
    )


@torch.library.custom_op("abmll::activation_backward", mutates_args=())
def activation_backward(
    dy: Tensor | None,
    dsums: Tensor | None,
    x: Tensor,
    p: Tensor,
    weight: Tensor,
    mask: Tensor | None,
    phi_mean_a: Tensor,
    phi_mean_b: Tensor,
    phi_log_variance_a: Tensor,
    phi_log_variance_b: Tensor,
    theta_mean_a: Tensor | None,
    theta_mean_b: Tensor | None,
    theta_log_variance_a: Tensor | None,
    theta_log_variance_b: Tensor | None,
    scaling: float,
    offset: float,
    prior_shape: float,
    prior_rate: float,
    seed: int,
    step: int,
    layer: int,
    need_x: bool,
    need_phi: bool,
    need_theta: bool,
) -> tuple[Tensor, Tensor, Tensor]:
    """(dx, da [pairs, G, r, K], db [pairs, G, N, r]), phi's two pairs before theta's; empty where not needed."""
    factors = (phi_mean_a, phi_mean_b, phi_log_variance_a, phi_log_variance_b)
    factors += (theta_mean_a, theta_mean_b, theta_log_variance_a, theta_log_variance_b)
    pairs = Pairs.of(*factors)
    scalars = Scalars(scaling, offset, prior_shape, prior_rate, seed, step, layer)
    rank, x = pairs.rank, launch.rows_contiguous(x)
    dy = None if dy is None else launch.rows_contiguous(dy)
    # x has a part in the KL through theta's statistics as well
    dp_phi, dp_theta = need_x or need_phi, dsums is not None and (need_x or need_theta)
    wanted = Wanted(dp_phi, dp_theta, need_phi, need_theta)
    adjoints = launch.adjoint(Matrix.of_activations(p, pairs), dy, dsums, _mask_bytes(mask), scalars, wanted)
    count = 2 * need_phi + 2 * need_theta
    first = 0 if need_phi or not dp_phi else 2
    # before dx: their partial sums are gone when the largest tensor is made
    da = launch.factor_gradient(adjoints.dp, x, rank, first, count) if count else p.new_empty(0)
    dx = x.new_empty(0)
    if need_x:
        read = pairs if dp_theta else Pairs(pairs.a[:2], pairs.b[:2])
        dx = launch.input_gradient(dy, launch.rows_contiguous(weight), adjoints.dp, read, x.dtype)
    return dx, da, adjoints.dq


@activation_backward.register_fake
def _(dy, dsums, x, p, weight, mask, *arguments):
    need_x, need_phi, need_theta = arguments[-3:]
    rank, groups, count = arguments[0].shape[-2], x.shape[0], 2 * need_phi + 2 * need_theta
    return (
        x.new_empty(x.shape) if need_x else x.new_empty(0),
        p.new_empty(count, groups, rank, x.shape[-1]) if count else p.new_empty(0),
        p.new_empty(count, groups, weight.shape[0], rank),
    )


def _setup_context(ctx, inputs, output):
    x, weight, _, mask, *factors = inputs[:12]
    ctx.set_materialize_grads(False)
    ctx.scalars = inputs[12:19]
    ctx.save_for_backward(x, output[1], weight, mask, *factors)


def _backward(ctx, dy, _, dsums):
    needs = ctx.needs_input_grad
    need_x, need_phi, need_theta = needs[0], any(needs[4:8]), any(needs[8:12])
    if dsums is not None and dsums.numel() == 0:
        dsums = None
    need_theta = need_theta and dsums is not None
    nothing: list[Tensor | None] = [None] * 20
    if (dy is None and dsums is None) or not (need_x or need_phi or need_theta):
        return tuple(nothing)
    dx, da, db = torch.ops.abmll.activation_backward(
        dy, dsums, *ctx.saved_tensors, *ctx.scalars, need_x, need_phi, need_theta
    )
    gradients = nothing
    gradients[0] = dx if need_x else None
    if need_phi:
        gradients[4:8] = da[0], db[0], da[1], db[1]
    if need_theta:
        gradients[8:12] = (part.sum(dim=0) for part in (da[-2], db[-2], da[-1], db[-1]))
    return tuple(gradients)


activation_forward.register_autograd(_backward, setup_context=_setup_context)


@torch.library.custom_op("abmll::activation_project", mutates_args=())
def activation_project(
    x: Tensor,
    phi_mean_a: Tensor,
    phi_log_variance_a: Tensor,
    theta_mean_a: Tensor,
    theta_log_variance_a: Tensor,
) -> Tensor:
    """p [G, T, 4r] in fp32 alone: A x of all four pairs from one pass over x [G, T, K]."""
    a = tuple(factor.contiguous() for factor in (phi_mean_a, phi_log_variance_a, theta_mean_a, theta_log_variance_a))
    return launch.project(launch.rows_contiguous(x), None, None, Pairs(a, ()))[1]


@activation_project.register_fake
def _(x, phi_mean_a, *_others):
    return x.new_empty(*x.shape[:-1], 4 * phi_mean_a.shape[-2], dtype=torch.float32)


@torch.library.custom_op("abmll::activation_theta_gradient", mutates_args=())
def activation_theta_gradient(
    x: Tensor,
    p: Tensor,
    mask: Tensor | None,
    phi_mean_a: Tensor,
    phi_mean_b: Tensor,
    phi_log_variance_a: Tensor,
    phi_log_variance_b: Tensor,
    theta_mean_a: Tensor,
    theta_mean_b: Tensor,
    theta_log_variance_a: Tensor,
    theta_log_variance_b: Tensor,
    scaling: float,
    offset: float,
    prior_shape: float,
    prior_rate: float,
    kl_weight: float,
    prior_weight: float,
) -> tuple[Tensor, Tensor, Tensor]:
    """(da [2, r, K], db [2, N, r], [KL, -log prior]) of theta's two pairs, from x and all four pairs' p: no noise."""
    factors = (phi_mean_a, phi_mean_b, phi_log_variance_a, phi_log_variance_b)
    pairs = Pairs.of(*factors, theta_mean_a, theta_mean_b, theta_log_variance_a, theta_log_variance_b)
    x = launch.rows_contiguous(x)
    weights = launch.constants(kl_weight, prior_weight, device=x.device)
    scalars = Scalars(scaling, offset, prior_shape, prior_rate, 0, 0, 0)
    wanted = Wanted(False, True, False, True, sums=True)
    adjoints = launch.adjoint(Matrix.of_activations(p, pairs), None, weights, _mask_bytes(mask), scalars, wanted)
    da = launch.factor_gradient(adjoints.dp, x, pairs.rank, 0, 2)
    return da.sum(dim=1), adjoints.dq.sum(dim=1), adjoints.sums


@activation_theta_gradient.register_fake
def _(x, p, mask, phi_mean_a, phi_mean_b, *arguments):
    rank, outputs = phi_mean_a.shape[-2], phi_mean_b.shape[-2]
    return p.new_empty(2, rank, x.shape[-1]), p.new_empty(2, outputs, rank), p.new_empty(2)
