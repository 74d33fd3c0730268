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

from abmll.kernels.backends import on_gpu
from abmll.kernels.fused import configurations
from abmll.kernels.fused.configurations import ADJOINT_SLOTS, PROJECTION_PARTS, TARGET_PROGRAMS, padded_rank
from abmll.kernels.fused.gaussian import adjoint_kernel, sample_kernel
from abmll.kernels.fused.products import factor_gradient_kernel, forward_kernel, input_gradient_kernel


class Pairs(NamedTuple):
    """The factors of two or four low-rank pairs: phi's mean and log-variance, then theta's (absent: two pairs)."""

    a: tuple[Tensor, ...]
    b: tuple[Tensor, ...]

    @classmethod
    def of(cls, *factors: Tensor | None) -> Pairs:
        """From mean a, b, log-variance a, b of phi [G, ...], then of theta [...] or None."""
        there = [factor.contiguous() for factor in factors if factor is not None]
        return cls(tuple(there[0::2]), tuple(there[1::2]))

    @property
    def rank(self) -> int:
        return self.a[0].shape[-2]


class Matrix(NamedTuple):
    """A low-rank Gaussian matrix [G, M, N], see `gaussian`: row factors [G, M, r], column factors [G, N, r] of 2 or 4
    pairs. Strides may be any; theta's factors are expanded along G.
    """

    rows: tuple[Tensor, ...]
    columns: tuple[Tensor, ...]

    @classmethod
    def of_activations(cls, p: Tensor, pairs: Pairs) -> Matrix:
        """z [G, T, N] from the rank-sized projections p [G, T, pairs * r] and B."""
        return cls(p.unflatten(-1, (-1, pairs.rank)).unbind(-2), _grouped(pairs.b, p.shape[0]))

    @classmethod
    def of_weights(cls, pairs: Pairs, rows: slice) -> Matrix:
        """A band of rows of the change to W0 [G, N, K], from B and A^T."""
        groups = pairs.a[0].shape[0]
        rows_of_b = tuple(b[..., rows, :] for b in _grouped(pairs.b, groups))
        return cls(rows_of_b, tuple(a.mT for a in _grouped(pairs.a, groups)))

    @property
    def shape(self) -> tuple[int, int, int, int]:
        """G, M, N, r."""
        return (*self.rows[0].shape[:2], *self.columns[0].shape[1:])

    @property
    def factors(self) -> tuple[Tensor, ...]:
        """Eight pointers whatever the number of pairs: the first stands in for those that are not read."""
        return (*_padded(self.rows), *_padded(self.columns))

    @property
    def strides(self) -> tuple[int, ...]:
        """By group (phi, theta) and row of the row factors; by group (phi, theta), column and rank of the others."""
        rows, columns = self.rows, self.columns
        of_rows = (rows[0].stride(0), rows[-1].stride(0), rows[0].stride(1))
        return (*of_rows, columns[0].stride(0), columns[-1].stride(0), columns[0].stride(1), columns[0].stride(2))


def _grouped(factors: tuple[Tensor, ...], groups: int) -> tuple[Tensor, ...]:
    return tuple(f.expand(groups, -1, -1) for f in factors)


def _padded(factors: tuple[Tensor, ...]) -> tuple[Tensor, ...]:
    return factors + (factors[0],) * (4 - len(factors))


class Scalars(NamedTuple):
    """`PosteriorSettings`, then what names the noise (None: none is drawn): rows [G, 3] of `NoiseKey.rows`, a layer."""

    scaling: float
    offset: float
    prior_shape: float
    prior_rate: float
    names: Tensor | None = None
    layer: int = 0

    def arguments(self, near: Tensor) -> tuple[Tensor, int, float, float, float, float]:
        """In the kernels' order; `near` stands in for names that are not read."""
        return near if self.names is None else self.names.contiguous(), self.layer, *self[:4]


def _blocks(size: int, block: int) -> int:
    return -(-size // block)


# Set by `dry_run` alone: launches allocate their outputs and run nothing.
dry = False


def _run(kernel, grid: tuple[int, ...], near: Tensor, *arguments, **options) -> None:
    """kernel[grid](*arguments, **options) on the device of `near`."""
    if not dry:
        with torch.cuda.device(near.device) if near.is_cuda else nullcontext():
            kernel[grid](*arguments, **options)


def wide_product(a: Tensor, b: Tensor) -> Tensor:
    """a [M, K] b [K, N] in fp32, whatever the operands' dtype: a library call."""
    if not on_gpu(a) or a.dtype == torch.float32:
        return a.float() @ b.float()
    if dry:  # there is no such product on a CPU
        return a.new_empty(a.shape[0], b.shape[1], dtype=torch.float32)
    return torch.mm(a, b, out_dtype=torch.float32)


def rows_contiguous(x: Tensor) -> Tensor:
    """x with unit stride along its last dimension: rows may be anywhere, elements of a row may not."""
    return x if x.stride(-1) == 1 or x.shape[-1] == 1 else x.contiguous()


def project(x: Tensor, weight: Tensor | None, bias: Tensor | None, pairs: Pairs) -> tuple[Tensor | None, Tensor]:
    """(y0 [G, T, N] = x W0^T + bias, p [G, T, pairs * r] fp32); y0 None without a weight."""
    groups, tokens, inputs = x.shape
    count, rank = len(pairs.a), pairs.rank
    outputs = 0 if weight is None else weight.shape[0]
    base = weight is not None and configurations.fused_base(x.dtype, groups * tokens, outputs, inputs)
    launch = configurations.forward(base, rank)
    parts, part_depth = _split(inputs, launch.blocks["DEPTH"], PROJECTION_PARTS)
    p = torch.empty(parts, groups, tokens, count * rank, dtype=torch.float32, device=x.device)
    y = p
    if base:
        y = torch.empty(groups, tokens, outputs, dtype=x.dtype, device=x.device)
    elif weight is not None:
        y = linear(x, weight, bias)
    if not p.numel():
        return None if weight is None else y, _summed(p)
    programs = _blocks(tokens, launch.blocks["P_ROWS"]) * parts
    if base:
        programs += _blocks(tokens, launch.blocks["ROWS"]) * _blocks(outputs, launch.blocks["COLUMNS"])
    matrix = weight if base else x
    _run(
        forward_kernel, (programs, groups), x,
        x, matrix, x if bias is None else bias.contiguous(), *_padded(pairs.a), y, p,
        tokens, outputs, inputs, groups, x.stride(0), x.stride(1), matrix.stride(0), parts, part_depth,
        PAIRS=count, RANK=rank, R=padded_rank(rank), BASE=base, HAS_BIAS=bias is not None,
        **launch.blocks, **launch.options,
    )  # fmt: skip
    return None if weight is None else y, _summed(p)


def sample(
    matrix: Matrix,
    y: Tensor,
    mask: Tensor | None,
    scalars: Scalars,
    add: bool,
    with_sums: bool,
    first_row: int = 0,
) -> Tensor:
    """Draw the matrix: add it to y [G, M, N] in place, or write it there. Returns [KL, -log prior] (empty: no sums)."""
    groups, rows, columns, rank = matrix.shape
    launch = configurations.sample()
    grid = (_blocks(rows, launch.blocks["ROWS"]), _blocks(columns, launch.blocks["COLUMNS"]), groups)
    sums = torch.empty(2, grid[0] * grid[1] * grid[2] if with_sums else 0, dtype=torch.float32, device=y.device)
    if y.numel():
        _run(
            sample_kernel, grid, y,
            y, *matrix.factors, y if mask is None else mask, sums,
            rows, columns, first_row, y.stride(0), y.stride(1), *matrix.strides, _mask_stride(mask),
            *scalars.arguments(y),
            RANK=rank, R=padded_rank(rank), ADD=add, SUMS=with_sums, HAS_MASK=mask is not None,
            **launch.blocks, **launch.options,
        )  # fmt: skip
    return sums.sum(dim=1) if with_sums else sums.new_empty(0)


def constants(*values: float, device: torch.device) -> Tensor:
    """fp32 numbers on the device, without a copy that waits for it."""
    return torch.stack([torch.full((), value, dtype=torch.float32, device=device) for value in values])


class Wanted(NamedTuple):
    """Which adjoints: of phi's and theta's row factors (dp) and column factors (dq), and the sums of KL and prior."""

    dp_phi: bool
    dp_theta: bool
    dq_phi: bool
    dq_theta: bool
    sums: bool = False


class Adjoints(NamedTuple):
    """dp [G, M, pairs * r]; dq [pairs, G, N, r]; [KL, -log prior] or empty."""

    dp: Tensor
    dq: Tensor
    sums: Tensor


def adjoint(
    matrix: Matrix,
    dz: Tensor | None,
    weights: Tensor | None,
    mask: Tensor | None,
    scalars: Scalars,
    wanted: Wanted,
    sample_to: Tensor | None = None,
    first_row: int = 0,
) -> Adjoints:
    """Adjoints of the factors. dz [G, M, N]; weights [2]: gradients of the sums of KL and -log prior.

    With `sample_to` [G, M, N] (and dz) the sample is drawn again beside: one generation of the noise serves both.
    """
    if dz is not None and wanted.dq_theta:
        # theta's adjoints do not depend on dz, and all four pairs' at once would not fit the registers
        theta = adjoint(matrix, None, weights, mask, scalars, Wanted(False, wanted.dp_theta, False, True, wanted.sums))
        if not (wanted.dp_phi or wanted.dq_phi or sample_to is not None):
            return theta
        own = Wanted(wanted.dp_phi, False, wanted.dq_phi, False)
        phi = adjoint(matrix, dz, weights, mask, scalars, own, sample_to, first_row)
        return Adjoints(torch.cat([phi.dp, theta.dp], dim=-1), torch.cat([phi.dq, theta.dq]), theta.sums)
    groups, rows, columns, rank = matrix.shape
    launch = configurations.adjoint(rank)
    dp_width, dq_width = rank * sum(2 * w for w in wanted[:2]), rank * sum(2 * w for w in wanted[2:4])
    # so that the partial sums of each take at most half of what dz does in 16 bits
    slots, slot_rows = _split(rows, launch.blocks["ROWS"], min(ADJOINT_SLOTS, rows // max(4 * dq_width, 1)))
    most = min(TARGET_PROGRAMS // max(slots * groups, 1), columns // max(4 * dp_width, 1))
    chunks, chunk_columns = _split(columns, launch.blocks["COLUMNS"], most)
    some = matrix.rows[0]
    new = {"dtype": torch.float32, "device": some.device}
    dp = torch.empty(chunks, groups, rows, dp_width, **new)
    dq = torch.empty(slots, 2 * wanted.dq_phi + 2 * wanted.dq_theta, groups, columns, rank, **new)
    sums = torch.empty(2, slots * chunks * groups if wanted.sums else 0, **new)
    if slots and chunks:
        _run(
            adjoint_kernel, (slots, chunks, groups), some,
            some if dz is None else dz, some if sample_to is None else sample_to, *matrix.factors,
            some if mask is None else mask, some if weights is None else weights.contiguous(), dp, dq, sums,
            rows, columns, groups, first_row, *_row_strides(dz), *_row_strides(sample_to), *matrix.strides,
            _mask_stride(mask), slot_rows, chunk_columns, *scalars.arguments(some),
            RANK=rank, R=padded_rank(rank), HAS_MASK=mask is not None, HAS_DZ=dz is not None,
            SAMPLE=sample_to is not None, DIVERGENCE=weights is not None, DP_PHI=wanted.dp_phi,
            DP_THETA=wanted.dp_theta, DQ_PHI=wanted.dq_phi, DQ_THETA=wanted.dq_theta, SUMS=wanted.sums,
            **launch.blocks, **launch.options,
        )  # fmt: skip
    return Adjoints(_summed(dp), _summed(dq), sums.sum(dim=1) if wanted.sums else sums.new_empty(0))


def input_gradient(dy: Tensor | None, weight: Tensor | None, dp: Tensor, pairs: Pairs, dtype: torch.dtype) -> Tensor:
    """dx [G, T, K] = dy W0 + dp A in `dtype`; dp holds the first len(pairs.a) pairs. Without a weight: dp A alone."""
    groups, tokens, _ = dp.shape
    outputs, inputs = pairs.b[0].shape[-2], pairs.a[0].shape[-1]
    if weight is None:
        dy, weight, base = None, dp, False
    else:
        base = configurations.fused_base(dtype, groups * tokens, inputs, outputs)
    launch = configurations.input_gradient(base)
    if dy is not None and not base:
        dx = dy @ weight
    else:
        dx = torch.empty(groups, tokens, inputs, dtype=dtype, device=dp.device)
    if dx.numel():
        programs = _blocks(tokens, launch.blocks["ROWS"]) * _blocks(inputs, launch.blocks["COLUMNS"])
        _run(
            input_gradient_kernel, (programs, groups), dp,
            dp if dy is None else dy, weight, dp, *_padded(pairs.a), dx, tokens, outputs, inputs,
            *_row_strides(dy), weight.stride(0),
            PAIRS=len(pairs.a), RANK=pairs.rank, R=padded_rank(pairs.rank), BASE=base, HAS_DY=dy is not None,
            **launch.blocks, **launch.options,
        )  # fmt: skip
    return dx


def factor_gradient(dp: Tensor, x: Tensor, rank: int, first: int, count: int) -> Tensor:
    """dA [count, G, r, K] of `count` pairs of dp from the `first` on."""
    groups, tokens, inputs = x.shape
    launch = configurations.factor_gradient()
    column_blocks = _blocks(inputs, launch.blocks["COLUMNS"])
    chunks, chunk_rows = _split(tokens, launch.blocks["ROWS"], TARGET_PROGRAMS // max(column_blocks * groups, 1))
    da = torch.empty(chunks, count, groups, rank, inputs, dtype=torch.float32, device=x.device)
    if chunks:
        _run(
            factor_gradient_kernel, (column_blocks, chunks, groups), x,
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


def _row_strides(matrix: Tensor | None) -> tuple[int, int]:
    return (0, 0) if matrix is None else (matrix.stride(0), matrix.stride(1))


def _mask_stride(mask: Tensor | None) -> int:
    return 0 if mask is None else mask.stride(0)
