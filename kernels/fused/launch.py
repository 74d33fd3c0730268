"""From tensors to kernel launches and back: allocates outputs, picks grids, sums partial results.

Shapes throughout: x [G, T, K], weight [N, K], factors a [G, r, K] or [r, K] (theta), b [G, N, r] or [N, r]; all fp32
but x, weight and bias. Nothing here builds a graph.
"""

from __future__ import annotations

from contextlib import nullcontext
from typing import NamedTuple

import torch
from torch import Tensor
from torch.nn.functional import linear

from abmll.kernels.fused import configurations
from abmll.kernels.fused.activation import adjoint_kernel, sample_kernel
from abmll.kernels.fused.configurations import ADJOINT_SLOTS, TARGET_PROGRAMS, padded_rank
from abmll.kernels.fused.products import factor_gradient_kernel, forward_kernel, input_gradient_kernel


class Pairs(NamedTuple):
    """The factors of two or four low-rank pairs: phi's mean and log-variance, then theta's (absent: two pairs)."""

    a: tuple[Tensor, ...]
    b: tuple[Tensor, ...]

    @property
    def rank(self) -> int:
        return self.a[0].shape[-2]

    def padded(self, which: tuple[Tensor, ...]) -> tuple[Tensor, ...]:
        """Four pointers whatever the number of pairs: the first stands in for those that are not read."""
        return which + (which[0],) * (4 - len(which))


class Scalars(NamedTuple):
    """`PosteriorSettings`, then the integers that name the noise, as signed 64- and 32-bit numbers."""

    scaling: float
    offset: float
    prior_shape: float
    prior_rate: float
    seed: int
    step: int
    layer: int


def _blocks(size: int, block: int) -> int:
    return -(-size // block)


def _on(x: Tensor):
    return torch.cuda.device(x.device) if x.is_cuda else nullcontext()


def rows_contiguous(x: Tensor) -> Tensor:
    """x with unit stride along its last dimension: rows may be anywhere, elements of a row may not."""
    return x if x.stride(-1) == 1 or x.shape[-1] == 1 else x.contiguous()


def project(x: Tensor, weight: Tensor | None, bias: Tensor | None, pairs: Pairs) -> tuple[Tensor | None, Tensor]:
    """(y0 [G, T, N] = x W0^T + bias, p [G, T, pairs * r] fp32); y0 None without a weight."""
    groups, tokens, inputs = x.shape
    count, rank = len(pairs.a), pairs.rank
    launch = configurations.forward(x.dtype, rank)
    base = weight is not None and configurations.fused_base(x.dtype)
    p = torch.empty(groups, tokens, count * rank, dtype=torch.float32, device=x.device)
    outputs = 0 if weight is None else weight.shape[0]
    y = p
    if base:
        y = torch.empty(groups, tokens, outputs, dtype=x.dtype, device=x.device)
    elif weight is not None:
        y = linear(x, weight, bias)
    if not p.numel():
        return None if weight is None else y, p
    programs = _blocks(tokens, launch.blocks["P_ROWS"])
    if base:
        programs += _blocks(tokens, launch.blocks["ROWS"]) * _blocks(outputs, launch.blocks["COLUMNS"])
    matrix = weight if base else x
    with _on(x):
        forward_kernel[programs, groups](
            x, matrix, x if bias is None else bias, *pairs.padded(pairs.a), y, p,
            tokens, outputs, inputs, x.stride(0), x.stride(1), matrix.stride(0),
            PAIRS=count, RANK=rank, R=padded_rank(rank), BASE=base, HAS_BIAS=bias is not None,
            **launch.blocks, **launch.options,
        )  # fmt: skip
    return None if weight is None else y, p


def sample(y: Tensor, p: Tensor, mask: Tensor | None, pairs: Pairs, scalars: Scalars, with_sums: bool) -> Tensor:
    """Add the sample to y [G, T, N] in place. Returns [KL, -log prior], or an empty tensor without sums."""
    groups, tokens, outputs = y.shape
    launch = configurations.sample(pairs.rank)
    grid = (_blocks(tokens, launch.blocks["ROWS"]), _blocks(outputs, launch.blocks["COLUMNS"]), groups)
    sums = torch.empty(2, grid[0] * grid[1] * grid[2] if with_sums else 0, dtype=torch.float32, device=y.device)
    if y.numel():
        with _on(y):
            sample_kernel[grid](
                y, p, _mask_pointer(mask, p), *pairs.padded(pairs.b), sums,
                tokens, outputs, _mask_stride(mask), *scalars,
                WIDTH=p.shape[-1], RANK=pairs.rank, R=padded_rank(pairs.rank), SUMS=with_sums,
                HAS_MASK=mask is not None, **launch.blocks, **launch.options,
            )  # fmt: skip
    return sums.sum(dim=1) if with_sums else sums.new_empty(0)


class Adjoints(NamedTuple):
    """dp [G, T, pairs * r]; db [pairs, chunks' sum, G, N, r]; [KL, -log prior] or empty."""

    dp: Tensor
    db: Tensor
    sums: Tensor


def adjoint(
    dy: Tensor | None,
    weights: Tensor | None,
    p: Tensor,
    outputs: int,
    mask: Tensor | None,
    pairs: Pairs,
    scalars: Scalars,
    dp_phi: bool,
    dp_theta: bool,
    db_phi: bool,
    db_theta: bool,
    with_sums: bool,
) -> Adjoints:
    """Adjoints of the pairs asked for. dy [G, T, N]; weights [2]: gradients of the sums of KL and -log prior."""
    groups, tokens, width = p.shape
    launch = configurations.adjoint(pairs.rank)
    slots, slot_rows = _split(tokens, launch.blocks["ROWS"], ADJOINT_SLOTS)
    chunks, chunk_columns = _split(outputs, launch.blocks["COLUMNS"], TARGET_PROGRAMS // max(slots * groups, 1))
    new = {"dtype": torch.float32, "device": p.device}
    dp = torch.empty(chunks, groups, tokens, (2 * dp_phi + 2 * dp_theta) * pairs.rank, **new)
    db = torch.empty(slots, 2 * db_phi + 2 * db_theta, groups, outputs, pairs.rank, **new)
    sums = torch.empty(2, slots * chunks * groups if with_sums else 0, **new)
    if slots and chunks:
        with _on(p):
            adjoint_kernel[slots, chunks, groups](
                p if dy is None else dy, p, _mask_pointer(mask, p), *pairs.padded(pairs.b),
                p if weights is None else weights, dp, db, sums,
                tokens, outputs, groups, *_row_strides(dy), _mask_stride(mask), slot_rows, chunk_columns,
                *scalars, WIDTH=width, RANK=pairs.rank, R=padded_rank(pairs.rank), HAS_MASK=mask is not None,
                HAS_DY=dy is not None, DIVERGENCE=weights is not None, DP_PHI=dp_phi, DP_THETA=dp_theta,
                DB_PHI=db_phi, DB_THETA=db_theta, SUMS=with_sums, **launch.blocks, **launch.options,
            )  # fmt: skip
    return Adjoints(_summed(dp), _summed(db), sums.sum(dim=1) if with_sums else sums.new_empty(0))


def input_gradient(dy: Tensor | None, weight: Tensor, dp: Tensor, pairs: Pairs, dtype: torch.dtype) -> Tensor:
    """dx [G, T, K] = dy W0 + dp A in `dtype`; dp holds the first len(pairs.a) pairs."""
    groups, tokens, _ = dp.shape
    outputs, inputs = weight.shape
    launch = configurations.input_gradient(dtype, pairs.rank)
    base = configurations.fused_base(dtype)
    if dy is not None and not base:
        dx = dy @ weight
    else:
        dx = torch.empty(groups, tokens, inputs, dtype=dtype, device=dp.device)
    if dx.numel():
        programs = _blocks(tokens, launch.blocks["ROWS"]) * _blocks(inputs, launch.blocks["COLUMNS"])
        with _on(dp):
            input_gradient_kernel[programs, groups](
                dp if dy is None else dy, weight, dp, *pairs.padded(pairs.a), dx, tokens, outputs, inputs,
                *_row_strides(dy), weight.stride(0),
                PAIRS=len(pairs.a), RANK=pairs.rank, R=padded_rank(pairs.rank), BASE=base, HAS_DY=dy is not None,
                **launch.blocks, **launch.options,
            )  # fmt: skip
    return dx


def factor_gradient(dp: Tensor, x: Tensor, rank: int, first: int, count: int) -> Tensor:
    """dA [count, G, r, K] of `count` pairs of dp from the `first` on."""
    groups, tokens, inputs = x.shape
    launch = configurations.factor_gradient(x.dtype, rank)
    column_blocks = _blocks(inputs, launch.blocks["COLUMNS"])
    chunks, chunk_rows = _split(tokens, launch.blocks["ROWS"], TARGET_PROGRAMS // max(column_blocks * groups, 1))
    da = torch.empty(chunks, count, groups, rank, inputs, dtype=torch.float32, device=x.device)
    if chunks:
        with _on(x):
            factor_gradient_kernel[column_blocks, chunks, groups](
                dp, x, da, tokens, inputs, groups, x.stride(0), x.stride(1), chunk_rows,
                WIDTH=dp.shape[-1], FIRST=first, PAIRS=count, RANK=rank, R=padded_rank(rank),
                **launch.blocks, **launch.options,
            )  # fmt: skip
    return _summed(da)


def _split(size: int, block: int, parts: int) -> tuple[int, int]:
    """At most `parts` (at least one) equal parts of whole blocks: how many, and the size of each."""
    if size == 0:
        return 0, 0
    part = _blocks(_blocks(size, block), max(parts, 1)) * block
    return _blocks(size, part), part


def _summed(partial: Tensor) -> Tensor:
    return partial[0] if partial.shape[0] == 1 else partial.sum(dim=0)


def _mask_pointer(mask: Tensor | None, other: Tensor) -> Tensor:
    return other if mask is None else mask


def _row_strides(dy: Tensor | None) -> tuple[int, int]:
    return (0, 0) if dy is None else (dy.stride(0), dy.stride(1))


def _mask_stride(mask: Tensor | None) -> int:
    return 0 if mask is None else mask.stride(0)
