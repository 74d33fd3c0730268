"""From tensors to kernel launches: allocates outputs, picks grids, passes strides. No sum is left to other launches.

Shapes throughout: x [T, K], y and dz [T, N], the rows of all groups one after another, as `Stretches` says (also with
more dimensions in place of T, if rows are as far apart as `stride(-2)`); factors a [r, K] or [G, r, K], b [N, r] or
[G, N, r], contiguous and fp32. `Factors` of two pairs are phi's alone. Nothing here builds a graph.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from contextlib import nullcontext
from functools import lru_cache
from typing import NamedTuple

import torch
from torch import Tensor

from abmll.kernels.backends import on_gpu
from abmll.kernels.fused import plans
from abmll.kernels.fused.configurations import ADJOINT_SLOTS, Counts
from abmll.kernels.fused.gaussian import adjoint_kernel, sample_kernel
from abmll.kernels.fused.plans import Wanted
from abmll.kernels.fused.products import gradient_kernel, project_kernel

_FP32 = torch.float32


class Factors(NamedTuple):
    """One factor of each pair, phi's two (with or without a group) and theta's (absent: two): of all, or of a band."""

    tensors: Sequence[Tensor]
    rank: int
    lead: tuple[int, ...] = ()  # (G,) where phi's have a group each

    @property
    def pointers(self) -> tuple[Tensor, Tensor, Tensor, Tensor]:
        """Four whatever the number of pairs: the first stands in for those that are not read."""
        first, second = self.tensors[:2]
        return (first, second, *(self.tensors[2:] or (first, first)))

    @property
    def shape(self) -> tuple[int, ...]:
        """Of one pair's gradient: each group's, also where they share the factor."""
        return (*self.lead, *self.tensors[0].shape[-2:])

    def strides(self, long: int) -> tuple[int, int, int]:
        """By group (phi's), along the long axis (a dimension: -2 of b, -1 of a) and along the rank."""
        first = self.tensors[0]
        return first.stride(0) if first.dim() == 3 else 0, first.stride(long), first.stride(-3 - long)


class Stretches(NamedTuple):
    """Which rows are whose: counts; bounds int32 [G + 1], where each group begins and the last ends, if they differ."""

    counts: Counts
    bounds: Tensor | None = None

    @staticmethod
    @lru_cache(maxsize=1024)
    def equal(groups: int, total: int) -> Stretches:
        return Stretches(Counts(groups, total // groups, total))

    @classmethod
    def of(cls, total: int, groups: int, sizes: Sequence[int] | None, bounds: Tensor | None) -> Stretches:
        """Of `total` rows; by sizes and bounds as in `kernels.Groups`, or as many for each group."""
        if sizes is None or max(sizes) * groups == total:
            return cls.equal(groups, total)
        return cls(Counts(groups, max(sizes), total), bounds)


class Scalars(NamedTuple):
    """`PosteriorSettings`, then what names the noise (None: none is drawn): rows [G, 3] of `NoiseKey.rows`, a layer."""

    settings: Sequence[float]
    names: Tensor | None = None
    layer: int = 0

    @property
    def numbers(self) -> tuple[float, ...]:
        """The settings, the offset c as exp(c / 2): added to a log-variance it would cost half of fp32's digits."""
        scaling, low_scaling, offset, prior_shape, prior_rate = self.settings
        return scaling, low_scaling, offset, math.exp(0.5 * offset), prior_shape, prior_rate


class Sums(NamedTuple):
    """KL and -log prior on the device, numbers or [G]."""

    kl: Tensor
    negative_log_prior: Tensor

    @classmethod
    def new(cls, lead: Sequence[int], device: torch.device) -> Sums:
        """For a launch to write to."""
        return cls(torch.empty(lead, dtype=_FP32, device=device), torch.empty(lead, dtype=_FP32, device=device))


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
    return new((1 + ADJOINT_SLOTS) * groups, dtype=torch.int32, device=device)


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


def project(x: Tensor, a: Factors, stretches: Stretches, tickets: Tensor) -> Tensor:
    """p = A x of all pairs in parts to be summed, fp32 [parts, T, pairs * r]; clears the tickets."""
    counts, bounds = stretches
    pairs, inputs = len(a.tensors), x.shape[-1]
    grid, parts, part_depth, options = plans.project(a.rank, pairs, counts, inputs)
    p = torch.empty(parts, counts.total, pairs * a.rank, dtype=_FP32, device=x.device)
    if counts.total:
        _run(
            project_kernel, grid, x,
            x, *a.pointers, p, tickets, x if bounds is None else bounds, counts.longest, counts.total, inputs,
            x.stride(-2), part_depth, tickets.shape[0],
            **options,
        )  # fmt: skip
    return p


class Rows(NamedTuple):
    """The row factors of a Gaussian matrix: pointers of four pairs; strides by row, by which row of the groups before
    theta's go on, and by pair; their parts, whose sum they are, and the stride by part.
    """

    pointers: tuple[Tensor, Tensor, Tensor, Tensor]
    strides: tuple[int, int, int]
    parts: tuple[int, int] = (1, 0)

    @classmethod
    def of_projections(cls, p: Tensor, rank: int) -> Rows:
        """Of an activation: p [parts, T, pairs * r] or [T, pairs * r]."""
        row = p.stride(-2)
        return cls((p, p, p, p), (row, row, rank), (1, 0) if p.dim() == 2 else (p.shape[0], p.stride(0)))

    @classmethod
    def of_weights(cls, b: Factors) -> Rows:
        """Theta's are shared by all groups."""
        return cls(b.pointers, (b.tensors[0].stride(-2), 0, 0))


class Columns(NamedTuple):
    """The column factors of a Gaussian matrix, and their strides by group (phi's), column and rank."""

    factors: Factors
    strides: tuple[int, int, int]

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
    stretches: Stretches,
    mask: Tensor | None,
    scalars: Scalars,
    tickets: Tensor,
    add: bool,
    sums: Sums | None,
    keep: Tensor | None = None,
    first_row: int = 0,
) -> None:
    """Draw the matrix: add it to y [T, N] in place, or write it there. `sums`, if any, are written; `keep`
    [T, pairs * r] takes the row factors' sums over their parts.
    """
    (counts, bounds), factors, width = stretches, columns.factors, y.shape[-1]
    masked, kept, with_sums = mask is not None, keep is not None, sums is not None
    grid, programs, chunk_tiles, options = plans.sample(
        factors.rank, len(factors.tensors), counts, width, add, kept, with_sums, masked
    )
    kl, prior, partial = (*sums, _partial_sums(sums, programs)) if with_sums else (y, y, y)
    if counts.total:
        _run(
            sample_kernel, grid, y,
            y, *rows.pointers, *factors.pointers, keep if kept else y, mask if masked else y,
            scalars.names, partial, kl, prior, tickets, y if bounds is None else bounds,
            counts.longest, width, first_row, y.stride(-2), *rows.strides, *rows.parts, *columns.strides, chunk_tiles,
            scalars.layer, *scalars.numbers,
            **options,
        )  # fmt: skip


def _partial_sums(sums: Sums, programs: int) -> Tensor:
    """Memory for the programs' parts of the sums, which are zero where there is no program."""
    if not programs:
        for total in sums:
            total.zero_()
    return torch.empty(2, programs, dtype=_FP32, device=sums.kl.device)


def adjoint(
    rows: Rows,
    columns: Columns,
    stretches: Stretches,
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
    sums: Sums | None = None,
    sample_to: Tensor | None = None,
    first_row: int = 0,
) -> Tensor:
    """Adjoints of the factors of a matrix [T, N], N = `width`: dq [slots, pairs wanted, G, long axis and rank as in the
    column factors], to be summed over the slots. Without a G where phi's factors have none.

    dz [T, N]; dkl, dprior: gradients of the sums of KL and -log prior, numbers or [G] with any stride. dp
    [pairs wanted, T, r], with unit stride along the rank, takes the row factors' adjoints. `sums`, if any, are written.
    With `sample_to` [T, N] (and dz) the sample is drawn again beside: one generation of the noise serves both. `exact`:
    see the kernel.
    """
    if wanted.dq_theta and dz is not None:
        # theta's adjoints do not depend on dz, and all four pairs' at once would not fit the registers
        first = 2 * wanted.dp_phi
        shape, arguments = (rows, columns, stretches, width), (dkl, dprior, mask, scalars, tickets)
        own = Wanted(False, wanted.dp_theta, False, True)
        theta = adjoint(*shape, None, *arguments, own, dp[first:], exact, sums)
        if not (wanted.dp_phi or wanted.dq_phi or sample_to is not None):
            return theta
        own = Wanted(wanted.dp_phi, False, wanted.dq_phi, False)
        phi = adjoint(*shape, dz, *arguments, own, dp[:first], exact, None, sample_to, first_row)
        return torch.cat([found.sum(dim=0, keepdim=True) for found in (phi, theta)], dim=1)
    (counts, bounds), factors = stretches, columns.factors
    grid, slot_rows, chunk_tiles, options = plans.adjoint(
        factors.rank, counts, width, wanted, exact, mask is not None, dz is not None, sample_to is not None,
        dkl is not None, dprior is not None, sums is not None,
    )  # fmt: skip
    slots, chunks, groups = grid
    some = factors.tensors[0]
    dq = torch.empty(slots, wanted.column_pairs, *factors.shape, dtype=_FP32, device=dp.device)
    partial = torch.empty(chunks, counts.total, wanted.row_pairs * factors.rank, dtype=_FP32, device=dp.device)
    kl, prior, parts_of_sums = (some,) * 3 if sums is None else (*sums, _partial_sums(sums, slots * chunks * groups))
    if counts.total:
        dp_pair, dp_row, _ = dp.stride()
        _run(
            adjoint_kernel, grid, some,
            some if dz is None else dz, some if sample_to is None else sample_to, *rows.pointers,
            *factors.pointers, some if mask is None else mask,
            some if scalars.names is None else scalars.names, some if dkl is None else dkl,
            some if dprior is None else dprior, partial, dp, dq, parts_of_sums, kl, prior, tickets,
            some if bounds is None else bounds,
            counts.longest, counts.total, width, first_row, 0 if dz is None else dz.stride(-2),
            0 if sample_to is None else sample_to.stride(-2), *rows.strides, *columns.strides,
            _group_stride(dkl), _group_stride(dprior), slot_rows, chunk_tiles, dp_pair, dp_row,
            scalars.layer, *scalars.numbers,
            **options,
        )  # fmt: skip
    return dq


def _group_stride(upstream: Tensor | None) -> int:
    """From one group's number to the next one's; none where one number is all groups'."""
    return upstream.stride(0) if upstream is not None and upstream.dim() else 0


def gradients(
    dp: Tensor, x: Tensor, a: Factors, stretches: Stretches, dq: Tensor | None, first: int, count: int, need_x: bool
) -> tuple[Tensor | None, Tensor, Tensor]:
    """(dx without the base product's part, dA of `count` pairs from the `first` on, dB = the sum of dq's slots).

    dp [pairs, T, r] of as many pairs as `a` has, side by side in memory ([T, pairs * r]); dx as x; dA [count, G, r, K],
    without a G as dq.
    """
    (counts, bounds), inputs = stretches, x.shape[-1]
    da = torch.empty(count, *a.shape, dtype=_FP32, device=x.device)
    dx = torch.empty(x.shape, dtype=x.dtype, device=x.device) if need_x else None
    slots, size, db = 0, 0, da
    if dq is not None:
        slots = dq.shape[0]
        db = dq[0] if slots == 1 else torch.empty(dq.shape[1:], dtype=_FP32, device=x.device)
        size = 0 if slots == 1 else db.numel()
    grid, column_blocks, options = plans.gradient(a.rank, len(a.tensors), counts, inputs, first, count, need_x, size)
    if grid[0]:
        _run(
            gradient_kernel, grid, x,
            dp, x, *a.pointers, x if dx is None else dx, da, dq if size else da, db, x if bounds is None else bounds,
            counts.longest, inputs, x.stride(-2), a.strides(-1)[0], column_blocks, size, slots,
            **options,
        )  # fmt: skip
    return dx, da, db
