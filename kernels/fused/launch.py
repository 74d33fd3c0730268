"""From tensors to kernel launches: allocates outputs, picks grids, passes strides. No sum is left to other launches.

Shapes throughout: x [G, T, K], y and dz [G, M, N], factors a [r, K] or [G, r, K], b [N, r] or [G, N, r], contiguous and
fp32. `Factors` of two pairs are phi's alone. Nothing here builds a graph.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from contextlib import nullcontext
from typing import NamedTuple

import torch
from torch import Tensor

from abmll.kernels.backends import on_gpu
from abmll.kernels.fused import plans
from abmll.kernels.fused.configurations import ADJOINT_SLOTS
from abmll.kernels.fused.gaussian import adjoint_kernel, sample_kernel
from abmll.kernels.fused.plans import Wanted
from abmll.kernels.fused.products import gradient_kernel, project_kernel

_FP32 = torch.float32


class Factors(NamedTuple):
    """One factor of each pair, phi's two (with or without a group) and theta's (absent: two): of all, or of a band."""

    tensors: Sequence[Tensor]
    rank: int

    @property
    def pointers(self) -> tuple[Tensor, Tensor, Tensor, Tensor]:
        """Four whatever the number of pairs: the first stands in for those that are not read."""
        first, second = self.tensors[:2]
        return (first, second, *(self.tensors[2:] or (first, first)))

    def strides(self, long: int) -> tuple[int, int, int, int]:
        """By group (phi's, theta's), along the long axis (a dimension: -2 of b, -1 of a) and along the rank."""
        first = self.tensors[0]
        return first.stride(0) if first.dim() == 3 else 0, 0, first.stride(long), first.stride(-3 - long)


class Scalars(NamedTuple):
    """`PosteriorSettings`, then what names the noise (None: none is drawn): rows [G, 3] of `NoiseKey.rows`, a layer."""

    settings: Sequence[float]
    names: Tensor | None = None
    layer: int = 0

    @property
    def numbers(self) -> tuple[float, ...]:
        """The settings, the offset c as exp(c / 2): added to a log-variance it would cost half of fp32's digits."""
        scaling, offset, prior_shape, prior_rate = self.settings
        return scaling, offset, math.exp(0.5 * offset), prior_shape, prior_rate


class Sums(NamedTuple):
    """KL and -log prior, two scalars on the device."""

    kl: Tensor
    negative_log_prior: Tensor


# Set by `dry_run` alone: launches allocate their outputs and run nothing.
dry = False


def _run(kernel, grid: tuple[int, ...], near: Tensor, *arguments, **options) -> None:
    """kernel[grid](*arguments, **options) on the device of `near`."""
    if not dry:
        other = near.is_cuda and near.device.index != torch.cuda.current_device()
        with torch.cuda.device(near.device) if other else nullcontext():
            kernel[grid](*arguments, **options)


def new_tickets(groups: int, device: torch.device, cleared: bool = False) -> Tensor:
    """Tickets for one projection's kernels: zero, or to be cleared by `project`."""
    new = torch.zeros if cleared else torch.empty
    return new(1 + ADJOINT_SLOTS * groups, dtype=torch.int32, device=device)


def wide_product(a: Tensor, b: Tensor, before: Tensor | None = None) -> Tensor:
    """`before` + a [M, K] b [K, N] in fp32, whatever the operands' dtype: a library call."""
    if not on_gpu(a) or _FP32 in (a.dtype, b.dtype):
        product = a.float() @ b.float()
        return product if before is None else before.add_(product)
    if dry:  # there is no such product on a CPU
        return a.new_empty(a.shape[0], b.shape[1], dtype=_FP32)
    if before is None:
        return torch.mm(a, b, out_dtype=_FP32)
    return torch.addmm(before, a, b, out_dtype=_FP32)


def rows_contiguous(x: Tensor) -> Tensor:
    """x with unit stride along its last dimension: rows may be anywhere, elements of a row may not."""
    return x if x.stride(-1) == 1 or x.shape[-1] == 1 else x.contiguous()


def project(x: Tensor, a: Factors, tickets: Tensor) -> Tensor:
    """p = A x of all pairs in parts to be summed, fp32 [parts, G, T, pairs * r]; clears the tickets."""
    groups, tokens, inputs = x.shape
    pairs = len(a.tensors)
    grid, parts, part_depth, options = plans.project(a.rank, pairs, groups, tokens, inputs)
    p = torch.empty(parts, groups, tokens, pairs * a.rank, dtype=_FP32, device=x.device)
    if tokens:
        x_group, x_row, _ = x.stride()
        _run(
            project_kernel, grid, x,
            x, *a.pointers, p, tickets, tokens, inputs, groups, x_group, x_row, part_depth, tickets.shape[0],
            **options,
        )  # fmt: skip
    return p


class Rows(NamedTuple):
    """The row factors of a Gaussian matrix: pointers of four pairs; their parts, whose sum they are; strides by part,
    group (phi's, theta's), row and pair.
    """

    pointers: tuple[Tensor, Tensor, Tensor, Tensor]
    parts: int
    strides: tuple[int, int, int, int, int]

    @classmethod
    def of_projections(cls, p: Tensor, rank: int) -> Rows:
        """Of an activation: p [parts, G, T, pairs * r] or [G, T, pairs * r]."""
        part, group, row = (0, *p.stride()[:2]) if p.dim() == 3 else p.stride()[:3]
        return cls((p, p, p, p), 1 if p.dim() == 3 else p.shape[0], (part, group, group, row, rank))

    @classmethod
    def of_weights(cls, b: Factors) -> Rows:
        group, shared, row, _ = b.strides(-2)
        return cls(b.pointers, 1, (0, group, shared, row, 0))


class Columns(NamedTuple):
    """The column factors of a Gaussian matrix, and their strides by group (phi's, theta's), column and rank."""

    factors: Factors
    strides: tuple[int, int, int, int]

    @classmethod
    def of_activations(cls, b: Factors) -> Columns:
        return cls(b, b.strides(-2))

    @classmethod
    def of_weights(cls, a: Factors) -> Columns:
        return cls(a, a.strides(-1))


def sample(
    rows: Rows,
    columns: Columns,
    y: Tensor,
    mask: Tensor | None,
    scalars: Scalars,
    tickets: Tensor,
    add: bool,
    with_sums: bool,
    keep: Tensor | None = None,
    first_row: int = 0,
) -> Sums | None:
    """Draw the matrix: add it to y [G, M, N] in place, or write it there. `keep` [G, M, pairs * r] takes the row
    factors' sums over their parts.
    """
    groups, size, width = y.shape
    factors = columns.factors
    masked, kept = mask is not None, keep is not None
    grid, programs, chunk_tiles, options = plans.sample(
        factors.rank, len(factors.tensors), groups, size, width, add, kept, with_sums, masked
    )
    sums, partial = _sums(y, programs) if with_sums else (None, y)
    if size:
        kl, prior = sums or (y, y)
        (part, group, shared, row, pair), (y_group, y_row, _) = rows.strides, y.stride()
        _run(
            sample_kernel, grid, y,
            y, *rows.pointers, *factors.pointers, keep if kept else y, mask if masked else y,
            scalars.names, partial, kl, prior, tickets,
            size, width, first_row, y_group, y_row, group, shared, row, pair, rows.parts, part,
            *columns.strides, mask.stride(0) if masked else 0, chunk_tiles, scalars.layer, *scalars.numbers,
            **options,
        )  # fmt: skip
    return sums


def _sums(near: Tensor, programs: int) -> tuple[Sums, Tensor]:
    """The two sums and the programs' parts of them; zero where no program runs."""
    new = torch.empty if programs else torch.zeros
    kl, prior = (new((), dtype=_FP32, device=near.device) for _ in range(2))
    return Sums(kl, prior), torch.empty(2, programs, dtype=_FP32, device=near.device)


class Adjoints(NamedTuple):
    """dq [slots, pairs, G, long axis and rank as in the factors]: to be summed over the slots. Without a G where phi's
    factors have none.
    """

    dq: Tensor
    sums: Sums | None


def adjoint(
    rows: Rows,
    columns: Columns,
    width: int,
    dz: Tensor | None,
    dkl: Tensor | None,
    dprior: Tensor | None,
    mask: Tensor | None,
    scalars: Scalars,
    tickets: Tensor,
    wanted: Wanted,
    dp: Tensor,
    exact: bool,
    sample_to: Tensor | None = None,
    first_row: int = 0,
) -> Adjoints:
    """Adjoints of the factors of a matrix [G, M, N], N = `width`.

    dz [G, M, N]; dkl, dprior: gradients of the sums of KL and -log prior. dp [pairs wanted, G, M, r], with unit stride
    along the rank, takes the row factors' adjoints; without pairs its shape counts. With `sample_to` [G, M, N] (and dz)
    the sample is drawn again beside: one generation of the noise serves both. `exact`: see the kernel.
    """
    if wanted.dq_theta and dz is not None:
        # theta's adjoints do not depend on dz, and all four pairs' at once would not fit the registers
        first = 2 * wanted.dp_phi
        arguments = (dkl, dprior, mask, scalars, tickets)
        own = Wanted(False, wanted.dp_theta, False, True, wanted.sums)
        theta = adjoint(rows, columns, width, None, *arguments, own, dp[first:], exact)
        if not (wanted.dp_phi or wanted.dq_phi or sample_to is not None):
            return theta
        own = Wanted(wanted.dp_phi, False, wanted.dq_phi, False)
        phi = adjoint(rows, columns, width, dz, *arguments, own, dp[:first], exact, sample_to, first_row)
        slots = [found.dq.sum(dim=0, keepdim=True) for found in (phi, theta)]
        return Adjoints(torch.cat(slots, dim=1), theta.sums)
    _, groups, size, rank = dp.shape
    grid, slot_rows, chunk_tiles, options = plans.adjoint(
        rank, groups, size, width, wanted, exact, mask is not None, dz is not None, sample_to is not None,
        dkl is not None, dprior is not None,
    )  # fmt: skip
    slots, chunks, _ = grid
    some = columns.factors.tensors[0]
    shape = _of_groups(some, groups)
    dq = torch.empty(slots, wanted.column_pairs, *shape, dtype=_FP32, device=dp.device)
    partial = torch.empty(chunks, groups, size, wanted.row_pairs * rank, dtype=_FP32, device=dp.device)
    sums, parts_of_sums = _sums(some, slots * chunks * groups) if wanted.sums else (None, some)
    if size:
        kl, prior = sums or (some, some)
        (_, group, shared, row, pair), (dp_pair, dp_group, dp_row, _) = rows.strides, dp.stride()
        _run(
            adjoint_kernel, grid, some,
            some if dz is None else dz, some if sample_to is None else sample_to, *rows.pointers,
            *columns.factors.pointers, some if mask is None else mask,
            some if scalars.names is None else scalars.names, some if dkl is None else dkl,
            some if dprior is None else dprior, partial, dp, dq, parts_of_sums, kl, prior, tickets,
            size, width, groups, first_row, *_row_strides(dz), *_row_strides(sample_to), group, shared, row, pair,
            *columns.strides, 0 if mask is None else mask.stride(0), slot_rows, chunk_tiles,
            dp_group, dp_pair, dp_row, scalars.layer, *scalars.numbers,
            **options,
        )  # fmt: skip
    return Adjoints(dq, sums)


def gradients(
    dp: Tensor, x: Tensor, a: Factors, dq: Tensor | None, first: int, count: int, need_x: bool
) -> tuple[Tensor | None, Tensor, Tensor]:
    """(dx without the base product's part, dA of `count` pairs from the `first` on, dB = the sum of dq's slots).

    dp [pairs, G, T, r] of as many pairs as `a` has, side by side in memory ([G, T, pairs * r]); dx [G, T, K] in x's
    dtype; dA [count, G, r, K], without a G as dq.
    """
    groups, tokens, inputs = x.shape
    da = torch.empty(count, *_of_groups(a.tensors[0], groups), dtype=_FP32, device=x.device)
    dx = torch.empty(groups, tokens, inputs, dtype=x.dtype, device=x.device) if need_x else None
    slots, size, db = 0, 0, da
    if dq is not None:
        slots = dq.shape[0]
        db = dq[0] if slots == 1 else torch.empty(dq.shape[1:], dtype=_FP32, device=x.device)
        size = 0 if slots == 1 else db.numel()
    grid, column_blocks, options = plans.gradient(a.rank, len(a.tensors), groups, inputs, first, count, need_x, size)
    if grid[0]:
        x_group, x_row, _ = x.stride()
        _run(
            gradient_kernel, grid, x,
            dp, x, *a.pointers, x if dx is None else dx, da, dq if size else da, db,
            tokens, inputs, groups, x_group, x_row, a.strides(-1)[0], column_blocks, size, slots,
            **options,
        )  # fmt: skip
    return dx, da, db


def _of_groups(factor: Tensor, groups: int) -> Sequence[int]:
    """The shape of a factor's gradients: one for each group, also where the groups share the factor."""
    return factor.shape if factor.dim() == 3 or groups == 1 else (groups, *factor.shape)


def _row_strides(matrix: Tensor | None) -> tuple[int, int]:
    return (0, 0) if matrix is None else (matrix.stride(0), matrix.stride(1))
