"""How a launch's work is split into programs, worked out once for each shape: grids, parts, the compiler's options.

Fixed by the shapes and `configurations` alone, because the split decides the order of the sums. Grids have a place for
as many rows as the longest group's, for each; what a shorter one leaves free ends at once.
"""

from __future__ import annotations

from collections.abc import Callable
from functools import lru_cache
from math import prod
from typing import NamedTuple, TypeVar

from abmll.kernels.fused import configurations
from abmll.kernels.fused.configurations import Counts, blocks, padded, split, split_finely

Plan = TypeVar("Plan")
_PLANS = []


def _once(plan: Callable[..., Plan]) -> Callable[..., Plan]:
    """Decorator: a plan is made once for its arguments, of which a long run has many: numbers of rows vary."""
    cached = lru_cache(maxsize=4096)(plan)
    _PLANS.append(cached)
    return cached


def forget() -> None:
    """Plans are made anew: for configurations that were changed."""
    for plan in _PLANS:
        plan.cache_clear()


class Wanted(NamedTuple):
    """Which adjoints: of phi's and theta's row factors (dp) and column factors (dq)."""

    dp_phi: bool
    dp_theta: bool
    dq_phi: bool
    dq_theta: bool

    @property
    def row_pairs(self) -> int:
        return 2 * self.dp_phi + 2 * self.dp_theta

    @property
    def column_pairs(self) -> int:
        return 2 * self.dq_phi + 2 * self.dq_theta


class Project(NamedTuple):
    grid: tuple[int, int, int]
    parts: int
    part_depth: int
    options: dict[str, int | bool]


@_once
def project(rank: int, pairs: int, tokens: Counts, inputs: int) -> Project:
    """Of `project_kernel`: p [parts, T, pairs * r] from x [T, K]."""
    width = padded(pairs * rank, 16)
    launch = configurations.project(width, tokens)
    height, depth = launch.blocks["ROWS"], launch.blocks["DEPTH"]
    fewest = blocks(configurations.FEWEST_PROGRAMS, max(tokens.blocks(height), 1))
    parts, part_blocks = split_finely(inputs, depth, min(configurations.PROJECTION_PARTS, fewest))
    options = {"PAIRS": pairs, "RANK": rank, "W": width, "RAGGED": tokens.ragged, **launch.options}
    return Project((blocks(tokens.longest, height), parts, tokens.groups), parts, part_blocks * depth, options)


class Sample(NamedTuple):
    grid: tuple[int, int, int]
    programs: int
    chunk_tiles: int
    options: dict[str, int | bool]


@_once
def sample(rank: int, pairs: int, rows: Counts, columns: int, add: bool, keep: bool, sums: bool, mask: bool) -> Sample:
    """Of `sample_kernel`: a matrix of so many rows and columns."""
    launch, padded_rank = configurations.elementwise(rank, rows, columns), padded(rank, 8)
    height, width = launch.blocks["ROWS"], launch.blocks["COLUMNS"]
    chunks, chunk_tiles = split(columns, width, configurations.SAMPLE_PROGRAMS // max(rows.blocks(height), 1))
    options = {
        "RANK": rank,
        "R": padded_rank,
        "PAIRS": pairs,
        "EVEN": columns % width == 0 and rank == padded_rank,
        "RAGGED": rows.ragged,
        "ADD": add,
        "KEEP": keep,
        "SUMS": sums,
        "HAS_MASK": mask,
        **launch.options,
    }
    grid = blocks(rows.longest, height), chunks, rows.groups
    return Sample(grid, prod(grid), chunk_tiles, options)


class Adjoint(NamedTuple):
    grid: tuple[int, int, int]
    slot_rows: int
    chunk_tiles: int
    options: dict[str, int | bool]


@_once
def adjoint(
    rank: int,
    rows: Counts,
    columns: int,
    wanted: Wanted,
    exact: bool,
    mask: bool,
    dz: bool,
    sample: bool,
    kl: bool,
    prior: bool,
    sums: bool,
) -> Adjoint:
    """Of `adjoint_kernel`: slots of rows and chunks of columns for enough programs, and partial results of either that
    take at most half of what dz [rows, columns] does in 16 bits (or a few MB).
    """
    launch, padded_rank = configurations.elementwise(rank, rows, columns), padded(rank, 8)
    height, width = launch.blocks["ROWS"], launch.blocks["COLUMNS"]
    limit = max(rows.total * columns, configurations.SMALL_PARTIAL)
    of_slot = 4 * rank * max(wanted.column_pairs * rows.groups * columns, 1)
    of_chunk = 4 * rank * max(wanted.row_pairs * rows.total, 1)
    slots, slot_blocks = split(rows.longest, height, min(configurations.ADJOINT_SLOTS, limit // of_slot))
    filled = rows.blocks(slot_blocks * height) if slots else 1
    most = min(configurations.ADJOINT_PROGRAMS // filled, limit // of_chunk)
    chunks, chunk_tiles = split(columns, width, most)
    options = {
        "RANK": rank,
        "R": padded_rank,
        "EVEN": columns % width == 0 and rank == padded_rank,
        "RAGGED": rows.ragged,
        "EXACT": exact,
        "HAS_MASK": mask,
        "HAS_DZ": dz,
        "SAMPLE": sample,
        "DIVERGENCE": kl or prior,
        "KL": kl,
        "PRIOR": prior,
        "DP_PHI": wanted.dp_phi,
        "DP_THETA": wanted.dp_theta,
        "DQ_PHI": wanted.dq_phi,
        "DQ_THETA": wanted.dq_theta,
        "SUMS": sums,
        **launch.options,
    }
    return Adjoint((slots, chunks, rows.groups), slot_blocks * height, chunk_tiles, options)


class Gradient(NamedTuple):
    grid: tuple[int, int]
    column_blocks: int
    options: dict[str, int | bool]


@_once
def gradient(
    rank: int, pairs: int, rows: Counts, inputs: int, first: int, count: int, need_x: bool, summed: int
) -> Gradient:
    """Of `gradient_kernel`: blocks of K, and behind them blocks of the `summed` numbers of dq."""
    width = padded(pairs * rank, 16)
    launch = configurations.gradient(width)
    column_blocks = blocks(inputs, launch.blocks["COLUMNS"]) if need_x or count else 0
    behind = blocks(blocks(summed, launch.blocks["SUMMED"]), rows.groups)
    options = {
        "PAIRS": pairs,
        "FIRST": first,
        "COUNT": count,
        "RANK": rank,
        "W": width,
        "OWN": padded(max(count, 1) * rank, 16),
        "DX": need_x,
        "RAGGED": rows.ragged,
        **launch.options,
    }
    return Gradient((column_blocks + behind, rows.groups), column_blocks, options)
