"""Warps that a multiprocessor holds, on cases worked out by hand from NVIDIA's limits."""

from __future__ import annotations

import pytest

from abmll.kernels.fused.chips import CHIPS, warps_held


@pytest.mark.parametrize(
    ("chip", "warps", "registers", "shared", "held"),
    (
        (90, 4, 32, 0, 64),  # 32 x 32 registers a warp: 64 fit, and that is all the warps there may be
        (90, 4, 33, 0, 48),  # 1,056 are handed out as 1,280: 51 fit, by fours 48
        (90, 4, 128, 0, 16),
        (90, 4, 144, 0, 12),  # 14 fit, by fours 12
        (90, 4, 255, 0, 8),
        (80, 4, 96, 0, 20),  # 21 fit
        (90, 8, 168, 0, 8),  # 12 fit: one block of eight
        (90, 4, 32, 48 * 1024, 16),  # 228 / (48 + 1) blocks
        (80, 4, 32, 48 * 1024, 12),  # 164 / (48 + 1) blocks
        (90, 1, 32, 0, 32),  # 32 blocks, whatever their size
        (90, 4, 32, 227 * 1024, 4),
        (80, 4, 32, 163 * 1024, 4),
        (80, 4, 32, 163 * 1024 + 1, 0),
    ),
)
def test_warps_held(chip, warps, registers, shared, held):
    assert warps_held(chip, warps, registers, shared) == held


def test_what_one_block_may_ask_for_fits():
    for chip, limits in CHIPS.items():
        assert warps_held(chip, 4, 32, limits.shared_block) >= 4
