"""Products of the rank's size around the frozen one, which is left to the library: p = A x, and dA = dp^T x, dx = dp A.

x is read once for all pairs. p keeps fp32's accuracy although x is 16-bit: the KL is made of differences between phi's
and theta's statistics that a 16-bit factor would lose.
"""

from __future__ import annotations

import triton
import triton.language as tl

from abmll.kernels.fused.tiles import (
    factor_tile,
    narrowed,
    near16,
    operand16,
    rows_of_group,
    split16,
    store_factor_tile,
)


@triton.jit
def _stacked_tile(a_0, a_1, a_2, a_3, ks, K, RANK: tl.constexpr, PAIRS: tl.constexpr, W: tl.constexpr):
    """fp32 tile [W, len(ks)] of all pairs' A [RANK, K] below one another; zero beyond the last and beyond K."""
    at = tl.arange(0, W)
    pair = at // RANK
    offsets = (at % RANK).to(tl.int64)[:, None] * K + ks[None, :]
    inside = (at < PAIRS * RANK)[:, None] & (ks < K)[None, :]
    pointer = tl.where(pair == 0, a_0, a_1)
    if PAIRS == 4:
        pointer = tl.where(pair < 2, pointer, tl.where(pair == 2, a_2, a_3))
    return tl.load(pointer[:, None] + offsets, mask=inside, other=0.0)


# Numbers that differ from batch to batch: nothing is compiled anew for them.
VARYING = ["size", "all_rows", "slots", "tickets"]


@triton.jit(do_not_specialize=VARYING)
def project_kernel(
    x_ptr, a_0, a_1, a_2, a_3, p_ptr, tickets_ptr, bounds_ptr, size, all_rows, K, x_stride, part_depth, tickets,
    PAIRS: tl.constexpr, RANK: tl.constexpr, W: tl.constexpr, RAGGED: tl.constexpr,
    ROWS: tl.constexpr, DEPTH: tl.constexpr,
):  # fmt: skip
    """p = x A^T of all pairs over one part of K (grid axis 1), to be summed: p [parts, T, PAIRS * RANK].

    x [T, K] with unit stride along K, T (`all_rows`) the rows of all groups, see `tiles.rows_of_group`; a_0, a_1 phi's
    [G, RANK, K]; a_2, a_3 theta's [RANK, K] (PAIRS 4). The first program clears the tickets that later kernels draw
    (see `tiles.last_to_arrive`).

    A bf16 x meets A in three bf16 parts (3 x 8 bits hold fp32's 24), so that nothing is lost. Tensor cores truncate
    when they add to an accumulator, which over all of K would show: each block starts from zero and is added by plain
    fp32 arithmetic.
    """
    group = tl.program_id(2).to(tl.int64)
    part = tl.program_id(1)
    if tl.program_id(0) + part + tl.program_id(2) == 0:
        for start in range(0, tickets, 256):
            at = start + tl.arange(0, 256)
            tl.store(tickets_ptr + at, 0, mask=at < tickets)
    before, T = rows_of_group(bounds_ptr, group, size, RAGGED)
    if RAGGED and tl.program_id(0) * ROWS >= T:
        return
    rows = tl.program_id(0) * ROWS + tl.arange(0, ROWS)
    x_rows = x_ptr + before * x_stride + rows.to(tl.int64)[:, None] * x_stride
    a_0 += group * RANK * K
    a_1 += group * RANK * K
    p = tl.zeros((ROWS, W), tl.float32)
    for start in range(part * part_depth, tl.minimum((part + 1) * part_depth, K), DEPTH):
        ks = start + tl.arange(0, DEPTH)
        x = tl.load(x_rows + ks[None, :], mask=(rows < T)[:, None] & (ks < K)[None, :], other=0.0)
        a = tl.trans(_stacked_tile(a_0, a_1, a_2, a_3, ks, K, RANK, PAIRS, W))
        if x.dtype == tl.bfloat16:
            high, rest = split16(a)
            low = near16(a - high.to(tl.float32) - rest.to(tl.float32))
            x = operand16(x)
            product = tl.dot(x, low)
            product = tl.dot(x, rest, product)
            p += tl.dot(x, high, product)
        else:
            p += tl.dot(x.to(tl.float32), a, input_precision="tf32x3")
    WIDTH: tl.constexpr = PAIRS * RANK
    p_ptr += (part * all_rows.to(tl.int64) + before) * WIDTH
    store_factor_tile(p_ptr, p, rows, T, WIDTH, 1, WIDTH, W)


@triton.jit
def _sum_of_slots(dq_ptr, total_ptr, block, size, slots, SIZE: tl.constexpr):
    at = block * SIZE + tl.arange(0, SIZE).to(tl.int64)
    total = tl.zeros((SIZE,), tl.float32)
    for _ in range(slots):
        total += tl.load(dq_ptr + at, mask=at < size, other=0.0)
        dq_ptr += size
    tl.store(total_ptr + at, total, mask=at < size)


@triton.jit(do_not_specialize=VARYING)
def gradient_kernel(
    dp_ptr, x_ptr, a_0, a_1, a_2, a_3, dx_ptr, da_ptr, dq_ptr, db_ptr, bounds_ptr, size, K, x_stride, a_group,
    k_blocks, dq_size, slots,
    PAIRS: tl.constexpr, FIRST: tl.constexpr, COUNT: tl.constexpr, RANK: tl.constexpr, W: tl.constexpr,
    OWN: tl.constexpr, DX: tl.constexpr, RAGGED: tl.constexpr, ROWS: tl.constexpr, COLUMNS: tl.constexpr,
    SUMMED: tl.constexpr,
):  # fmt: skip
    """dA = dp^T x for COUNT pairs from the FIRST on, dx = dp A (DX): a block of K a program, the first k_blocks ones.

    dp [T, PAIRS * RANK], x [T, K] of all groups' rows; da [COUNT, G, RANK, K]; dx [T, K] in x's dtype, the base
    product's part still to come. The programs behind sum the adjoints of the column factors: dq [slots, dq_size] to db
    [dq_size].
    """
    group = tl.program_id(1).to(tl.int64)
    block = tl.program_id(0)
    if block >= k_blocks:
        _sum_of_slots(
            dq_ptr, db_ptr, block - k_blocks + group * (tl.num_programs(0) - k_blocks), dq_size, slots, SUMMED
        )
    else:
        ks = block * COLUMNS + tl.arange(0, COLUMNS)
        EXACT: tl.constexpr = x_ptr.dtype.element_ty == tl.float32
        WIDTH: tl.constexpr = PAIRS * RANK
        before, T = rows_of_group(bounds_ptr, group, size, RAGGED)
        dp_ptr += before * WIDTH
        x_ptr += before * x_stride
        a_0 += group * a_group
        a_1 += group * a_group
        if DX:
            dx_ptr += before * K
            a = _stacked_tile(a_0, a_1, a_2, a_3, ks, K, RANK, PAIRS, W)
            if not EXACT:
                a_high, a_rest = split16(a)
        if COUNT > 0:
            da = tl.zeros((OWN, COLUMNS), tl.float32)
        for start in range(0, T, ROWS):
            rows = start + tl.arange(0, ROWS)
            inside = (rows < T)[:, None] & (ks < K)[None, :]
            if DX:
                dp = factor_tile(dp_ptr, rows, T, WIDTH, 1, WIDTH, W)
                if EXACT:
                    dx = tl.dot(dp, a, input_precision="tf32x3")
                else:
                    high, rest = split16(dp)
                    dx = tl.dot(rest, a_high)
                    dx = tl.dot(high, a_rest, dx)
                    dx = tl.dot(high, a_high, dx)
                offsets = rows.to(tl.int64)[:, None] * K + ks[None, :]
                tl.store(dx_ptr + offsets, narrowed(dx, dx_ptr.dtype.element_ty), mask=inside)
            if COUNT > 0:
                x = tl.load(x_ptr + rows.to(tl.int64)[:, None] * x_stride + ks[None, :], mask=inside, other=0.0)
                own = tl.trans(factor_tile(dp_ptr + FIRST * RANK, rows, T, WIDTH, 1, COUNT * RANK, OWN))
                if x.dtype == tl.bfloat16:
                    high, rest = split16(own)
                    x = operand16(x)
                    product = tl.dot(rest, x)
                    da += tl.dot(high, x, product)
                else:
                    da += tl.dot(own, x.to(tl.float32), input_precision="tf32x3")
        if COUNT > 0:
            at = tl.arange(0, OWN)
            pair = (at // RANK) * tl.num_programs(1) + group
            offsets = (pair * RANK + at % RANK) * K
            da_tile = da_ptr + offsets[:, None] + ks[None, :]
            tl.store(da_tile, da, mask=(at < COUNT * RANK)[:, None] & (ks < K)[None, :])
