"""Both posteriors as a CPU runs them: `reference`'s formulas and their derivatives, a chunk of rows in cache at a time.

Left to autograd, the contract makes some forty passes over tensors of the output's (or the weight's) size and keeps
eight of them. Here no graph is built. A chunk's formulas follow one another while it is in the core's cache, and the
KL's gradient, which is its weight times something known, is reduced in the forward pass to tensors of the rank's size.
Kept for the backward pass is one dense fp32 tensor: half the noise's part, which is the sample's derivative by its
log-variance; and for the weight posterior the drawn change.

One group at a time: x [T, K], y0 [T, N], mask [T], phi's factors without a group. Both posteriors are one calculation:
a matrix whose means and log-variances are products left @ right,

    activation   [T, N]    left = s x A^T    right = B^T
    weight       [N, K]    left = s B        right = A

with the scaling s of its own that means and log-variances have each.

Theta's factors get no gradient here: `plain` leaves a call that wants it to autograd. Derivatives are made once.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import NamedTuple

import torch
from torch import Tensor
from torch.autograd.function import Function, once_differentiable

from abmll.kernels.reference import (
    GaussianFactors,
    PosteriorSettings,
    Projection,
    add_change,
    compute_dtype,
    divergence,
    negative_log_prior,
    noise_change,
)

# Elements of a chunk: a dozen such tensors live at a time. A chunk of a large matrix is larger, for many threads to
# share; it depends on the shape alone, so that the sums' order does.
SMALLEST_CHUNK, LARGEST_CHUNK, CHUNKS = 2**16, 2**19, 16


def chunks(rows: int, columns: int) -> Iterator[slice]:
    """Stretches of rows."""
    elements = min(max(rows * columns // CHUNKS, SMALLEST_CHUNK), LARGEST_CHUNK)
    size = max(elements // max(columns, 1), 1)
    for start in range(0, rows, size):
        yield slice(start, min(start + size, rows))


class Products(NamedTuple):
    """left [R, n r] and right [n r, C]: n products of rank r side by side, or their gradients."""

    left: Tensor
    right: Tensor


class Drawn(NamedTuple):
    """What `draw` found: sums over counted rows, and the KL's gradient in phi's and theta's left and phi's right."""

    kl: Tensor | None
    negative_log_prior: Tensor | None
    gradient: Products | None


def draw(
    phi: Products,
    theta: Products | None,
    settings: PosteriorSettings,
    noise: Tensor,
    counted: Tensor | None,
    deliver: Callable[[slice, Tensor], None],
    training: bool,
    theta_left: bool = False,
) -> Drawn:
    """Hands the sampled rows [R, C] to `deliver`, and leaves half the noise's part of them in `noise`.

    counted [R]: the rows that KL and prior are summed over. `training`: with the KL's gradient; `theta_left`: also
    in theta's left, which comes third and fourth.
    """
    rank, gradient = phi.right.shape[0] // 2, None
    if theta is not None and training:
        left = phi.left.new_empty(len(noise), (4 if theta_left else 2) * rank)
        gradient = Products(left, torch.zeros_like(phi.right))
        weighed = phi.left if counted is None else phi.left * counted.unsqueeze(-1)
    sums = [] if theta is None else [noise.new_zeros(2)]  # also of no rows at all
    for rows in chunks(*noise.shape):
        mean, log_variance = _statistics(phi, rows, settings)
        change = noise_change(log_variance, noise[rows])
        torch.mul(change, 0.5, out=noise[rows])
        deliver(rows, mean + change)
        if theta is None:
            continue
        mean_theta, log_variance_theta = _statistics(theta, rows, settings)
        found = divergence(mean, log_variance, mean_theta, log_variance_theta)
        prior = negative_log_prior(mean_theta, log_variance_theta, settings, found.precision_p)
        of_rows = torch.stack([found.kl.sum(dim=-1), prior.sum(dim=-1)])
        sums.append((of_rows if counted is None else of_rows * counted[rows]).sum(dim=-1))
        if gradient is not None:
            by_phi = (found.by_mean_q, found.by_log_variance_q)
            _add_adjoint(Products(weighed, phi.right), rows, by_phi, gradient)
            if theta_left:
                gradient.left[rows, 2 * rank : 3 * rank] = found.by_mean_p @ theta.right[:rank].mT
                gradient.left[rows, 3 * rank :] = found.by_log_variance_p @ theta.right[rank:].mT
    if gradient is not None and counted is not None:
        gradient.left.mul_(counted.unsqueeze(-1))
    return Drawn(*(torch.stack(sums).sum(dim=0).unbind() if sums else (None, None)), gradient)


def adjoint(phi: Products, by_sample: Tensor, half_noise: Tensor) -> Products:
    """Gradient in phi's left and right, given the sample's [R, C]."""
    found = Products(torch.empty_like(phi.left), torch.zeros_like(phi.right))
    for rows in chunks(*half_noise.shape):
        by_mean = by_sample[rows].to(half_noise.dtype)
        _add_adjoint(phi, rows, (by_mean, by_mean * half_noise[rows]), found)
    return found


def _statistics(products: Products, rows: slice, settings: PosteriorSettings) -> tuple[Tensor, Tensor]:
    rank, left = products.right.shape[0] // 2, products.left[rows]
    log_variance = left[:, rank:] @ products.right[rank:]
    return left[:, :rank] @ products.right[:rank], log_variance.add_(settings.log_variance_offset)


def _add_adjoint(products: Products, rows: slice, gradients: tuple[Tensor, Tensor], total: Products) -> None:
    """Sets these rows of left's gradient, and adds their share to right's, for mean and log-variance."""
    rank = products.right.shape[0] // 2
    for place, gradient in enumerate(gradients):
        own = slice(place * rank, (place + 1) * rank)
        total.left[rows, own] = gradient @ products.right[own].mT
        total.right[own].addmm_(products.left[rows, own].mT, gradient)


def _sum(sample: Products | None, divergence: Products | None, weight: Tensor | None) -> Products | None:
    """The sample's gradient and the KL's times its weight. Either may be missing; the KL's left may be wider."""
    if divergence is None or weight is None:
        return sample
    left, right = (weight * part for part in divergence)
    if sample is not None:
        left[:, : sample.left.shape[1]] += sample.left
        right += sample.right
    return Products(left, right)


def _training(*tensors: Tensor) -> bool:
    return torch.is_grad_enabled() and any(tensor.requires_grad for tensor in tensors)


def activation_projection(
    x: Tensor,
    y0: Tensor,
    phi: GaussianFactors,
    theta: GaussianFactors | None,
    settings: PosteriorSettings,
    noise: Tensor,
    mask: Tensor | None,
) -> Projection:
    """y0 [T, N] and what `reference.activation_sample` adds to x [T, K]. `noise` [T, N] is written over."""
    factors = (*_stacked(phi), *(() if theta is None else _stacked(theta)))
    return Projection(*_Activation.apply(x, y0, mask, noise, settings, _training(x, y0, *factors), *factors))


def weight_projection(
    x: Tensor,
    y0: Tensor,
    phi: GaussianFactors,
    theta: GaussianFactors | None,
    settings: PosteriorSettings,
    noise: Tensor,
) -> Projection:
    """y0 [T, N] and what `reference.weight_sample` adds to x [T, K]. `noise` [N, K] is written over.

    Beside a bf16 model the products with x and y's gradient are bf16's, of the drawn change rounded to it.
    """
    factors = (*_stacked(phi), *(() if theta is None else _stacked(theta)))
    return Projection(*_Weight.apply(x, y0, noise, settings, _training(x, y0, *factors), *factors))


def _scaled(left: Tensor, rank: int, settings: PosteriorSettings) -> Tensor:
    """left [R, n r] of means and log-variances in turn, each times its scaling."""
    scalings = left.new_tensor([settings.scaling, settings.log_variance_scaling]).unsqueeze(-1)
    return (left.unflatten(-1, (-1, 2, rank)) * scalings).flatten(-3)


def _stacked(factors: GaussianFactors) -> tuple[Tensor, Tensor]:
    """a [2r, K] and b^T [2r, N] of mean and log-variance, one above the other."""
    mean, log_variance = factors
    return torch.cat([mean.a, log_variance.a]), torch.cat([mean.b.mT, log_variance.b.mT])


class _Activation(Function):
    @staticmethod
    def forward(ctx, x, y0, mask, noise, settings, training, a, b, a_theta=None, b_theta=None):
        wide = compute_dtype(x)
        inputs, noise = x.to(wide), noise.to(wide)
        rank = len(a) // 2
        phi = Products(_scaled(inputs @ a.mT, rank, settings), b)
        theta = None if a_theta is None else Products(_scaled(inputs @ a_theta.mT, rank, settings), b_theta)
        y = torch.empty_like(y0, memory_format=torch.contiguous_format)

        def deliver(rows: slice, change: Tensor) -> None:
            y[rows] = add_change(y0[rows], change)

        drawn = draw(phi, theta, settings, noise, mask, deliver, training, theta_left=ctx.needs_input_grad[0])
        if training:
            ctx.set_materialize_grads(False)
            ctx.settings = settings
            gradient = drawn.gradient or (None, None)
            ctx.save_for_backward(x, mask, noise, phi.left, *gradient, a, b, a_theta, b_theta)
        return y, drawn.kl, drawn.negative_log_prior

    @staticmethod
    @once_differentiable
    def backward(ctx, dy, by_kl, by_prior):
        x, mask, half_noise, left, kl_left, kl_right, a, b, a_theta, b_theta = ctx.saved_tensors
        dx = da = db = None
        with torch.autocast(x.device.type, enabled=False):  # a backward pass inside the user's own would lose fp32
            divergence = None if kl_left is None else Products(kl_left, kl_right)
            sample = None if dy is None else adjoint(Products(left, b), dy, half_noise)
            found = _sum(sample, divergence, by_kl)
            if found is not None:
                by_low_rank = _scaled(found.left, len(a) // 2, ctx.settings)
                da, db = by_low_rank[:, : len(a)].mT @ x.to(left.dtype), found.right
                if ctx.needs_input_grad[0]:
                    both = torch.cat([a, a_theta]) if by_low_rank.shape[1] > len(a) else a
                    dx = by_low_rank @ both
            if by_prior is not None and ctx.needs_input_grad[0]:
                through_prior = _prior_by_inputs(x.to(left.dtype), a_theta, b_theta, mask, ctx.settings, by_prior)
                dx = through_prior if dx is None else dx + through_prior
        return None if dx is None else dx.to(x.dtype), dy, None, None, None, None, da, db, None, None


def _prior_by_inputs(
    inputs: Tensor, a: Tensor, b: Tensor, mask: Tensor | None, settings: PosteriorSettings, weight: Tensor
) -> Tensor:
    """Gradient of weight * (-log prior) in the activation posterior's inputs. Autograd's: the trainer never asks."""
    with torch.enable_grad():
        leaf = inputs.detach().requires_grad_()
        products = Products(_scaled(leaf @ a.mT, len(a) // 2, settings), b)
        statistics = _statistics(products, slice(None), settings)
        prior = negative_log_prior(*statistics, settings)
        prior = prior if mask is None else prior * mask.unsqueeze(-1)
        return torch.autograd.grad(prior.sum(), leaf, weight)[0]


class _Weight(Function):
    @staticmethod
    def forward(ctx, x, y0, noise, settings, training, a, b, a_theta=None, b_theta=None):
        wide, narrow = compute_dtype(x), _product_dtype(x)
        noise = noise.to(wide)
        rank = len(a) // 2
        phi = Products(_scaled(b.mT, rank, settings), a)
        theta = None if a_theta is None else Products(_scaled(b_theta.mT, rank, settings), a_theta)
        change = noise.new_empty(noise.shape, dtype=narrow)

        def deliver(rows: slice, drawn: Tensor) -> None:
            change[rows] = drawn

        drawn = draw(phi, theta, settings, noise, None, deliver, training)
        fits = narrow == y0.dtype  # then y0 is added in the product's accumulator
        y = torch.addmm(y0, x, change.mT) if fits else add_change(y0, x.to(narrow) @ change.mT)
        if training:
            ctx.set_materialize_grads(False)
            ctx.settings = settings
            gradient = drawn.gradient or (None, None)
            ctx.save_for_backward(x, change if ctx.needs_input_grad[0] else None, noise, *phi, *gradient)
        return y, drawn.kl, drawn.negative_log_prior

    @staticmethod
    @once_differentiable
    def backward(ctx, dy, by_kl, by_prior):
        x, change, half_noise, left, right, kl_left, kl_right = ctx.saved_tensors
        dx = da = db = sample = None
        with torch.autocast(x.device.type, enabled=False):
            divergence = None if kl_left is None else Products(kl_left, kl_right)
            if dy is not None:
                if change is not None:
                    dx = (dy.to(change.dtype) @ change).to(x.dtype)
                sample = adjoint(Products(left, right), _wide_product(dy.mT, x), half_noise)
            found = _sum(sample, divergence, by_kl)
            if found is not None:
                da, db = found.right, _scaled(found.left, len(right) // 2, ctx.settings).mT
        return dx, dy, None, None, None, da, db, None, None


def _product_dtype(x: Tensor) -> torch.dtype:
    """Of the drawn change. bf16 has fp32's range; fp16 has not: a standard deviation of exp(-10) is subnormal there."""
    return x.dtype if x.dtype == torch.bfloat16 else compute_dtype(x)


def _wide_product(left: Tensor, right: Tensor) -> Tensor:
    """left @ right in `compute_dtype`: of bf16 matrices the exact products, summed in fp32."""
    wide = compute_dtype(right)
    if right.dtype != torch.bfloat16:
        return left.to(wide) @ right.to(wide)
    with _bf16_products():
        return left.to(wide) @ right.to(wide)


@contextmanager
def _bf16_products() -> Iterator[None]:
    """fp32 matrices are multiplied by the CPU's bf16 units where it has some: exact for numbers that came from bf16.

    PyTorch has no product of bf16 matrices with an fp32 result on a CPU.
    """
    setting = torch.backends.mkldnn.matmul
    before = setting.fp32_precision
    setting.fp32_precision = "bf16"
    try:
        yield
    finally:
        setting.fp32_precision = before
