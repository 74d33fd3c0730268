"""Block sizes, warps and pipeline stages of each kernel: fixed, so that the same inputs give the same bits.

Chosen by what the compiler makes of them (`resources`): instructions an element, and in bf16 nothing spills at ranks up
to 16; shared memory fits every chip from compute capability 8.0 on. None was timed on a GPU yet.
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import NamedTuple

# Programs that keep every multiprocessor of a large GPU busy, and those that many can take. Not read off the device:
# how work is split decides the order of the sums.
FEWEST_PROGRAMS, SAMPLE_PROGRAMS, ADJOINT_PROGRAMS = 132, 512, 256
# Partial gradients of the column factors are copies of them, one a slot of rows.
ADJOINT_SLOTS = 16
# Bytes of partial results that need no limit.
SMALL_PARTIAL = 4 * 2**20
# Most parts of K in which p is made: all programs that sample read all of their rows' parts.
PROJECTION_PARTS = 24


@dataclass(frozen=True)
class Launch:
    """Block sizes by the kernel's own names, and how the compiler lays a program out."""

    blocks: dict[str, int]
    warps: int
    stages: int

    @property
    def options(self) -> dict[str, int | bool]:
        # fused multiply-add said out loud: Triton's default is about to change
        return {**self.blocks, "num_warps": self.warps, "num_stages": self.stages, "enable_fp_fusion": True}


def padded(size: int, least: int) -> int:
    """The size that a tile has: a power of two, and no smaller than a tensor core takes."""
    return max(least, 1 << (size - 1).bit_length())


def blocks(size: int, block: int) -> int:
    return -(-size // block)


def split(size: int, block: int, most: int) -> tuple[int, int]:
    """At most so many (at least one) equal parts of whole blocks: how many, and the blocks in each."""
    each = blocks(blocks(size, block), max(most, 1))
    return (blocks(blocks(size, block), each), each) if size else (0, 0)


def split_finely(size: int, block: int, fewest: int) -> tuple[int, int]:
    """At least so many parts, where there are as many blocks."""
    return split(size, block, blocks(blocks(size, block), max(blocks(size, block) // max(fewest, 1), 1)))


class Counts(NamedTuple):
    """How many groups there are, and rows of the longest and of all: the groups differ in size where that is less than
    all could have.
    """

    groups: int
    longest: int
    total: int

    @property
    def ragged(self) -> bool:
        return self.total < self.groups * self.longest

    def blocks(self, height: int) -> int:
        """Most blocks of rows with something in them; exact where the groups are equal."""
        return min(self.groups * blocks(self.longest, height), blocks(self.total, height) + self.groups - 1)


# A warp group's tensor cores take 64 rows at a time. Wider factors leave room for fewer in shared memory.
def _elementwise(rank: int) -> Launch:
    rows = {8: 64, 16: 64, 32: 32, 64: 16}[padded(rank, 8)]
    return Launch({"ROWS": rows, "COLUMNS": 32}, warps=4, stages=1)


_SMALL = Launch({"ROWS": 16, "COLUMNS": 32}, warps=2, stages=1)


def elementwise(rank: int, rows: Counts, columns: int) -> Launch:
    """Of the kernels that sample, and that differentiate samples: small tiles where large ones would be few."""
    launch = _elementwise(rank)
    if columns % launch.blocks["COLUMNS"]:  # masks take registers
        launch = replace(launch, blocks={**launch.blocks, "ROWS": min(launch.blocks["ROWS"], 32)})
    tiles = rows.blocks(launch.blocks["ROWS"]) * blocks(columns, launch.blocks["COLUMNS"])
    return _SMALL if tiles < FEWEST_PROGRAMS else launch


def project(width: int, tokens: Counts) -> Launch:
    """`width`: of all pairs' ranks."""
    few = tokens.blocks(64) * (PROJECTION_PARTS // 2) < FEWEST_PROGRAMS
    depth = {16: 64, 32: 64, 64: 64, 128: 32, 256: 16}[width]
    return Launch({"ROWS": 16 if few or width > 128 else 64, "DEPTH": depth}, warps=4, stages=3 if width <= 64 else 2)


def gradient(width: int) -> Launch:
    rows = {16: 128, 32: 128, 64: 64, 128: 32, 256: 16}[width]
    return Launch({"ROWS": rows, "COLUMNS": 32, "SUMMED": 1024}, warps=4, stages=2)
