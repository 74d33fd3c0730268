"""The activation posterior's elementwise work on T x N, between the matrix products of `products`.

    sample_kernel     y0 + m_phi + exp(l_phi / 2) eps in place, and the sums of KL and -log prior
    adjoint_kernel    from dy, p and the integers that name eps: dp and dB of the pairs asked for; without dy, theta's
                      local gradient for the outer step

Means and log-variances exist in registers only. Formulas: reference.py, METHOD as in README ("What it computes").
Pairs in order: 0 phi mean, 1 phi log-variance, 2 theta mean, 3 theta log-variance.
"""

from __future__ import annotations

import triton
import triton.language as tl

from abmll.kernels.fused.tiles import (
    divergence_gradient_tile,
    divergence_tile,
    dot,
    factor_tile,
    narrowed,
    normal_tile,
    projection_tile,
    store_projection_tile,
)


@triton.jit
def _counted(mask_ptr, rows, end, HAS_MASK: tl.constexpr):
    inside = rows < end
    if HAS_MASK:
        inside = inside & (tl.load(mask_ptr + rows, mask=inside, other=0) != 0)
    return inside


@triton.jit
def sample_kernel(
    y_ptr, p_ptr, mask_ptr, b_0, b_1, b_2, b_3, sums_ptr, T, N, mask_group,
    scaling, offset, prior_shape, prior_rate, seed: tl.int64, step: tl.int32, layer: tl.int32,
    WIDTH: tl.constexpr, RANK: tl.constexpr, R: tl.constexpr, SUMS: tl.constexpr, HAS_MASK: tl.constexpr,
    ROWS: tl.constexpr, COLUMNS: tl.constexpr,
):  # fmt: skip
    """Add the sample to y0 in place; SUMS: also one partial sum of KL and one of -log prior a program.

    y [G, T, N]; p [G, T, WIDTH]; phi's b_0, b_1 [G, N, RANK]; theta's b_2, b_3 [N, RANK]; sums [2, programs].
    """
    row_block = tl.program_id(0)
    column_block = tl.program_id(1)
    group = tl.program_id(2)
    rows = row_block * ROWS + tl.arange(0, ROWS)
    columns = column_block * COLUMNS + tl.arange(0, COLUMNS)
    inside = (rows < T)[:, None] & (columns < N)[None, :]
    p_ptr += group.to(tl.int64) * T * WIDTH
    own = group.to(tl.int64) * N * RANK
    b_mean = factor_tile(b_0 + own, columns, N, RANK, R)
    b_low = factor_tile(b_1 + own, columns, N, RANK, R)
    mean = scaling * dot(projection_tile(p_ptr, rows, T, 0, WIDTH, RANK, R), tl.trans(b_mean))
    low = scaling * dot(projection_tile(p_ptr, rows, T, 1, WIDTH, RANK, R), tl.trans(b_low))

    y_ptr += group.to(tl.int64) * T * N
    offsets = rows.to(tl.int64)[:, None] * N + columns[None, :]
    y = tl.load(y_ptr + offsets, mask=inside, other=0.0).to(tl.float32)
    noise = normal_tile(rows, column_block * COLUMNS, N, seed, step, layer, group, COLUMNS)
    y += mean + tl.exp(0.5 * (low + offset)) * noise
    tl.store(y_ptr + offsets, narrowed(y, y_ptr.dtype.element_ty), mask=inside)

    if SUMS:
        b_mean_p = factor_tile(b_2, columns, N, RANK, R)
        b_low_p = factor_tile(b_3, columns, N, RANK, R)
        mean_p = scaling * dot(projection_tile(p_ptr, rows, T, 2, WIDTH, RANK, R), tl.trans(b_mean_p))
        low_p = scaling * dot(projection_tile(p_ptr, rows, T, 3, WIDTH, RANK, R), tl.trans(b_low_p))
        kl, prior = divergence_tile(mean, low, mean_p, low_p, offset, prior_shape, prior_rate)
        counted = _counted(mask_ptr + group.to(tl.int64) * mask_group, rows, T, HAS_MASK)
        valid = inside & counted[:, None]
        programs = tl.num_programs(0) * tl.num_programs(1) * tl.num_programs(2)
        program = (group * tl.num_programs(1) + column_block) * tl.num_programs(0) + row_block
        tl.store(sums_ptr + program, tl.sum(tl.where(valid, kl, 0.0)))
        tl.store(sums_ptr + programs + program, tl.sum(tl.where(valid, prior, 0.0)))


@triton.jit
def _accumulate_tile(pointer, value, columns, end, fresh, RANK: tl.constexpr, R: tl.constexpr):
    """Add to this program's own slot, or fill it where nothing is there yet."""
    if fresh == 0:
        value += factor_tile(pointer, columns, end, RANK, R)
    store_projection_tile(pointer, value, columns, end, 0, RANK, RANK, R)


@triton.jit
def adjoint_kernel(
    dy_ptr, p_ptr, mask_ptr, b_0, b_1, b_2, b_3, weights_ptr, dp_ptr, db_ptr, sums_ptr,
    T, N, G, dy_group, dy_stride, mask_group, slot_rows, chunk_columns,
    scaling, offset, prior_shape, prior_rate, seed: tl.int64, step: tl.int32, layer: tl.int32,
    WIDTH: tl.constexpr, RANK: tl.constexpr, R: tl.constexpr, HAS_MASK: tl.constexpr,
    HAS_DY: tl.constexpr, DIVERGENCE: tl.constexpr, DP_PHI: tl.constexpr, DP_THETA: tl.constexpr,
    DB_PHI: tl.constexpr, DB_THETA: tl.constexpr, SUMS: tl.constexpr, ROWS: tl.constexpr, COLUMNS: tl.constexpr,
):  # fmt: skip
    """Adjoints of the low-rank pairs over one slot of rows (grid axis 0) and one chunk of columns (axis 1).

    dy [G, T, N] with unit stride along N (HAS_DY); weights [2]: upstream gradients of the sums of KL and -log prior
    (DIVERGENCE). Written for the pairs asked for, phi's before theta's:
        dp [chunks, G, T, pairs * RANK]   d / d(A x), partial: to be summed over the chunks
        db [slots, pairs, G, N, RANK]     partial: to be summed over the slots, theta's over G too
        sums [2, programs]                KL and -log prior (SUMS)
    """
    slot = tl.program_id(0)
    chunk = tl.program_id(1)
    group = tl.program_id(2)
    far_group = group.to(tl.int64)
    p_ptr += far_group * T * WIDTH
    DP_WIDTH: tl.constexpr = (2 * DP_PHI + 2 * DP_THETA) * RANK
    dp_ptr += (chunk.to(tl.int64) * G + group) * T * DP_WIDTH
    b_0 += far_group * N * RANK
    b_1 += far_group * N * RANK
    pair_stride = tl.cast(G, tl.int64) * N * RANK
    DB_PAIRS: tl.constexpr = 2 * DB_PHI + 2 * DB_THETA
    db_phi = db_ptr + slot * DB_PAIRS * pair_stride + far_group * N * RANK
    db_theta = db_phi + 2 * DB_PHI * pair_stride
    if DIVERGENCE:
        kl_weight = tl.load(weights_ptr)
        prior_weight = tl.load(weights_ptr + 1)
        mask_ptr += far_group * mask_group
    if SUMS:
        kl_sum = tl.zeros((ROWS,), tl.float32)
        prior_sum = tl.zeros((ROWS,), tl.float32)

    row_end = tl.minimum((slot + 1) * slot_rows, T)
    column_end = tl.minimum((chunk + 1) * chunk_columns, N)
    for row_start in range(slot * slot_rows, row_end, ROWS):
        rows = row_start + tl.arange(0, ROWS)
        p_mean = projection_tile(p_ptr, rows, row_end, 0, WIDTH, RANK, R)
        p_low = projection_tile(p_ptr, rows, row_end, 1, WIDTH, RANK, R)
        if DP_PHI:
            dp_mean = tl.zeros((ROWS, R), tl.float32)
            dp_low = tl.zeros((ROWS, R), tl.float32)
        if DIVERGENCE:
            p_mean_p = projection_tile(p_ptr, rows, row_end, 2, WIDTH, RANK, R)
            p_low_p = projection_tile(p_ptr, rows, row_end, 3, WIDTH, RANK, R)
            counted = _counted(mask_ptr, rows, row_end, HAS_MASK)
        if DP_THETA:
            dp_mean_p = tl.zeros((ROWS, R), tl.float32)
            dp_low_p = tl.zeros((ROWS, R), tl.float32)
        fresh = (row_start == slot * slot_rows).to(tl.int32)
        for column_start in range(chunk * chunk_columns, column_end, COLUMNS):
            columns = column_start + tl.arange(0, COLUMNS)
            inside = (rows < row_end)[:, None] & (columns < column_end)[None, :]
            b_low = factor_tile(b_1, columns, column_end, RANK, R)
            low = scaling * dot(p_low, tl.trans(b_low))
            if HAS_DY:
                dy_rows = dy_ptr + far_group * dy_group + rows.to(tl.int64)[:, None] * dy_stride
                by_mean = tl.load(dy_rows + columns[None, :], mask=inside, other=0.0).to(tl.float32)
                noise = normal_tile(rows, column_start, N, seed, step, layer, group, COLUMNS)
                by_low = by_mean * (0.5 * tl.exp(0.5 * (low + offset))) * noise
            else:
                by_mean = tl.zeros((ROWS, COLUMNS), tl.float32)
                by_low = tl.zeros((ROWS, COLUMNS), tl.float32)
            if DIVERGENCE or DP_PHI:
                b_mean = factor_tile(b_0, columns, column_end, RANK, R)
            if DIVERGENCE:
                b_mean_p = factor_tile(b_2, columns, column_end, RANK, R)
                b_low_p = factor_tile(b_3, columns, column_end, RANK, R)
                mean = scaling * dot(p_mean, tl.trans(b_mean))
                mean_p = scaling * dot(p_mean_p, tl.trans(b_mean_p))
                low_p = scaling * dot(p_low_p, tl.trans(b_low_p))
                valid = inside & counted[:, None]
                if SUMS:
                    kl, prior = divergence_tile(mean, low, mean_p, low_p, offset, prior_shape, prior_rate)
                    kl_sum += tl.sum(tl.where(valid, kl, 0.0), axis=1)
                    prior_sum += tl.sum(tl.where(valid, prior, 0.0), axis=1)
                pull, stretch, by_mean_p, by_low_p = divergence_gradient_tile(
                    mean, low, mean_p, low_p, offset, prior_shape, prior_rate, kl_weight, prior_weight, valid
                )
                by_mean += pull
                by_low += stretch
                if DP_THETA:
                    dp_mean_p += dot(by_mean_p, b_mean_p)
                    dp_low_p += dot(by_low_p, b_low_p)
                if DB_THETA:
                    db = scaling * dot(tl.trans(by_mean_p), p_mean_p)
                    _accumulate_tile(db_theta, db, columns, column_end, fresh, RANK, R)
                    db = scaling * dot(tl.trans(by_low_p), p_low_p)
                    _accumulate_tile(db_theta + pair_stride, db, columns, column_end, fresh, RANK, R)
            if DP_PHI:
                dp_mean += dot(by_mean, b_mean)
                dp_low += dot(by_low, b_low)
            if DB_PHI:
                db = scaling * dot(tl.trans(by_mean), p_mean)
                _accumulate_tile(db_phi, db, columns, column_end, fresh, RANK, R)
                db = scaling * dot(tl.trans(by_low), p_low)
                _accumulate_tile(db_phi + pair_stride, db, columns, column_end, fresh, RANK, R)
        if DP_PHI:
            store_projection_tile(dp_ptr, scaling * dp_mean, rows, row_end, 0, DP_WIDTH, RANK, R)
            store_projection_tile(dp_ptr, scaling * dp_low, rows, row_end, 1, DP_WIDTH, RANK, R)
        if DP_THETA:
            PAIR: tl.constexpr = 2 * DP_PHI
            store_projection_tile(dp_ptr, scaling * dp_mean_p, rows, row_end, PAIR, DP_WIDTH, RANK, R)
            store_projection_tile(dp_ptr, scaling * dp_low_p, rows, row_end, PAIR + 1, DP_WIDTH, RANK, R)

    if SUMS:
        programs = tl.num_programs(0) * tl.num_programs(1) * tl.num_programs(2)
        program = (group * tl.num_programs(1) + chunk) * tl.num_programs(0) + slot
        tl.store(sums_ptr + program, tl.sum(kl_sum))
        tl.store(sums_ptr + programs + program, tl.sum(prior_sum))
