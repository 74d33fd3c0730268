"""How a launch's work is split into programs, worked out once for each shape: grids, parts, the compiler's options.

Fixed by the shapes and `configurations` alone, because the split decides the order of the sums.
"""

from __future__ import annotations

from collections.abc import Callable
from functools import cache
from typing import NamedTuple, TypeVar

from abmll.kernels.fused import configurations
from abmll.kernels.fused.configurations import blocks, padded, split, split_finely

Plan = TypeVar("Plan")
_PLANS = []


def _once(plan: Callable[..., Plan]) -> Callable[..., Plan]:
    """Decorator: a plan is made once for its arguments."""
    cached = cache(plan)
    _PLANS.append(cached)
    return cached


def forget() -> None:
    """Plans are made anew: for configurations that were changed."""
    for plan in _PLANS:
        plan.cache_clear()


class Wanted(NamedTuple):
    """Which adjoints: of phi's and theta's row factors (dp) and column factors (dq), and the sums of KL and prior."""

    dp_phi: bool
    dp_theta: bool
    dq_phi: bool
    dq_theta: bool
    sums: bool = False

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
def project(rank: int, pairs: int, groups: int, tokens: int, inputs: int) -> Project:
    """Of `project_kernel`: p [parts, G, T, pairs * r] from x [G, T, K]."""
    width = padded(pairs * rank, 16)
    launch = configurations.project(width, tokens, groups)
    depth = launch.blocks["DEPTH"]
    row_blocks = blocks(tokens, launch.blocks["ROWS"])
    fewest = blocks(configurations.FEWEST_PROGRAMS, max(row_blocks * groups, 1))
    parts, part_blocks = split_finely(inputs, depth, min(configurations.PROJECTION_PARTS, fewest))
    options = {"PAIRS": pairs, "RANK": rank, "W": width, **launch.options}
    return Project((row_blocks, parts, groups), parts, part_blocks * depth, options)


class Sample(NamedTuple):
    grid: tuple[int, int, int]
    programs: int
    chunk_tiles: int
    options: dict[str, int | bool]


@_once
def sample(
    rank: int, pairs: int, groups: int, rows: int, columns: int, add: bool, keep: bool, sums: bool, mask: bool
) -> Sample:
    """Of `sample_kernel`: a matrix [G, rows, columns]."""
    launch, padded_rank = configurations.elementwise(rank, rows, columns, groups), padded(rank, 8)
    row_blocks, width = blocks(rows, launch.blocks["ROWS"]), launch.blocks["COLUMNS"]
    chunks, chunk_tiles = split(columns, width, configurations.SAMPLE_PROGRAMS // max(row_blocks * groups, 1))
    options = {
        "RANK": rank,
        "R": padded_rank,
        "PAIRS": pairs,
        "EVEN": columns % width == 0 and rank == padded_rank,
        "ADD": add,
        "KEEP": keep,
        "SUMS": sums,
        "HAS_MASK": mask,
        **launch.options,
    }
    return Sample((row_blocks, chunks, groups), row_blocks * chunks * groups, chunk_tiles, options)


class Adjoint(NamedTuple):
    grid: tuple[int, int, int]
    slot_rows: int
    chunk_tiles: int
    options: dict[str, int | bool]


@_once
def adjoint(
    rank: int,
    groups: int,
    rows: int,
    columns: int,
    wanted: Wanted,
    exact: bool,
    mask: bool,
    dz: bool,
    sample: bool,
    kl: bool,
    prior: bool,
) -> Adjoint:
    """Of `adjoint_kernel`: slots of rows and chunks of columns for enough programs, and partial results of either that
    take at most half of what dz [G, rows, columns] does in 16 bits (or a few MB).
    """
    launch, padded_rank = configurations.elementwise(rank, rows, columns, groups), padded(rank, 8)
    height, width = launch.blocks["ROWS"], launch.blocks["COLUMNS"]
    limit = max(groups * rows * columns, configurations.SMALL_PARTIAL)
    of_slot, of_chunk = (
        4 * rank * groups * max(numbers, 1) for numbers in (wanted.column_pairs * columns, wanted.row_pairs * rows)
    )
    slots, slot_blocks = split(rows, height, min(configurations.ADJOINT_SLOTS, limit // of_slot))
    most = min(configurations.ADJOINT_PROGRAMS // max(slots * groups, 1), limit // of_chunk)
    chunks, chunk_tiles = split(columns, width, most)
    options = {
        "RANK": rank,
        "R": padded_rank,
        "EVEN": columns % width == 0 and rank == padded_rank,
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
        "SUMS": wanted.sums,
        **launch.options,
    }
    return Adjoint((slots, chunks, groups), slot_blocks * height, chunk_tiles, options)


class Gradient(NamedTuple):
    grid: tuple[int, int]
    column_blocks: int
    options: dict[str, int | bool]


@_once
def gradient(
    rank: int, pairs: int, groups: int, inputs: int, first: int, count: int, need_x: bool, summed: int
) -> Gradient:
    """Of `gradient_kernel`: blocks of K, and behind them blocks of the `summed` numbers of dq."""
    width = padded(pairs * rank, 16)
    launch = configurations.gradient(width)
    column_blocks = blocks(inputs, launch.blocks["COLUMNS"]) if need_x or count else 0
    behind = blocks(blocks(summed, launch.blocks["SUMMED"]), groups)
    options = {
        "PAIRS": pairs,
        "FIRST": first,
        "COUNT": count,
        "RANK": rank,
        "W": width,
        "OWN": padded(max(count, 1) * rank, 16),
        "DX": need_x,
        **launch.options,
    }
    return Gradient((column_blocks + behind, groups), column_blocks, options)
