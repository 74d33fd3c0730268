"""Device functions that the kernels share: the hardware's functions, noise, factor tiles and their splits, divergence.

Low-rank arithmetic is fp32 on tensor cores, which take 19 bits of an fp32 number (TF32) or 16-bit ones. So a tile is
split once into a rounded part and the rest, both exact for the tensor core, and the parts stand side by side along the
product's inner axis: see `split_columns`.
"""

from __future__ import annotations

import triton
import triton.language as tl

from abmll.kernels.noise import LANES, MULTIPLIER_0, MULTIPLIER_1, ROUNDS, WEYL_0, WEYL_1

QUAD = tl.constexpr(LANES)
PHILOX_ROUNDS = tl.constexpr(ROUNDS)
PHILOX_0, PHILOX_1 = tl.constexpr(MULTIPLIER_0), tl.constexpr(MULTIPLIER_1)
KEY_STEP_0, KEY_STEP_1 = tl.constexpr(WEYL_0), tl.constexpr(WEYL_1)
# The interpreter knows no assembly, multiplies bf16 tiles wrongly, and truncates to bf16 where a GPU rounds.
INTERPRETED = tl.constexpr(triton.knobs.runtime.interpret)


@triton.jit
def _hardware(NAME: tl.constexpr, x):
    """One instruction, subnormal numbers as zero. Errors by the PTX manual: ex2 2 ulp; lg2 2^-22; sin, cos 2^-20.5
    between -pi and pi; sqrt 1 ulp.
    """
    return tl.inline_asm_elementwise(NAME + ".approx.ftz.f32 $0, $1;", "=f,f", [x], tl.float32, is_pure=True, pack=1)


@triton.jit
def exp2(x):
    return tl.exp2(x) if INTERPRETED else _hardware("ex2", x)


@triton.jit
def box_muller(word_0, word_1):
    """Two tiles of 32-bit words to two tiles of normals, with 24 bits of each word as in `noise.box_muller`.

    The angle is reduced to [-pi, pi), where the hardware's functions are at their best; half a turn changes both signs.
    Near 1 the logarithm's error may exceed it: the absolute value keeps the root real.
    """
    uniform = (word_0 >> 8).to(tl.int32).to(tl.float32) * 5.9604644775390625e-8 + 5.9604644775390625e-8
    angle = (word_1 >> 8).to(tl.int32).to(tl.float32) * 3.7450702829239527e-7 - 3.141592653589793
    if INTERPRETED:
        radius = -tl.sqrt(tl.abs(tl.log2(uniform)) * 1.3862943611198906)
        return radius * tl.cos(angle), radius * tl.sin(angle)
    else:
        radius = -_hardware("sqrt", tl.abs(_hardware("lg2", uniform)) * 1.3862943611198906)
        return radius * _hardware("cos", angle), radius * _hardware("sin", angle)


@triton.jit
def philox(seed, c0, c1, c2, c3):
    """`noise.philox` of a 64-bit key. One 64-bit product a round and word pair gives the high and the low word."""
    k0, k1 = seed.to(tl.uint32), (seed >> 32).to(tl.uint32)
    for _ in tl.static_range(PHILOX_ROUNDS):
        product_0 = c0.to(tl.uint64) * PHILOX_0
        product_1 = c2.to(tl.uint64) * PHILOX_1
        c0, c2 = (product_1 >> 32).to(tl.uint32) ^ c1 ^ k0, (product_0 >> 32).to(tl.uint32) ^ c3 ^ k1
        c1, c3 = product_1.to(tl.uint32), product_0.to(tl.uint32)
        k0, k1 = k0 + KEY_STEP_0, k1 + KEY_STEP_1
    return c0, c1, c2, c3


@triton.jit
def normal_tile(rows, first_column, columns, name_ptr, layer, WIDTH: tl.constexpr):
    """Standard normals [len(rows), WIDTH] from `first_column` on (both multiples of 4) of a matrix with `columns`.

    Their bits depend on the element's own indices and the integers alone, see `noise.standard_normal`. One Philox call
    serves four neighbours. The name is one row of `NoiseKey.rows`: seed, step, group.
    """
    seed = tl.load(name_ptr).to(tl.uint64)
    step = tl.load(name_ptr + 1).to(tl.uint32)
    group = tl.load(name_ptr + 2).to(tl.uint32)
    quads = tl.cast(tl.cdiv(columns, QUAD), tl.uint32)  # an argument of 1 is a constant, which has no `to`
    within = (first_column // QUAD + tl.arange(0, WIDTH // QUAD)).to(tl.uint32)
    # 32-bit words: the caller has checked that rows x quads fits them
    counter = rows.to(tl.uint32)[:, None] * quads + within[None, :]
    zero = counter * 0
    words = philox(seed, counter, zero + group, zero + step, zero + tl.cast(layer, tl.uint32))
    normal_0, normal_1 = box_muller(words[0], words[1])
    normal_2, normal_3 = box_muller(words[2], words[3])
    # the last index of the outer join is the low bit of the lane
    lanes = tl.join(tl.join(normal_0, normal_2), tl.join(normal_1, normal_3))
    return tl.reshape(lanes, (rows.shape[0], WIDTH))


@triton.jit
def rows_of_group(bounds_ptr, group, size, RAGGED: tl.constexpr):
    """(rows before it, rows) of a group in matrices that hold all groups' rows one after another: `size` for each or,
    RAGGED, from bounds[group] to bounds[group + 1].
    """
    if RAGGED:
        before = tl.load(bounds_ptr + group)
        return before.to(tl.int64), tl.load(bounds_ptr + group + 1) - before
    else:
        return group.to(tl.int64) * size, size


@triton.jit
def factor_tile(pointer, rows, row_limit, row_stride, rank_stride, RANK: tl.constexpr, R: tl.constexpr):
    """fp32 tile [len(rows), R] of a factor [row_limit, RANK] with any strides; zero beyond either."""
    ranks = tl.arange(0, R)
    inside = (rows < row_limit)[:, None] & (ranks < RANK)[None, :]
    offsets = rows.to(tl.int64)[:, None] * row_stride + ranks[None, :] * rank_stride
    return tl.load(pointer + offsets, mask=inside, other=0.0)


@triton.jit
def store_factor_tile(pointer, value, rows, row_limit, row_stride, rank_stride, RANK: tl.constexpr, R: tl.constexpr):
    """The other direction of `factor_tile`."""
    ranks = tl.arange(0, R)
    inside = (rows < row_limit)[:, None] & (ranks < RANK)[None, :]
    tl.store(pointer + rows.to(tl.int64)[:, None] * row_stride + ranks[None, :] * rank_stride, value, mask=inside)


@triton.jit
def narrowed(value, dtype: tl.constexpr):
    """fp32 values in the model's own dtype, rounded to nearest."""
    if INTERPRETED and dtype == tl.bfloat16:
        bits = value.to(tl.uint32, bitcast=True)
        bits = (bits + 0x7FFF + ((bits >> 16) & 1)) & 0xFFFF0000
        value = tl.where(value == value, bits.to(tl.float32, bitcast=True), value)
    return value.to(dtype)


@triton.jit
def _tf32(x):
    """x rounded to the 11 bits of TF32. What is left of x then has 12, of which a tensor core drops at most one."""
    bits = (x.to(tl.uint32, bitcast=True) + 0x1000) & 0xFFFFE000
    return bits.to(tl.float32, bitcast=True)


@triton.jit
def pack(a, b):
    """Two tiles [M, R] to one [M, 2R] whose columns alternate between them: neighbours stay in one register pair."""
    return tl.reshape(tl.join(a, b), (a.shape[0], 2 * a.shape[1]))


@triton.jit
def fold(packed, R: tl.constexpr):
    """[M, 2R] to [M, R]: the sum of neighbours, which `pack` put beside each other."""
    return tl.sum(tl.reshape(packed, (packed.shape[0], R, 2)), axis=2)


@triton.jit
def split_rows(p):
    """Both left operands of `packed_dot` for an fp32 tile [M, R]."""
    high = _tf32(p)
    rest = p - high
    return pack(high, high), pack(rest, rest)


@triton.jit
def split_columns(q):
    """The right operand of `packed_dot` for an fp32 tile [N, R]: each rounded number beside its rest."""
    high = _tf32(q)
    return pack(high, q - high)


@triton.jit
def packed_dot(p_high, p_rest, q):
    """fp32 product P Q^T with fp32's accuracy: all four products of the two splits, in two TF32 products."""
    right = tl.trans(q)
    product = tl.dot(p_rest, right, input_precision="tf32")
    return tl.dot(p_high, right, product, input_precision="tf32")


# Assembly that makes an operand of a 16-bit product is not called pure. The compiler would look through it for how the
# operand came to be, find an 8-bit mask or a join, and lay registers out as for 8-bit products, two moves a register.
@triton.jit
def packed16(a, b):
    """`pack` of two bf16 tiles."""
    if INTERPRETED:
        return pack(a, b)
    else:
        return tl.inline_asm_elementwise("mov.b32 $0, $1;", "=r,r", [pack(a, b)], tl.bfloat16, is_pure=False, pack=2)


@triton.jit
def near16(x):
    """bf16's nearest values, in a dtype that the dot can take."""
    if INTERPRETED:
        return narrowed(x, tl.bfloat16).to(tl.float32)
    else:
        return tl.inline_asm_elementwise(
            "cvt.rn.bf16x2.f32 $0, $2, $1;", "=r,r,r", [x], tl.bfloat16, is_pure=False, pack=2
        )


@triton.jit
def operand16(x):
    """A bf16 tile in a dtype that the dot can take."""
    return x.to(tl.float32) if INTERPRETED else x


@triton.jit
def split16(x):
    """bf16's nearest values and those of the rest: 16 bits of fp32's 24."""
    if INTERPRETED:
        high = narrowed(x, tl.bfloat16).to(tl.float32)
        return high, narrowed(x - high, tl.bfloat16).to(tl.float32)
    else:
        return tl.inline_asm_elementwise(
            """{
            .reg .b32 low, high;
            cvt.rn.bf16x2.f32 $0, $3, $2;
            shl.b32 low, $0, 16;
            and.b32 high, $0, 0xffff0000;
            sub.rn.f32 low, $2, low;
            sub.rn.f32 high, $3, high;
            cvt.rn.bf16x2.f32 $1, high, low;
            }""",
            "=&r,=r,r,r",
            [x],
            (tl.bfloat16, tl.bfloat16),
            is_pure=False,
            pack=2,
        )


# Log-variances are held as log2 of the standard deviation, which the hardware's exponential takes as it is, and without
# the offset c: l = 2 ln(2) bits + c.
TO_BITS = tl.constexpr(0.7213475204444817)  # 1 / (2 ln 2)
FROM_BITS = tl.constexpr(1.3862943611198906)  # 2 ln 2


@triton.jit
def exponential_excess(bits, ratio):
    """exp(-x) - 1 + x of a difference of log-variances x, `bits` in the units above; ratio: exp(-x / 2).

    Near zero, where phi and theta usually are, without the cancellation: below |x| = 0.25 by a polynomial (Chebyshev
    nodes, relative error 2.6e-8).
    """
    series = 0.00987477661 * bits - 0.0427468249
    series = series * bits + 0.153889864
    series = series * bits - 0.444032223
    series = series * bits + 0.960906028
    return tl.where(tl.abs(bits) < 0.18, series * bits * bits, ratio * ratio - 1.0 + bits * FROM_BITS)


@triton.jit
def last_to_arrive(ticket_ptr, count):
    """Whether this is the last of `count` programs to come here: then all that they stored can be read. The ticket is
    zero before and afterwards.
    """
    tl.debug_barrier()  # what other threads of this program stored is seen with the ticket
    arrived = tl.atomic_add(ticket_ptr, 1, sem="acq_rel", scope="gpu")
    last = arrived == count - 1
    if last:
        tl.store(ticket_ptr, 0)
    return last
