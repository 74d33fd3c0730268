"""Kernels of a low-rank Gaussian matrix Z [rows, columns]: its samples, its divergence from another, their adjoints.

Both posteriors are one:
    activation      Z = z [tokens, outputs],  row factors A x (the rank-sized projections),  column factors B
    weight          Z = change to W0 [outputs, inputs],  row factors B,  column factors A^T
With row factors P_j [rows, r] and column factors Q_j [columns, r] of pair j,
    mean = s P_0 Q_0^T    log-variance = s' P_1 Q_1^T + c    (phi; theta: pairs 2 and 3)
exist in registers only. Formulas: `reference`.

A program owns a block of rows, whose factors it splits once, and walks a chunk of columns. What several programs have a
part of is stored in parts, and the last of them to end adds these up, always in the same order.

Groups (episodes side by side) are the last axis of every grid. Their rows lie one after another, see
`tiles.rows_of_group`. Phi's factors and the sums have a G; theta's are shared, but for the row factors of activations.
A program beyond the last row of a group that is smaller than others leaves nothing to be added up, and nobody waits for
it.

All row factors have one row stride and unit stride along the rank (in one tensor, a distance from pair to pair as
well); all column factors have one column stride and one rank stride.
"""

from __future__ import annotations

import triton
import triton.language as tl

from abmll.kernels.fused.tiles import (
    FROM_BITS,
    TO_BITS,
    exp2,
    exponential_excess,
    factor_tile,
    fold,
    last_to_arrive,
    narrowed,
    near16,
    normal_tile,
    packed16,
    packed_dot,
    rows_of_group,
    split16,
    split_columns,
    split_rows,
    store_factor_tile,
)


@triton.jit
def _counted(mask_ptr, rows, end, HAS_MASK: tl.constexpr):
    inside = rows < end
    if HAS_MASK:
        inside = inside & (tl.load(mask_ptr + rows, mask=inside, other=0) != 0)
    return inside


@triton.jit
def _columns_tile(
    pointer, columns, N, column_stride, rank_stride, EVEN: tl.constexpr, RANK: tl.constexpr, R: tl.constexpr
):
    """fp32 tile [len(columns), R] of a factor's columns; offsets fit 32 bits, as a group's factor does. EVEN: all of
    it is inside.
    """
    ranks = tl.arange(0, R)
    offsets = columns[:, None] * column_stride + ranks[None, :] * rank_stride
    if EVEN:
        return tl.load(pointer + offsets)
    else:
        inside = (columns < N)[:, None] & (ranks < RANK)[None, :]
        return tl.load(pointer + offsets, mask=inside, other=0.0)


@triton.jit
def _rows_tile(pointer, rows, M, stride, parts, part_stride, RANK: tl.constexpr, R: tl.constexpr):
    """fp32 tile [len(rows), R] of a factor that is the sum of several parts."""
    total = factor_tile(pointer, rows, M, stride, 1, RANK, R)
    for part in range(1, parts):
        total += factor_tile(pointer + part * part_stride, rows, M, stride, 1, RANK, R)
    return total


@triton.jit
def _store_sums(kl, prior, sums_ptr, kl_ptr, prior_ptr, tickets_ptr, program, programs):
    """One partial sum of KL and one of -log prior a program of this group; its last to arrive adds them up."""
    group = tl.program_id(2)
    sums_ptr += 2 * group.to(tl.int64) * tl.num_programs(0) * tl.num_programs(1)
    tl.store(sums_ptr + program, kl)
    tl.store(sums_ptr + programs + program, prior)
    if last_to_arrive(tickets_ptr + group, programs):
        kl_sums = tl.zeros((256,), tl.float32)
        prior_sums = tl.zeros((256,), tl.float32)
        for start in range(0, programs, 256):
            at = start + tl.arange(0, 256)
            kl_sums += tl.load(sums_ptr + at, mask=at < programs, other=0.0, cache_modifier=".cg")
            prior_sums += tl.load(sums_ptr + programs + at, mask=at < programs, other=0.0, cache_modifier=".cg")
        tl.store(kl_ptr + group, tl.sum(kl_sums))
        tl.store(prior_ptr + group, tl.sum(prior_sums))


# Numbers that differ from step to step or batch to batch: nothing is compiled anew for them.
VARYING = [
    "size", "all_rows", "first_row", "slot_rows", "chunk_tiles", "layer", "parts", "part_stride", "dp_pair",
    "dkl_stride", "dprior_stride",
]  # fmt: skip


@triton.jit(do_not_specialize=VARYING)
def sample_kernel(
    y_ptr, p_0, p_1, p_2, p_3, q_0, q_1, q_2, q_3, p_ptr, mask_ptr, names_ptr, sums_ptr, kl_ptr, prior_ptr, tickets_ptr,
    bounds_ptr, size, N, first_row, y_stride, p_stride, p_theta_stride, p_pair, parts, part_stride,
    q_group, q_stride, q_rank, chunk_tiles,
    layer, scaling, low_scaling, offset, deviation, prior_shape, prior_rate,
    RANK: tl.constexpr, R: tl.constexpr, PAIRS: tl.constexpr, EVEN: tl.constexpr, RAGGED: tl.constexpr,
    ADD: tl.constexpr, KEEP: tl.constexpr, SUMS: tl.constexpr, HAS_MASK: tl.constexpr, ROWS: tl.constexpr,
    COLUMNS: tl.constexpr,
):  # fmt: skip
    """A sample of Z, the rows of all groups one after another, added to what y holds (ADD) or written over it.

    The row factors are sums of `parts` tensors; KEEP: the sums of all PAIRS are stored, p [rows, PAIRS * RANK]. From
    group to group theta's go on by p_theta_stride a row: 0 where they are shared. SUMS: each group's KL and -log prior,
    by way of sums [G, 2, programs] and the first G tickets. `first_row` is the place of a group's row 0 in the noise,
    which `names` [G, 3] and the layer name.
    """
    row_block = tl.program_id(0)
    chunk = tl.program_id(1)
    group = tl.program_id(2)
    far_group = group.to(tl.int64)
    before, M = rows_of_group(bounds_ptr, group, size, RAGGED)
    if RAGGED and row_block * ROWS >= M:
        return
    rows = row_block * ROWS + tl.arange(0, ROWS)
    p_0 += before * p_stride
    p_1 += before * p_stride + p_pair
    q_0 += far_group * q_group
    q_1 += far_group * q_group
    p_mean = _rows_tile(p_0, rows, M, p_stride, parts, part_stride, RANK, R)
    p_low = _rows_tile(p_1, rows, M, p_stride, parts, part_stride, RANK, R)
    mean_high, mean_rest = split_rows(scaling * p_mean)
    low_high, low_rest = split_rows(low_scaling * p_low * TO_BITS)
    inverse_deviation = 1.0 / deviation
    WIDTH: tl.constexpr = PAIRS * RANK
    p_ptr += before * WIDTH
    keeps = KEEP and chunk == 0
    if keeps:
        store_factor_tile(p_ptr, p_mean, rows, M, WIDTH, 1, RANK, R)
        store_factor_tile(p_ptr + RANK, p_low, rows, M, WIDTH, 1, RANK, R)
    if PAIRS == 4:
        p_2 += before * p_theta_stride + 2 * p_pair
        p_3 += before * p_theta_stride + 3 * p_pair
        p_mean = _rows_tile(p_2, rows, M, p_stride, parts, part_stride, RANK, R)
        p_low = _rows_tile(p_3, rows, M, p_stride, parts, part_stride, RANK, R)
        if keeps:
            store_factor_tile(p_ptr + 2 * RANK, p_mean, rows, M, WIDTH, 1, RANK, R)
            store_factor_tile(p_ptr + 3 * RANK, p_low, rows, M, WIDTH, 1, RANK, R)
    if SUMS:
        prior_mean_high, prior_mean_rest = split_rows(scaling * p_mean)
        prior_low_high, prior_low_rest = split_rows(low_scaling * p_low * TO_BITS)
        kl_rows = tl.zeros((ROWS,), tl.float32)
        prior_rows = tl.zeros((ROWS,), tl.float32)

    y_rows = y_ptr + before * y_stride + rows.to(tl.int64)[:, None] * y_stride
    for tile in range(chunk * chunk_tiles, tl.minimum((chunk + 1) * chunk_tiles, tl.cdiv(N, COLUMNS))):
        first = tile * COLUMNS
        columns = first + tl.arange(0, COLUMNS)
        q = _columns_tile(q_0, columns, N, q_stride, q_rank, EVEN, RANK, R)
        mean = packed_dot(mean_high, mean_rest, split_columns(q))
        q = _columns_tile(q_1, columns, N, q_stride, q_rank, EVEN, RANK, R)
        low = packed_dot(low_high, low_rest, split_columns(q))
        sigma = exp2(low) * deviation
        y = mean + sigma * normal_tile(first_row + rows, first, N, names_ptr + 3 * group, layer, COLUMNS)
        inside = (rows < M)[:, None]
        if not EVEN:
            inside = inside & (columns < N)[None, :]
        if ADD:
            y += tl.load(y_rows + columns[None, :], mask=inside, other=0.0).to(tl.float32)
        tl.store(y_rows + columns[None, :], narrowed(y, y_ptr.dtype.element_ty), mask=inside)
        if SUMS:
            q = _columns_tile(q_2, columns, N, q_stride, q_rank, EVEN, RANK, R)
            prior_mean = packed_dot(prior_mean_high, prior_mean_rest, split_columns(q))
            q = _columns_tile(q_3, columns, N, q_stride, q_rank, EVEN, RANK, R)
            prior_low = packed_dot(prior_low_high, prior_low_rest, split_columns(q))
            inverse = exp2(-prior_low) * inverse_deviation
            ratio = sigma * inverse
            inverse *= inverse  # theta's precision
            shift = mean - prior_mean
            kl = exponential_excess(prior_low - low, ratio) + shift * shift * inverse
            prior = 0.5 * prior_mean * prior_mean + prior_rate * inverse
            prior += (prior_low * FROM_BITS + offset) * (prior_shape - 1.0)
            if not EVEN:  # beyond the last column KL is zero, for its factors are
                prior = tl.where((columns < N)[None, :], prior, 0.0)
            kl_rows += tl.sum(kl, axis=1)
            prior_rows += tl.sum(prior, axis=1)

    if SUMS:
        counted = _counted(mask_ptr + before, rows, M, HAS_MASK)
        kl_sum = 0.5 * tl.sum(tl.where(counted, kl_rows, 0.0))
        prior_sum = tl.sum(tl.where(counted, prior_rows, 0.0))
        row_blocks = tl.cdiv(M, ROWS)
        program, programs = chunk * row_blocks + row_block, row_blocks * tl.num_programs(1)
        _store_sums(kl_sum, prior_sum, sums_ptr, kl_ptr, prior_ptr, tickets_ptr, program, programs)


@triton.jit
def _operand(factor, EXACT: tl.constexpr):
    """A factor as the right operand of an adjoint's product: its split, or itself."""
    if EXACT:
        return factor
    else:
        high, rest = split16(factor)
        return packed16(high, rest)


@triton.jit
def _parts_of(adjoint, EXACT: tl.constexpr):
    if EXACT:
        return adjoint, adjoint
    else:
        return split16(adjoint)


@triton.jit
def _times_columns(high, rest, q, accumulator, EXACT: tl.constexpr):
    """accumulator + adjoint times column factors."""
    if EXACT:
        return tl.dot(high, q, accumulator, input_precision="tf32x3")
    else:
        accumulator = tl.dot(high, q, accumulator)
        return tl.dot(rest, q, accumulator)


@triton.jit
def _times_rows(high, rest, p, EXACT: tl.constexpr, R: tl.constexpr):
    """Transposed adjoint times row factors, [columns, R]."""
    if EXACT:
        return tl.dot(tl.trans(high), p, input_precision="tf32x3")
    else:
        product = tl.dot(tl.trans(high), p)
        return fold(tl.dot(tl.trans(rest), p, product), R)


@triton.jit
def _accumulate_tile(
    pointer, value, columns, N, column_stride, rank_stride, fresh, RANK: tl.constexpr, R: tl.constexpr
):
    """Add to this program's own slot, or fill it where nothing is there yet."""
    if fresh == 0:
        value += factor_tile(pointer, columns, N, column_stride, rank_stride, RANK, R)
    store_factor_tile(pointer, value, columns, N, column_stride, rank_stride, RANK, R)


@triton.jit(do_not_specialize=VARYING)
def adjoint_kernel(
    dz_ptr, z_ptr, p_0, p_1, p_2, p_3, q_0, q_1, q_2, q_3, mask_ptr, names_ptr, dkl_ptr, dprior_ptr,
    parts_ptr, dp_ptr, dq_ptr, sums_ptr, kl_ptr, prior_ptr, tickets_ptr, bounds_ptr,
    size, all_rows, N, first_row, dz_stride, z_stride, p_stride, p_theta_stride, p_pair, q_group, q_stride, q_rank,
    dkl_stride, dprior_stride, slot_rows, chunk_tiles, dp_pair, dp_stride,
    layer, scaling, low_scaling, offset, deviation, prior_shape, prior_rate,
    RANK: tl.constexpr, R: tl.constexpr, EVEN: tl.constexpr, RAGGED: tl.constexpr, EXACT: tl.constexpr,
    HAS_MASK: tl.constexpr, HAS_DZ: tl.constexpr, SAMPLE: tl.constexpr, DIVERGENCE: tl.constexpr, KL: tl.constexpr,
    PRIOR: tl.constexpr, DP_PHI: tl.constexpr, DP_THETA: tl.constexpr, DQ_PHI: tl.constexpr, DQ_THETA: tl.constexpr,
    SUMS: tl.constexpr, ROWS: tl.constexpr, COLUMNS: tl.constexpr,
):  # fmt: skip
    """Adjoints of the low-rank pairs over one slot of a group's rows (grid axis 0) and one chunk of columns (axis 1).

    dz [T, N] with unit stride along N: the adjoint of Z (HAS_DZ), T (`all_rows`) the rows of all groups; dkl, dprior:
    upstream gradients of each group's KL (KL) and -log prior (PRIOR; DIVERGENCE: of either), one number or G. Written
    for the pairs asked for, phi's before theta's:
        dp [pairs][T, RANK]               of the row factors, by strides; by way of parts [chunks, T, pairs * RANK]
        dq [slots, pairs, G][N, RANK]     of the column factors, in their own strides, partial: to be summed over slots
        kl, prior                         each group's sums (SUMS), by way of sums [G, 2, programs]
        z [T, N]                          the sample itself, drawn again (SAMPLE)
    The first G tickets are the sums', then one a group and slot. Row factors as in `sample_kernel`. EXACT: products of
    fp32's accuracy, for an fp32 model. Else they have the 16 leading bits of either factor: dz itself has 8 or 11.
    """
    slot = tl.program_id(0)
    chunk = tl.program_id(1)
    group = tl.program_id(2)
    far_group = group.to(tl.int64)
    before, M = rows_of_group(bounds_ptr, group, size, RAGGED)
    p_0 += before * p_stride
    p_1 += before * p_stride + p_pair
    p_2 += before * p_theta_stride + 2 * p_pair
    p_3 += before * p_theta_stride + 3 * p_pair
    q_0 += far_group * q_group
    q_1 += far_group * q_group
    dz_ptr += before * dz_stride
    z_ptr += before * z_stride
    DP_WIDTH: tl.constexpr = (2 * DP_PHI + 2 * DP_THETA) * RANK
    THETA_FIRST: tl.constexpr = 2 * DP_PHI
    parts_ptr += before * DP_WIDTH
    own_parts = parts_ptr + chunk.to(tl.int64) * all_rows * DP_WIDTH
    pair_stride = tl.num_programs(2).to(tl.int64) * N * RANK
    dq_phi = dq_ptr + slot * (2 * DQ_PHI + 2 * DQ_THETA) * pair_stride + far_group * N * RANK
    dq_theta = dq_phi + 2 * DQ_PHI * pair_stride
    # x alone needs theta's row adjoints, and has no more bits than one part of them
    NEAR: tl.constexpr = DP_THETA and not DQ_THETA and not EXACT
    if RAGGED and slot * slot_rows >= M:
        if DQ_PHI or DQ_THETA:  # they are summed over all slots
            for tile in range(chunk * chunk_tiles, tl.minimum((chunk + 1) * chunk_tiles, tl.cdiv(N, COLUMNS))):
                columns = tile * COLUMNS + tl.arange(0, COLUMNS)
                for pair in tl.static_range(2 * DQ_PHI + 2 * DQ_THETA):
                    zero = tl.zeros((COLUMNS, R), tl.float32)
                    store_factor_tile(dq_phi + pair * pair_stride, zero, columns, N, q_stride, q_rank, RANK, R)
        return
    inverse_deviation = 1.0 / deviation
    if DIVERGENCE:
        dkl = tl.load(dkl_ptr + group * dkl_stride) if KL else 0.0
        mask_ptr += before
    if PRIOR:
        dprior = tl.load(dprior_ptr + group * dprior_stride)
    if SUMS:
        kl_rows = tl.zeros((ROWS,), tl.float32)
        prior_rows = tl.zeros((ROWS,), tl.float32)

    row_end = tl.minimum((slot + 1) * slot_rows, M)
    for row_start in range(slot * slot_rows, row_end, ROWS):
        rows = row_start + tl.arange(0, ROWS)
        fresh = (row_start == slot * slot_rows).to(tl.int32)
        p = scaling * factor_tile(p_0, rows, row_end, p_stride, 1, RANK, R)
        mean_high, mean_rest = split_rows(p)
        p_mean = _operand(p, EXACT)
        p = low_scaling * factor_tile(p_1, rows, row_end, p_stride, 1, RANK, R) * TO_BITS
        low_high, low_rest = split_rows(p)
        p_low = _operand(p, EXACT)
        WIDE: tl.constexpr = R if EXACT else 2 * R
        if DP_PHI:
            dp_mean = tl.zeros((ROWS, WIDE), tl.float32)
            dp_low = tl.zeros((ROWS, WIDE), tl.float32)
        if DIVERGENCE:
            p = scaling * factor_tile(p_2, rows, row_end, p_stride, 1, RANK, R)
            prior_mean_high, prior_mean_rest = split_rows(p)
            p_prior_mean = _operand(p, EXACT)
            p = low_scaling * factor_tile(p_3, rows, row_end, p_stride, 1, RANK, R) * TO_BITS
            prior_low_high, prior_low_rest = split_rows(p)
            p_prior_low = _operand(p, EXACT)
            counted = _counted(mask_ptr, rows, row_end, HAS_MASK)
            kl_weight = tl.where(counted, dkl, 0.0)[:, None]
            if PRIOR:
                prior_weight = tl.where(counted, dprior, 0.0)[:, None]
        if DP_THETA:
            THETA_WIDE: tl.constexpr = R if NEAR else WIDE
            dp_prior_mean = tl.zeros((ROWS, THETA_WIDE), tl.float32)
            dp_prior_low = tl.zeros((ROWS, THETA_WIDE), tl.float32)
        for tile in range(chunk * chunk_tiles, tl.minimum((chunk + 1) * chunk_tiles, tl.cdiv(N, COLUMNS))):
            first = tile * COLUMNS
            columns = first + tl.arange(0, COLUMNS)
            q_low = _columns_tile(q_1, columns, N, q_stride, q_rank, EVEN, RANK, R)
            low = packed_dot(low_high, low_rest, split_columns(q_low))
            sigma = exp2(low) * deviation
            if DIVERGENCE or DP_PHI or SAMPLE:
                q_mean = _columns_tile(q_0, columns, N, q_stride, q_rank, EVEN, RANK, R)
            if DIVERGENCE or SAMPLE:
                mean = packed_dot(mean_high, mean_rest, split_columns(q_mean))
            if DIVERGENCE:
                q_prior_mean = _columns_tile(q_2, columns, N, q_stride, q_rank, EVEN, RANK, R)
                q_prior_low = _columns_tile(q_3, columns, N, q_stride, q_rank, EVEN, RANK, R)
                prior_mean = packed_dot(prior_mean_high, prior_mean_rest, split_columns(q_prior_mean))
                prior_low = packed_dot(prior_low_high, prior_low_rest, split_columns(q_prior_low))
                inverse = exp2(-prior_low) * inverse_deviation
                ratio = sigma * inverse
                inverse *= inverse  # theta's precision
                shift = mean - prior_mean
                excess = exponential_excess(prior_low - low, ratio)
                if SUMS:
                    kl_rows += tl.sum(tl.where(counted[:, None], excess + shift * shift * inverse, 0.0), axis=1)
                    prior = 0.5 * prior_mean * prior_mean + prior_rate * inverse
                    prior += (prior_low * FROM_BITS + offset) * (prior_shape - 1.0)
                    valid = counted[:, None]
                    if not EVEN:
                        valid = valid & (columns < N)[None, :]
                    prior_rows += tl.sum(tl.where(valid, prior, 0.0), axis=1)
                pull = kl_weight * shift * inverse
                stretch = kl_weight * (excess - (prior_low - low) * FROM_BITS)
                if DP_THETA or DQ_THETA:
                    # the adjoint of theta's mean, and twice that of its log-variance, both negated
                    by_prior_mean = pull
                    by_prior_low = pull * shift + stretch
                    if PRIOR:
                        by_prior_mean -= prior_weight * prior_mean
                        by_prior_low += prior_weight * (2.0 * prior_rate * inverse - 2.0 * (prior_shape - 1.0))
                    if NEAR:
                        dp_prior_mean = tl.dot(near16(by_prior_mean), near16(q_prior_mean), dp_prior_mean)
                        dp_prior_low = tl.dot(near16(by_prior_low), near16(q_prior_low), dp_prior_low)
                    else:
                        mean_near, mean_left = _parts_of(by_prior_mean, EXACT)
                        low_near, low_left = _parts_of(by_prior_low, EXACT)
                        if DP_THETA:
                            q = _operand(q_prior_mean, EXACT)
                            dp_prior_mean = _times_columns(mean_near, mean_left, q, dp_prior_mean, EXACT)
                            q = _operand(q_prior_low, EXACT)
                            dp_prior_low = _times_columns(low_near, low_left, q, dp_prior_low, EXACT)
                        if DQ_THETA:
                            dq = -_times_rows(mean_near, mean_left, p_prior_mean, EXACT, R)
                            _accumulate_tile(dq_theta, dq, columns, N, q_stride, q_rank, fresh, RANK, R)
                            dq = _times_rows(low_near, low_left, p_prior_low, EXACT, R) * (-0.5 * FROM_BITS)
                            _accumulate_tile(dq_theta + pair_stride, dq, columns, N, q_stride, q_rank, fresh, RANK, R)
            # by_mean: the adjoint of Z's mean; by_low: twice that of its log-variance
            if HAS_DZ:
                inside = (rows < row_end)[:, None]
                if not EVEN:
                    inside = inside & (columns < N)[None, :]
                dz_rows = dz_ptr + rows.to(tl.int64)[:, None] * dz_stride
                dz = tl.load(dz_rows + columns[None, :], mask=inside, other=0.0).to(tl.float32)
                noise = normal_tile(first_row + rows, first, N, names_ptr + 3 * group, layer, COLUMNS)
                spread = sigma * noise
                by_mean = dz + pull if DIVERGENCE else dz
                by_low = dz * spread + stretch if DIVERGENCE else dz * spread
                if SAMPLE:
                    z_tile = z_ptr + rows.to(tl.int64)[:, None] * z_stride + columns[None, :]
                    tl.store(z_tile, narrowed(mean + spread, z_ptr.dtype.element_ty), mask=inside)
            elif DIVERGENCE:
                by_mean = pull
                by_low = stretch
            if DP_PHI or DQ_PHI:
                mean_near, mean_left = _parts_of(by_mean, EXACT)
                low_near, low_left = _parts_of(by_low, EXACT)
            if DP_PHI:
                dp_mean = _times_columns(mean_near, mean_left, _operand(q_mean, EXACT), dp_mean, EXACT)
                dp_low = _times_columns(low_near, low_left, _operand(q_low, EXACT), dp_low, EXACT)
            if DQ_PHI:
                dq = _times_rows(mean_near, mean_left, p_mean, EXACT, R)
                _accumulate_tile(dq_phi, dq, columns, N, q_stride, q_rank, fresh, RANK, R)
                dq = _times_rows(low_near, low_left, p_low, EXACT, R) * (0.5 * FROM_BITS)
                _accumulate_tile(dq_phi + pair_stride, dq, columns, N, q_stride, q_rank, fresh, RANK, R)
        if DP_PHI:
            if not EXACT:
                dp_mean = fold(dp_mean, R)
                dp_low = fold(dp_low, R)
            store_factor_tile(own_parts, scaling * dp_mean, rows, row_end, DP_WIDTH, 1, RANK, R)
            store_factor_tile(own_parts + RANK, 0.5 * low_scaling * dp_low, rows, row_end, DP_WIDTH, 1, RANK, R)
        if DP_THETA:
            if not EXACT and not NEAR:
                dp_prior_mean = fold(dp_prior_mean, R)
                dp_prior_low = fold(dp_prior_low, R)
            theta_parts = own_parts + THETA_FIRST * RANK
            dp_prior_mean *= -scaling
            dp_prior_low *= -0.5 * low_scaling
            store_factor_tile(theta_parts, dp_prior_mean, rows, row_end, DP_WIDTH, 1, RANK, R)
            store_factor_tile(theta_parts + RANK, dp_prior_low, rows, row_end, DP_WIDTH, 1, RANK, R)
        if DQ_PHI or DQ_THETA:
            tl.debug_barrier()  # the next rows add to what other threads of this program may have stored

    if DP_PHI or DP_THETA:
        slot_ticket = tickets_ptr + tl.num_programs(2) + group * tl.num_programs(0) + slot
        if last_to_arrive(slot_ticket, tl.num_programs(1)):
            dp_ptr += before * dp_stride
            for row_start in range(slot * slot_rows, row_end, ROWS):
                rows = row_start + tl.arange(0, ROWS)
                for pair in tl.static_range(2 * DP_PHI + 2 * DP_THETA):
                    ranks = tl.arange(0, R)
                    inside = (rows < row_end)[:, None] & (ranks < RANK)[None, :]
                    source = parts_ptr + rows.to(tl.int64)[:, None] * DP_WIDTH + pair * RANK + ranks[None, :]
                    total = tl.zeros((ROWS, R), tl.float32)
                    for _ in range(tl.num_programs(1)):
                        total += tl.load(source, mask=inside, other=0.0, cache_modifier=".cg")
                        source += all_rows.to(tl.int64) * DP_WIDTH
                    store_factor_tile(dp_ptr + pair * dp_pair, total, rows, row_end, dp_stride, 1, RANK, R)
    if SUMS:
        slots = tl.cdiv(M, slot_rows)
        program, programs = chunk * slots + slot, slots * tl.num_programs(1)
        _store_sums(
            0.5 * tl.sum(kl_rows), tl.sum(prior_rows), sums_ptr, kl_ptr, prior_ptr, tickets_ptr, program, programs
        )
