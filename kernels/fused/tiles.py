"""Device functions that the kernels of both posteriors share: a tile of noise, of a low-rank product, of divergence.

Low-rank arithmetic is fp32. A product of two fp32 tiles runs as three TF32 products (`tf32x3`), which keeps fp32's
accuracy on tensor cores; a product of a 16-bit tile and an fp32 tile splits the latter, see `wide_dot`.
"""

from __future__ import annotations

import triton
import triton.language as tl

from abmll.kernels.noise import LANES, ROUNDS

QUAD = tl.constexpr(LANES)
PHILOX_ROUNDS = tl.constexpr(ROUNDS)
# The interpreter multiplies bf16 tiles wrongly, and truncates to bf16 where a GPU rounds, without a word.
INTERPRETED = tl.constexpr(triton.knobs.runtime.interpret)


@triton.jit
def box_muller(word_0, word_1):
    """Two tiles of 32-bit words to two tiles of normals, with 24 bits of each word as in `noise.box_muller`.

    sin and cos of a turn are polynomials after an exact reduction to an eighth of a turn: the library's own would bring
    a slow path for large arguments, with its stack.
    """
    radius = tl.sqrt(-2.0 * tl.log(((word_0 >> 8) + 1).to(tl.float32) * 5.9604644775390625e-8))
    quarters = (word_1 >> 8).to(tl.float32) * 2.384185791015625e-7  # in [0, 4), exact
    quadrant = tl.floor(quarters + 0.5)
    angle = (quarters - quadrant) * 1.5707963267948966  # in [-pi/4, pi/4]
    square = angle * angle
    sine = 2.7557319e-6 * square - 1.9841270e-4
    sine = sine * square + 8.3333333e-3
    sine = sine * square - 0.16666667
    sine = sine * square * angle + angle
    cosine = 2.4801587e-5 * square - 1.3888889e-3
    cosine = cosine * square + 4.1666667e-2
    cosine = cosine * square - 0.5
    cosine = cosine * square + 1.0
    turn = quadrant.to(tl.int32)
    odd = (turn & 1) == 1
    first = tl.where(odd, sine, cosine)
    second = tl.where(odd, cosine, sine)
    first = tl.where(((turn + 1) & 2) == 2, -first, first)
    second = tl.where((turn & 2) == 2, -second, second)
    return radius * first, radius * second


@triton.jit
def normal_tile(rows, first_column, columns, name_ptr, layer, WIDTH: tl.constexpr):
    """Standard normals [len(rows), WIDTH] from `first_column` on (both multiples of 4) of a matrix with `columns`.

    Their bits depend on the element's own indices and the integers alone, see `noise.standard_normal`. One Philox call
    serves four neighbours. The name is one row of `NoiseKey.rows`: seed, step, group.
    """
    seed = tl.load(name_ptr)
    step = tl.load(name_ptr + 1).to(tl.uint32)
    group = tl.load(name_ptr + 2).to(tl.uint32)
    quads = tl.cdiv(columns, QUAD)
    within = first_column // QUAD + tl.arange(0, WIDTH // QUAD)
    # 32-bit words that may wrap as signed numbers; the caller has checked that rows x quads fits 32 bits
    counter = rows.to(tl.uint32)[:, None] * quads + within.to(tl.uint32)[None, :]
    zero = counter * 0
    words = tl.philox(seed, counter, zero + group, zero + step, zero + layer.to(tl.uint32), n_rounds=PHILOX_ROUNDS)
    normal_0, normal_1 = box_muller(words[0], words[1])
    normal_2, normal_3 = box_muller(words[2], words[3])
    # the last index of the outer join is the low bit of the lane
    lanes = tl.join(tl.join(normal_0, normal_2), tl.join(normal_1, normal_3))
    return tl.reshape(lanes, (rows.shape[0], WIDTH))


@triton.jit
def factor_tile(pointer, rows, row_limit, row_stride, rank_stride, RANK: tl.constexpr, R: tl.constexpr):
    """fp32 tile [len(rows), R] of a factor [row_limit, RANK] with any strides; zero beyond either."""
    ranks = tl.arange(0, R)
    inside = (rows < row_limit)[:, None] & (ranks < RANK)[None, :]
    offsets = rows.to(tl.int64)[:, None] * row_stride + ranks[None, :] * rank_stride
    return tl.load(pointer + offsets, mask=inside, other=0.0)


@triton.jit
def store_factor_tile(pointer, value, rows, row_limit, row_stride, RANK: tl.constexpr, R: tl.constexpr):
    """The other direction of `factor_tile`, with unit stride along the rank."""
    ranks = tl.arange(0, R)
    inside = (rows < row_limit)[:, None] & (ranks < RANK)[None, :]
    tl.store(pointer + rows.to(tl.int64)[:, None] * row_stride + ranks[None, :], value, mask=inside)


@triton.jit
def dot(a, b):
    """fp32 product of two fp32 tiles with fp32's accuracy."""
    return tl.dot(a, b, input_precision="tf32x3")


@triton.jit
def narrow_dot(a, b, accumulator):
    """accumulator + a b for two tiles of the model's own dtype, fp32 accumulation."""
    if a.dtype == tl.float32 or INTERPRETED:
        return tl.dot(a.to(tl.float32), b.to(tl.float32), accumulator, input_precision="tf32x3")
    else:
        return tl.dot(a, b, accumulator)


@triton.jit
def narrowed(value, dtype: tl.constexpr):
    """fp32 values in the model's own dtype, rounded to nearest."""
    if INTERPRETED and dtype == tl.bfloat16:
        bits = value.to(tl.uint32, bitcast=True)
        bits = (bits + 0x7FFF + ((bits >> 16) & 1)) & 0xFFFF0000
        value = tl.where(value == value, bits.to(tl.float32, bitcast=True), value)
    return value.to(dtype)


@triton.jit
def _rounded(a):
    """bf16's nearest values, in a dtype that the dot can take."""
    near = a if a.dtype == tl.bfloat16 else narrowed(a, tl.bfloat16)
    if INTERPRETED:
        return near.to(tl.float32)
    else:
        return near


@triton.jit
def wide_dot(a, b, accumulator):
    """accumulator + a b where one tile is fp32 and the other is in the model's dtype.

    For bf16 the fp32 tile is split into three bf16 parts (3 x 8 bits hold fp32's 24), so that nothing is lost: with a
    16-bit factor the differences between phi and theta, which the KL is made of, would be below the rounding. Tensor
    cores truncate when they add to an accumulator, which over all of K would show: each block starts from zero and is
    added by plain fp32 arithmetic.
    """
    if a.dtype == tl.bfloat16:
        high = _rounded(b)
        rest = b - high.to(tl.float32)
        middle = _rounded(rest)
        low = _rounded(rest - middle.to(tl.float32))
        narrow = _rounded(a)
        product = tl.dot(narrow, low)
        product = tl.dot(narrow, middle, product)
        return accumulator + tl.dot(narrow, high, product)
    elif b.dtype == tl.bfloat16:
        high = _rounded(a)
        rest = a - high.to(tl.float32)
        middle = _rounded(rest)
        low = _rounded(rest - middle.to(tl.float32))
        narrow = _rounded(b)
        product = tl.dot(low, narrow)
        product = tl.dot(middle, narrow, product)
        return accumulator + tl.dot(high, narrow, product)
    else:
        return accumulator + tl.dot(a.to(tl.float32), b.to(tl.float32), input_precision="tf32x3")


@triton.jit
def exponential_excess(x):
    """exp(-x) - 1 and exp(-x) - 1 + x without the cancellation near zero, where phi and theta usually are."""
    series = 1.9841270e-4 * x - 1.3888889e-3
    series = series * x + 8.3333333e-3
    series = series * x - 4.1666667e-2
    series = series * x + 0.16666667
    series = 0.5 - series * x
    small = tl.abs(x) < 0.25
    excess = tl.where(small, series * x * x, tl.exp(-x) - 1.0 + x)
    return tl.where(small, excess - x, tl.exp(-x) - 1.0), excess


@triton.jit
def divergence_tile(mean_q, low_q, mean_p, low_p, offset, prior_shape, prior_rate):
    """KL(q || p) and -log prior(p), elementwise as in `reference`; `low` is a log-variance without its offset c."""
    _, excess = exponential_excess(low_p - low_q)
    log_variance = low_p + offset
    precision = tl.exp(-log_variance)
    shift = mean_q - mean_p
    kl = 0.5 * (excess + shift * shift * precision)
    prior = 0.5 * mean_p * mean_p + (prior_shape - 1.0) * log_variance + prior_rate * precision
    return kl, prior


@triton.jit
def divergence_gradient_tile(
    mean_q, low_q, mean_p, low_p, offset, prior_shape, prior_rate, kl_weight, prior_weight, valid
):
    """Gradients of kl_weight KL + prior_weight (-log prior) by mean_q, low_q, mean_p, low_p; zero outside `valid`."""
    ratio_minus_one, _ = exponential_excess(low_p - low_q)
    precision = tl.exp(-low_p - offset)
    shift = mean_q - mean_p
    pull = kl_weight * shift * precision
    by_low_p = -0.5 * kl_weight * (ratio_minus_one + shift * shift * precision)
    by_low_p += prior_weight * (prior_shape - 1.0 - prior_rate * precision)
    by_mean_p = prior_weight * mean_p - pull
    return (
        tl.where(valid, pull, 0.0),
        tl.where(valid, 0.5 * kl_weight * ratio_minus_one, 0.0),
        tl.where(valid, by_mean_p, 0.0),
        tl.where(valid, by_low_p, 0.0),
    )
