"""Block sizes, warps and pipeline stages of each kernel: fixed, so that the same inputs give the same bits.

Chosen by what the compiler makes of them (`resources`): in bf16 nothing spills at ranks up to 16, and shared memory
fits every chip from compute capability 8.0 on. None was timed on a GPU yet.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch

# Partial results of the backward pass are split over rows until about so many programs run: enough for any GPU at
# hand, and independent of it, because the split decides the order of the sums.
TARGET_PROGRAMS = 256
# Partial gradients of the column factors are copies of them, one a slot of rows.
ADJOINT_SLOTS = 16
# The sum over K that makes p is split too: a program that walks all of K alone would last longer than a tile of y.
PROJECTION_PARTS = 8
# Fewer tiles of W0's product than this leave most of a large GPU idle; the library splits K instead.
MINIMUM_TILES = 128


@dataclass(frozen=True)
class Launch:
    """Block sizes by the kernel's own names, and how the compiler lays a program out."""

    blocks: dict[str, int]
    warps: int
    stages: int

    @property
    def options(self) -> dict[str, int | bool]:
        # fused multiply-add said out loud: Triton's default is about to change
        return {"num_warps": self.warps, "num_stages": self.stages, "enable_fp_fusion": True}


def padded_rank(rank: int) -> int:
    """The rank that tiles have: a power of two, and at least 16 for tensor cores."""
    return max(16, 1 << (rank - 1).bit_length())


def fused_base(dtype: torch.dtype, rows: int, columns: int, depth: int) -> bool:
    """Whether W0's product, [rows, depth] times [depth, columns], runs in the same launch as the pairs'.

    The library's are fp32, which has no tensor cores, rows that vector loads cannot take, and few tiles.
    """
    tiles = -(-rows // 128) * -(-columns // 128)
    return dtype != torch.float32 and columns % 16 == 0 and depth % 16 == 0 and tiles >= MINIMUM_TILES


def forward(base: bool, rank: int) -> Launch:
    if base:
        depth = 64 if padded_rank(rank) < 64 else 32
        return Launch({"ROWS": 128, "COLUMNS": 128, "DEPTH": depth, "BAND": 8, "P_ROWS": 64}, warps=8, stages=3)
    return Launch({"ROWS": 32, "COLUMNS": 32, "DEPTH": 32, "BAND": 8, "P_ROWS": 32}, warps=4, stages=2)


def input_gradient(base: bool) -> Launch:
    if base:
        return Launch({"ROWS": 128, "COLUMNS": 128, "DEPTH": 64, "BAND": 8}, warps=8, stages=3)
    return Launch({"ROWS": 64, "COLUMNS": 64, "DEPTH": 32, "BAND": 8}, warps=4, stages=2)


def factor_gradient() -> Launch:
    return Launch({"ROWS": 64, "COLUMNS": 64}, warps=4, stages=2)


def sample() -> Launch:
    return Launch({"ROWS": 32, "COLUMNS": 64}, warps=4, stages=1)


def adjoint(rank: int) -> Launch:
    # two chained products spread all warps along the rows: 16 rows a warp, or work is done twice
    warps = {16: 4, 32: 2, 64: 1}[padded_rank(rank)]
    return Launch({"ROWS": 16 * warps, "COLUMNS": 16}, warps=warps, stages=1)
