"""Block sizes, warps and pipeline stages of each kernel: fixed, so that the same inputs give the same bits.

Chosen so that nothing spills for sm_80 and sm_90 (`resources` reads it off the compiled code) and tiles fill whole
waves of a large GPU at a thousand tokens.
"""

from __future__ import annotations

from dataclasses import dataclass, field

import torch

# Partial results of the backward pass are split over rows until about so many programs run: enough for any GPU at
# hand, and independent of it, because the split decides the order of the sums.
TARGET_PROGRAMS = 256
# Partial gradients of B are T / rows-of-a-slot copies of it: few enough to stay below the size of dx.
ADJOINT_SLOTS = 16
# The weight posterior's dense tiles, a band of rows of N x K, live in this much memory, whatever the layer's size.
SCRATCH_BYTES = 32 * 2**20


@dataclass(frozen=True)
class Launch:
    """Block sizes by the kernel's own names, and how the compiler lays a program out."""

    blocks: dict[str, int] = field(hash=False)
    warps: int
    stages: int

    @property
    def options(self) -> dict[str, int | bool]:
        # fused multiply-add said out loud: Triton's default is about to change
        return {"num_warps": self.warps, "num_stages": self.stages, "enable_fp_fusion": True}


def padded_rank(rank: int) -> int:
    """The rank that tiles have: a power of two, and at least 16 for tensor cores."""
    return max(16, 1 << (rank - 1).bit_length())


def fused_base(dtype: torch.dtype, outputs: int, inputs: int) -> bool:
    """Whether W0's product [outputs, inputs] runs in the same launch as the pairs'.

    Not in fp32, which has no tensor cores, nor with rows that vector loads cannot take: those are the library's.
    """
    return dtype != torch.float32 and outputs % 16 == 0 and inputs % 16 == 0


def forward(base: bool, rank: int) -> Launch:
    p_rows = {16: 128, 32: 128, 64: 64}[padded_rank(rank)]
    if base:
        depth = 64 if padded_rank(rank) < 64 else 32
        return Launch({"ROWS": 128, "COLUMNS": 128, "DEPTH": depth, "BAND": 8, "P_ROWS": p_rows}, warps=8, stages=3)
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
    warps = 4 if padded_rank(rank) == 16 else 2
    return Launch({"ROWS": 16 * warps, "COLUMNS": 16}, warps=warps, stages=1)
