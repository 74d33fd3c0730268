"""Kernels of a low-rank Gaussian matrix Z [rows, columns]: its samples, its divergence from another, their adjoints.

Both posteriors are one:
    activation      Z = z [tokens, outputs],  row factors A x (the rank-sized projections),  column factors B
    weight          Z = change to W0 [outputs, inputs],  row factors B,  column factors A^T
With row factors P_j [rows, r] and column factors Q_j [columns, r] of pair j,
    mean = s P_0 Q_0^T    log-variance = s P_1 Q_1^T + c    (phi; theta: pairs 2 and 3)
exist in registers only. Formulas: `reference`.

A leading G (episodes side by side) is the last axis of every grid; theta's factors have group stride 0 where they are
shared. All row factors have one row stride and unit stride along the rank; all column factors have one column stride
and one rank stride.
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
    store_factor_tile,
)


@triton.jit
def _counted(mask_ptr, rows, end, HAS_MASK: tl.constexpr):
    inside = rows < end
    if HAS_MASK:
        inside = inside & (tl.load(mask_ptr + rows, mask=inside, other=0) != 0)
    return inside


# Numbers that differ from step to step or batch to batch: nothing is compiled anew for them.
VARYING = ["M", "G", "first_row", "mask_group", "slot_rows", "chunk_columns", "layer"]


@triton.jit(do_not_specialize=VARYING)
def sample_kernel(
    y_ptr, p_0, p_1, p_2, p_3, q_0, q_1, q_2, q_3, mask_ptr, sums_ptr,
    M, N, first_row, y_group, y_stride, p_group, p_theta_group, p_stride, q_group, q_theta_group, q_stride, q_rank,
    mask_group, names_ptr, layer, scaling, offset, prior_shape, prior_rate,
    RANK: tl.constexpr, R: tl.constexpr, ADD: tl.constexpr, SUMS: tl.constexpr, HAS_MASK: tl.constexpr,
    ROWS: tl.constexpr, COLUMNS: tl.constexpr,
):  # fmt: skip
    """A sample of Z [G, M, N], added to what y [G, M, N] holds (ADD) or written over it.

    SUMS: one partial sum of KL and one of -log prior a program, sums [2, programs]. `first_row` is the
    place of row 0 in the noise, which `names` [G, 3] and the layer name.
    """
    row_block = tl.program_id(0)
    column_block = tl.program_id(1)
    group = tl.program_id(2)
    far_group = group.to(tl.int64)
    rows = row_block * ROWS + tl.arange(0, ROWS)
    columns = column_block * COLUMNS + tl.arange(0, COLUMNS)
    inside = (rows < M)[:, None] & (columns < N)[None, :]
    p_mean = factor_tile(p_0 + far_group * p_group, rows, M, p_stride, 1, RANK, R)
    p_low = factor_tile(p_1 + far_group * p_group, rows, M, p_stride, 1, RANK, R)
    q_mean = factor_tile(q_0 + far_group * q_group, columns, N, q_stride, q_rank, RANK, R)
    q_low = factor_tile(q_1 + far_group * q_group, columns, N, q_stride, q_rank, RANK, R)
    mean = scaling * dot(p_mean, tl.trans(q_mean))
    low = scaling * dot(p_low, tl.trans(q_low))

    noise = normal_tile(first_row + rows, column_block * COLUMNS, N, names_ptr + 3 * group, layer, COLUMNS)
    y = mean + tl.exp(0.5 * (low + offset)) * noise
    y_tile = y_ptr + far_group * y_group + rows.to(tl.int64)[:, None] * y_stride + columns[None, :]
    if ADD:
        y += tl.load(y_tile, mask=inside, other=0.0).to(tl.float32)
    tl.store(y_tile, narrowed(y, y_ptr.dtype.element_ty), mask=inside)

    if SUMS:
        p_mean = factor_tile(p_2 + far_group * p_theta_group, rows, M, p_stride, 1, RANK, R)
        p_low = factor_tile(p_3 + far_group * p_theta_group, rows, M, p_stride, 1, RANK, R)
        q_mean = factor_tile(q_2 + far_group * q_theta_group, columns, N, q_stride, q_rank, RANK, R)
        q_low = factor_tile(q_3 + far_group * q_theta_group, columns, N, q_stride, q_rank, RANK, R)
        prior_mean = scaling * dot(p_mean, tl.trans(q_mean))
        prior_low = scaling * dot(p_low, tl.trans(q_low))
        kl, prior = divergence_tile(mean, low, prior_mean, prior_low, offset, prior_shape, prior_rate)
        valid = inside & _counted(mask_ptr + far_group * mask_group, rows, M, HAS_MASK)[:, None]
        programs = tl.num_programs(0) * tl.num_programs(1) * tl.num_programs(2)
        program = (group * tl.num_programs(1) + column_block) * tl.num_programs(0) + row_block
        tl.store(sums_ptr + program, tl.sum(tl.where(valid, kl, 0.0)))
        tl.store(sums_ptr + programs + program, tl.sum(tl.where(valid, prior, 0.0)))


@triton.jit
def _accumulate_tile(pointer, value, columns, end, fresh, RANK: tl.constexpr, R: tl.constexpr):
    """Add to this program's own slot, or fill it where nothing is there yet."""
    if fresh == 0:
        value += factor_tile(pointer, columns, end, RANK, 1, RANK, R)
    store_factor_tile(pointer, value, columns, end, RANK, RANK, R)


@triton.jit(do_not_specialize=VARYING)
def adjoint_kernel(
    dz_ptr, z_ptr, p_0, p_1, p_2, p_3, q_0, q_1, q_2, q_3, mask_ptr, weights_ptr, dp_ptr, dq_ptr, sums_ptr,
    M, N, G, first_row, dz_group, dz_stride, z_group, z_stride, p_group, p_theta_group, p_stride,
    q_group, q_theta_group, q_stride, q_rank, mask_group, slot_rows, chunk_columns,
    names_ptr, layer, scaling, offset, prior_shape, prior_rate,
    RANK: tl.constexpr, R: tl.constexpr, HAS_MASK: tl.constexpr,
    HAS_DZ: tl.constexpr, SAMPLE: tl.constexpr, DIVERGENCE: tl.constexpr, DP_PHI: tl.constexpr, DP_THETA: tl.constexpr,
    DQ_PHI: tl.constexpr, DQ_THETA: tl.constexpr, SUMS: tl.constexpr, ROWS: tl.constexpr, COLUMNS: tl.constexpr,
):  # fmt: skip
    """Adjoints of the low-rank pairs over one slot of rows (grid axis 0) and one chunk of columns (axis 1).

    dz [G, M, N] with unit stride along N: the adjoint of Z (HAS_DZ); weights [2]: upstream gradients of the sums of KL
    and -log prior (DIVERGENCE). Written for the pairs asked for, phi's before theta's:
        dp [chunks, G, M, pairs * RANK]   of the row factors, partial: to be summed over the chunks
        dq [slots, pairs, G, N, RANK]     of the column factors, partial: to be summed over the slots
        sums [2, programs]                KL and -log prior (SUMS)
        z [G, M, N]                       the sample itself, drawn again (SAMPLE)
    """
    slot = tl.program_id(0)
    chunk = tl.program_id(1)
    group = tl.program_id(2)
    far_group = group.to(tl.int64)
    p_0 += far_group * p_group
    p_1 += far_group * p_group
    p_2 += far_group * p_theta_group
    p_3 += far_group * p_theta_group
    q_0 += far_group * q_group
    q_1 += far_group * q_group
    q_2 += far_group * q_theta_group
    q_3 += far_group * q_theta_group
    dz_ptr += far_group * dz_group
    z_ptr += far_group * z_group
    DP_WIDTH: tl.constexpr = (2 * DP_PHI + 2 * DP_THETA) * RANK
    DP_PAIR: tl.constexpr = 2 * DP_PHI * RANK
    dp_ptr += (chunk.to(tl.int64) * G + group) * M * DP_WIDTH
    pair_stride = G.to(tl.int64) * N * RANK
    dq_phi = dq_ptr + slot * (2 * DQ_PHI + 2 * DQ_THETA) * pair_stride + far_group * N * RANK
    dq_theta = dq_phi + 2 * DQ_PHI * pair_stride
    if DIVERGENCE:
        kl_weight = tl.load(weights_ptr)
        prior_weight = tl.load(weights_ptr + 1)
        mask_ptr += far_group * mask_group
    if SUMS:
        kl_sum = tl.zeros((ROWS,), tl.float32)
        prior_sum = tl.zeros((ROWS,), tl.float32)

    row_end = tl.minimum((slot + 1) * slot_rows, M)
    column_end = tl.minimum((chunk + 1) * chunk_columns, N)
    for row_start in range(slot * slot_rows, row_end, ROWS):
        rows = row_start + tl.arange(0, ROWS)
        p_mean = factor_tile(p_0, rows, row_end, p_stride, 1, RANK, R)
        p_low = factor_tile(p_1, rows, row_end, p_stride, 1, RANK, R)
        if DP_PHI:
            dp_mean = tl.zeros((ROWS, R), tl.float32)
            dp_low = tl.zeros((ROWS, R), tl.float32)
        if DIVERGENCE:
            p_prior_mean = factor_tile(p_2, rows, row_end, p_stride, 1, RANK, R)
            p_prior_low = factor_tile(p_3, rows, row_end, p_stride, 1, RANK, R)
            counted = _counted(mask_ptr, rows, row_end, HAS_MASK)
        if DP_THETA:
            dp_prior_mean = tl.zeros((ROWS, R), tl.float32)
            dp_prior_low = tl.zeros((ROWS, R), tl.float32)
        fresh = (row_start == slot * slot_rows).to(tl.int32)
        for column_start in range(chunk * chunk_columns, column_end, COLUMNS):
            columns = column_start + tl.arange(0, COLUMNS)
            inside = (rows < row_end)[:, None] & (columns < column_end)[None, :]
            q_low = factor_tile(q_1, columns, column_end, q_stride, q_rank, RANK, R)
            low = scaling * dot(p_low, tl.trans(q_low))
            if DIVERGENCE or DP_PHI or SAMPLE:
                q_mean = factor_tile(q_0, columns, column_end, q_stride, q_rank, RANK, R)
            if DIVERGENCE or SAMPLE:
                mean = scaling * dot(p_mean, tl.trans(q_mean))
            if HAS_DZ:
                dz_rows = dz_ptr + rows.to(tl.int64)[:, None] * dz_stride
                by_mean = tl.load(dz_rows + columns[None, :], mask=inside, other=0.0).to(tl.float32)
                noise = normal_tile(first_row + rows, column_start, N, names_ptr + 3 * group, layer, COLUMNS)
                spread = tl.exp(0.5 * (low + offset)) * noise
                by_low = 0.5 * by_mean * spread
                if SAMPLE:
                    z_tile = z_ptr + rows.to(tl.int64)[:, None] * z_stride + columns[None, :]
                    tl.store(z_tile, narrowed(mean + spread, z_ptr.dtype.element_ty), mask=inside)
            else:
                by_mean = tl.zeros((ROWS, COLUMNS), tl.float32)
                by_low = tl.zeros((ROWS, COLUMNS), tl.float32)
            if DIVERGENCE:
                q_prior_mean = factor_tile(q_2, columns, column_end, q_stride, q_rank, RANK, R)
                q_prior_low = factor_tile(q_3, columns, column_end, q_stride, q_rank, RANK, R)
                prior_mean = scaling * dot(p_prior_mean, tl.trans(q_prior_mean))
                prior_low = scaling * dot(p_prior_low, tl.trans(q_prior_low))
                valid = inside & counted[:, None]
                if SUMS:
                    kl, prior = divergence_tile(mean, low, prior_mean, prior_low, offset, prior_shape, prior_rate)
                    kl_sum += tl.sum(tl.where(valid, kl, 0.0), axis=1)
                    prior_sum += tl.sum(tl.where(valid, prior, 0.0), axis=1)
                pull, stretch, by_prior_mean, by_prior_low = divergence_gradient_tile(
                    mean, low, prior_mean, prior_low, offset, prior_shape, prior_rate, kl_weight, prior_weight, valid
                )
                by_mean += pull
                by_low += stretch
                if DP_THETA:
                    dp_prior_mean += dot(by_prior_mean, q_prior_mean)
                    dp_prior_low += dot(by_prior_low, q_prior_low)
                if DQ_THETA:
                    dq = scaling * dot(tl.trans(by_prior_mean), p_prior_mean)
                    _accumulate_tile(dq_theta, dq, columns, column_end, fresh, RANK, R)
                    dq = scaling * dot(tl.trans(by_prior_low), p_prior_low)
                    _accumulate_tile(dq_theta + pair_stride, dq, columns, column_end, fresh, RANK, R)
            if DP_PHI:
                dp_mean += dot(by_mean, q_mean)
                dp_low += dot(by_low, q_low)
            if DQ_PHI:
                dq = scaling * dot(tl.trans(by_mean), p_mean)
                _accumulate_tile(dq_phi, dq, columns, column_end, fresh, RANK, R)
                dq = scaling * dot(tl.trans(by_low), p_low)
                _accumulate_tile(dq_phi + pair_stride, dq, columns, column_end, fresh, RANK, R)
        if DP_PHI:
            store_factor_tile(dp_ptr, scaling * dp_mean, rows, row_end, DP_WIDTH, RANK, R)
            store_factor_tile(dp_ptr + RANK, scaling * dp_low, rows, row_end, DP_WIDTH, RANK, R)
        if DP_THETA:
            store_factor_tile(dp_ptr + DP_PAIR, scaling * dp_prior_mean, rows, row_end, DP_WIDTH, RANK, R)
            store_factor_tile(dp_ptr + DP_PAIR + RANK, scaling * dp_prior_low, rows, row_end, DP_WIDTH, RANK, R)
        if DQ_PHI or DQ_THETA:
            tl.debug_barrier()  # the next rows add to what other threads of this program may have stored

    if SUMS:
        programs = tl.num_programs(0) * tl.num_programs(1) * tl.num_programs(2)
        program = (group * tl.num_programs(1) + chunk) * tl.num_programs(0) + slot
        tl.store(sums_ptr + program, tl.sum(kl_sum))
        tl.store(sums_ptr + programs + program, tl.sum(prior_sum))
