"""What the chips that kernels are compiled for have, and how many warps of a kernel one multiprocessor holds."""

from __future__ import annotations

from typing import NamedTuple

WARP = 32


class Chip(NamedTuple):
    """Limits of one multiprocessor (SM), and of one block of threads."""

    registers: int
    warps: int
    blocks: int
    shared: int  # bytes for all blocks
    shared_block: int  # bytes that one block may ask for


# From the CUDA C++ Programming Guide, technical specifications per compute capability. What is compiled for sm_80 must
# also fit sm_86, sm_89 and sm_120, where a block may have 99 KiB; an sm_80 itself allows 163.
CHIPS = {
    80: Chip(registers=65_536, warps=64, blocks=32, shared=164 * 1024, shared_block=99 * 1024),
    90: Chip(registers=65_536, warps=64, blocks=32, shared=228 * 1024, shared_block=227 * 1024),
}
# How they are handed out, as in NVIDIA's occupancy calculator: registers by 256 to a warp, warps in fours (one a
# scheduler) while registers last; shared memory by 128 bytes, 1 KiB of every block for the system.
_REGISTER_UNIT, _WARP_UNIT, _SHARED_UNIT, _SHARED_RESERVED = 256, 4, 128, 1024


def _up(size: int, unit: int) -> int:
    return -(-size // unit) * unit


def warps_held(chip: int, warps: int, registers: int, shared: int) -> int:
    """Warps that one SM of CHIPS[chip] holds, of blocks of `warps`, with so many registers a thread and bytes of shared
    memory a block. 0: not one block fits.
    """
    limits = CHIPS[chip]
    if shared > limits.shared - _SHARED_RESERVED:
        return 0
    by_registers = limits.registers // _up(max(registers, 1) * WARP, _REGISTER_UNIT) // _WARP_UNIT * _WARP_UNIT
    by_shared = limits.shared // (_up(shared, _SHARED_UNIT) + _SHARED_RESERVED)
    return warps * min(by_registers // warps, limits.warps // warps, by_shared, limits.blocks)
