"""Matrix products around one adapted projection: with the low-rank factors beside the frozen weight, in one launch.

    forward     [y0, p] = x [W0; A]^T       y0 = W0 x + bias in x's dtype, p in fp32
    backward    dx = [dy, dp] [W0; A]       and dA = dp^T x

x and dy are read once for W0 and all four pairs. p keeps fp32's accuracy although x is 16-bit: see `tiles.wide_dot`.
With BASE false the product with W0 is left to the library, and the kernels do only what the factors need.
"""

from __future__ import annotations

import triton
import triton.language as tl

from abmll.kernels.fused.tiles import (
    factor_tile,
    narrow_dot,
    narrowed,
    store_factor_tile,
    wide_dot,
)


@triton.jit
def _row_factor_tile(pointer, ks, K, RANK: tl.constexpr, R: tl.constexpr):
    """fp32 tile [R, len(ks)] of A [RANK, K]; zero beyond either."""
    ranks = tl.arange(0, R)
    inside = (ranks < RANK)[:, None] & (ks < K)[None, :]
    return tl.load(pointer + ranks.to(tl.int64)[:, None] * K + ks[None, :], mask=inside, other=0.0)


@triton.jit
def _project_rows(
    x_ptr, a_0, a_1, a_2, a_3, p_ptr, block, first, T, K, x_stride, part_depth,
    PAIRS: tl.constexpr, RANK: tl.constexpr, R: tl.constexpr, ROWS: tl.constexpr, DEPTH: tl.constexpr,
):  # fmt: skip
    """p of one block of rows, over a part of K from `first` on: all pairs from one pass over x."""
    rows = block * ROWS + tl.arange(0, ROWS)
    inside = (rows < T)[:, None]
    x_rows = x_ptr + rows.to(tl.int64)[:, None] * x_stride
    p_0 = tl.zeros((ROWS, R), tl.float32)
    p_1 = tl.zeros((ROWS, R), tl.float32)
    if PAIRS == 4:
        p_2 = tl.zeros((ROWS, R), tl.float32)
        p_3 = tl.zeros((ROWS, R), tl.float32)
    for start in range(first, tl.minimum(first + part_depth, K), DEPTH):
        ks = start + tl.arange(0, DEPTH)
        x = tl.load(x_rows + ks[None, :], mask=inside & (ks < K)[None, :], other=0.0)
        p_0 = wide_dot(x, tl.trans(_row_factor_tile(a_0, ks, K, RANK, R)), p_0)
        p_1 = wide_dot(x, tl.trans(_row_factor_tile(a_1, ks, K, RANK, R)), p_1)
        if PAIRS == 4:
            p_2 = wide_dot(x, tl.trans(_row_factor_tile(a_2, ks, K, RANK, R)), p_2)
            p_3 = wide_dot(x, tl.trans(_row_factor_tile(a_3, ks, K, RANK, R)), p_3)
    store_factor_tile(p_ptr, p_0, rows, T, PAIRS * RANK, RANK, R)
    store_factor_tile(p_ptr + RANK, p_1, rows, T, PAIRS * RANK, RANK, R)
    if PAIRS == 4:
        store_factor_tile(p_ptr + 2 * RANK, p_2, rows, T, PAIRS * RANK, RANK, R)
        store_factor_tile(p_ptr + 3 * RANK, p_3, rows, T, PAIRS * RANK, RANK, R)


@triton.jit
def _tile_of(program, rows, columns, ROWS: tl.constexpr, COLUMNS: tl.constexpr, BAND: tl.constexpr):
    """Programs walk bands of BAND row blocks, so that a column block of the weight is read once a band."""
    row_blocks = tl.cdiv(rows, ROWS)
    column_blocks = tl.cdiv(columns, COLUMNS)
    band = program // (BAND * column_blocks)
    height = tl.minimum(row_blocks - band * BAND, BAND)
    within = program % (BAND * column_blocks)
    return band * BAND + within % height, within // height


@triton.jit
def _base_tile(
    x_ptr, w_ptr, bias_ptr, y_ptr, program, T, N, K, x_stride, w_stride,
    HAS_BIAS: tl.constexpr, ROWS: tl.constexpr, COLUMNS: tl.constexpr, DEPTH: tl.constexpr, BAND: tl.constexpr,
):  # fmt: skip
    """One tile of y0 = x W0^T + bias."""
    row_block, column_block = _tile_of(program, T, N, ROWS, COLUMNS, BAND)
    rows = row_block * ROWS + tl.arange(0, ROWS)
    columns = column_block * COLUMNS + tl.arange(0, COLUMNS)
    # rows beyond the last are read again from the first: cheaper than a mask, and never stored
    x_rows = x_ptr + (rows % T).to(tl.int64)[:, None] * x_stride
    w_rows = w_ptr + (columns % N).to(tl.int64)[None, :] * w_stride
    accumulator = tl.zeros((ROWS, COLUMNS), tl.float32)
    for start in range(0, K, DEPTH):
        ks = start + tl.arange(0, DEPTH)
        x = tl.load(x_rows + ks[None, :], mask=(ks < K)[None, :], other=0.0)
        w = tl.load(w_rows + ks[:, None], mask=(ks < K)[:, None], other=0.0)
        accumulator = narrow_dot(x, w, accumulator)
    if HAS_BIAS:
        accumulator += tl.load(bias_ptr + columns, mask=columns < N, other=0.0).to(tl.float32)[None, :]
    offsets = rows.to(tl.int64)[:, None] * N + columns[None, :]
    inside = (rows < T)[:, None] & (columns < N)[None, :]
    tl.store(y_ptr + offsets, narrowed(accumulator, y_ptr.dtype.element_ty), mask=inside)


# Numbers that differ from batch to batch: nothing is compiled anew for them.
VARYING = ["T", "G", "chunk_rows", "parts"]


@triton.jit(do_not_specialize=VARYING)
def forward_kernel(
    x_ptr, w_ptr, bias_ptr, a_0, a_1, a_2, a_3, y_ptr, p_ptr,
    T, N, K, G, x_group, x_stride, w_stride, parts, part_depth,
    PAIRS: tl.constexpr, RANK: tl.constexpr, R: tl.constexpr, BASE: tl.constexpr, HAS_BIAS: tl.constexpr,
    ROWS: tl.constexpr, COLUMNS: tl.constexpr, DEPTH: tl.constexpr, BAND: tl.constexpr, P_ROWS: tl.constexpr,
):  # fmt: skip
    """[y0, p] of one group a second grid axis. The first programs make p: they must not be the last to end.

    x [G, T, K] with unit stride along K; w [N, K]; a_0, a_1 phi's [G, RANK, K]; a_2, a_3 theta's [RANK, K] (PAIRS 4);
    y [G, T, N]; p [parts, G, T, PAIRS * RANK], each over part_depth of K (a multiple of DEPTH), to be summed.
    """
    program = tl.program_id(0)
    group = tl.program_id(1).to(tl.int64)
    x_ptr += group * x_group
    p_programs = tl.cdiv(T, P_ROWS) * parts
    if program < p_programs:
        own = group * RANK * K
        part = program % parts
        p_ptr += (part * G.to(tl.int64) + group) * T * (PAIRS * RANK)
        _project_rows(
            x_ptr, a_0 + own, a_1 + own, a_2, a_3, p_ptr, program // parts, part * part_depth, T, K, x_stride,
            part_depth, PAIRS, RANK, R, P_ROWS, DEPTH,
        )  # fmt: skip
    else:
        if BASE:
            _base_tile(
                x_ptr, w_ptr, bias_ptr, y_ptr + group * T * N, program - p_programs, T, N, K, x_stride, w_stride,
                HAS_BIAS, ROWS, COLUMNS, DEPTH, BAND,
            )  # fmt: skip


@triton.jit(do_not_specialize=VARYING)
def input_gradient_kernel(
    dy_ptr, w_ptr, dp_ptr, a_0, a_1, a_2, a_3, dx_ptr, T, N, K, dy_group, dy_stride, w_stride,
    PAIRS: tl.constexpr, RANK: tl.constexpr, R: tl.constexpr, BASE: tl.constexpr, HAS_DY: tl.constexpr,
    ROWS: tl.constexpr, COLUMNS: tl.constexpr, DEPTH: tl.constexpr, BAND: tl.constexpr,
):  # fmt: skip
    """dx = dy W0 + sum over pairs of dp A; without BASE, the second part is added to what dx holds.

    dy [G, T, N] with unit stride along N; dp [G, T, PAIRS * RANK]; factors as in `forward_kernel`; dx [G, T, K].
    """
    group = tl.program_id(1).to(tl.int64)
    row_block, column_block = _tile_of(tl.program_id(0), T, K, ROWS, COLUMNS, BAND)
    rows = row_block * ROWS + tl.arange(0, ROWS)
    ks = column_block * COLUMNS + tl.arange(0, COLUMNS)
    offsets = rows.to(tl.int64)[:, None] * K + ks[None, :]
    inside = (rows < T)[:, None] & (ks < K)[None, :]
    dx_ptr += group * T * K
    if BASE and HAS_DY:
        dy_rows = dy_ptr + group * dy_group + (rows % T).to(tl.int64)[:, None] * dy_stride
        w_columns = w_ptr + ks[None, :]
        accumulator = tl.zeros((ROWS, COLUMNS), tl.float32)
        for start in range(0, N, DEPTH):
            ns = start + tl.arange(0, DEPTH)
            dy = tl.load(dy_rows + ns[None, :], mask=(ns < N)[None, :], other=0.0)
            w_inside = (ns < N)[:, None] & (ks < K)[None, :]
            w = tl.load(w_columns + ns.to(tl.int64)[:, None] * w_stride, mask=w_inside, other=0.0)
            accumulator = narrow_dot(dy, w, accumulator)
    elif HAS_DY:
        accumulator = tl.load(dx_ptr + offsets, mask=inside, other=0.0).to(tl.float32)
    else:
        accumulator = tl.zeros((ROWS, COLUMNS), tl.float32)
    WIDTH: tl.constexpr = PAIRS * RANK
    dp_ptr += group * T * WIDTH
    own = group * RANK * K
    a_0 += own
    a_1 += own
    PRECISION: tl.constexpr = "tf32x3" if dx_ptr.dtype.element_ty == tl.float32 else "tf32"
    accumulator = tl.dot(
        factor_tile(dp_ptr, rows, T, WIDTH, 1, RANK, R), _row_factor_tile(a_0, ks, K, RANK, R), accumulator,
        input_precision=PRECISION,
    )  # fmt: skip
    accumulator = tl.dot(
        factor_tile(dp_ptr + RANK, rows, T, WIDTH, 1, RANK, R), _row_factor_tile(a_1, ks, K, RANK, R), accumulator,
        input_precision=PRECISION,
    )  # fmt: skip
    if PAIRS == 4:
        accumulator = tl.dot(
            factor_tile(dp_ptr + 2 * RANK, rows, T, WIDTH, 1, RANK, R), _row_factor_tile(a_2, ks, K, RANK, R),
            accumulator, input_precision=PRECISION,
        )  # fmt: skip
        accumulator = tl.dot(
            factor_tile(dp_ptr + 3 * RANK, rows, T, WIDTH, 1, RANK, R), _row_factor_tile(a_3, ks, K, RANK, R),
            accumulator, input_precision=PRECISION,
        )  # fmt: skip
    tl.store(dx_ptr + offsets, narrowed(accumulator, dx_ptr.dtype.element_ty), mask=inside)


@triton.jit
def _store_row_factor_tile(pointer, value, ks, K, RANK: tl.constexpr, R: tl.constexpr):
    ranks = tl.arange(0, R)
    inside = (ranks < RANK)[:, None] & (ks < K)[None, :]
    tl.store(pointer + ranks.to(tl.int64)[:, None] * K + ks[None, :], value, mask=inside)


@triton.jit(do_not_specialize=VARYING)
def factor_gradient_kernel(
    dp_ptr, x_ptr, da_ptr, T, K, G, x_group, x_stride, chunk_rows,
    WIDTH: tl.constexpr, FIRST: tl.constexpr, PAIRS: tl.constexpr, RANK: tl.constexpr, R: tl.constexpr,
    ROWS: tl.constexpr, COLUMNS: tl.constexpr,
):  # fmt: skip
    """dA = dp^T x for PAIRS pairs from the FIRST on, over one chunk of rows (grid axis 1).

    dp [G, T, WIDTH]; x [G, T, K]; da [chunks, PAIRS, G, RANK, K].
    """
    ks = tl.program_id(0) * COLUMNS + tl.arange(0, COLUMNS)
    chunk = tl.program_id(1)
    group = tl.program_id(2).to(tl.int64)
    x_ptr += group * x_group
    dp_ptr += group * T * WIDTH + FIRST * RANK
    da_0 = tl.zeros((R, COLUMNS), tl.float32)
    da_1 = tl.zeros((R, COLUMNS), tl.float32)
    if PAIRS == 4:
        da_2 = tl.zeros((R, COLUMNS), tl.float32)
        da_3 = tl.zeros((R, COLUMNS), tl.float32)
    end = tl.minimum((chunk + 1) * chunk_rows, T)
    for start in range(chunk * chunk_rows, end, ROWS):
        rows = start + tl.arange(0, ROWS)
        inside = (rows < end)[:, None] & (ks < K)[None, :]
        x = tl.load(x_ptr + rows.to(tl.int64)[:, None] * x_stride + ks[None, :], mask=inside, other=0.0)
        da_0 = wide_dot(tl.trans(factor_tile(dp_ptr, rows, end, WIDTH, 1, RANK, R)), x, da_0)
        da_1 = wide_dot(tl.trans(factor_tile(dp_ptr + RANK, rows, end, WIDTH, 1, RANK, R)), x, da_1)
        if PAIRS == 4:
            da_2 = wide_dot(tl.trans(factor_tile(dp_ptr + 2 * RANK, rows, end, WIDTH, 1, RANK, R)), x, da_2)
            da_3 = wide_dot(tl.trans(factor_tile(dp_ptr + 3 * RANK, rows, end, WIDTH, 1, RANK, R)), x, da_3)
    pair_stride = tl.cast(G, tl.int64) * RANK * K
    da_ptr += chunk * PAIRS * pair_stride + group * RANK * K
    _store_row_factor_tile(da_ptr, da_0, ks, K, RANK, R)
    _store_row_factor_tile(da_ptr + pair_stride, da_1, ks, K, RANK, R)
    if PAIRS == 4:
        _store_row_factor_tile(da_ptr + 2 * pair_stride, da_2, ks, K, RANK, R)
        _store_row_factor_tile(da_ptr + 3 * pair_stride, da_3, ks, K, RANK, R)
