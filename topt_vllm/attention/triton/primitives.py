"""Device functions that the kernels share."""

import triton
import triton.language as tl

LOG2E = tl.constexpr(1.4426950408889634)
# Lower than any finite score, and finite: −inf minus −inf is NaN.
LOWEST = tl.constexpr(-1e30)

# Formats of stored K and V. Not every target can convert every fp8, so their bits are decoded with integers.
PLAIN = tl.constexpr(0)
E4M3FN = tl.constexpr(1)
E5M2 = tl.constexpr(2)
E4M3FNUZ = tl.constexpr(3)


@triton.jit
def decode_stored(stored, FORMAT: tl.constexpr, COMPUTE: tl.constexpr, CONVERTED: tl.constexpr = False):
    """Elements of the cache as ``COMPUTE``, exactly; fp8 comes as uint8.

    The fields of an fp8 number are those of a float16 with a smaller exponent: shifted into place they are off by a
    power of two, the difference of the exponents' biases, subnormals included.

    Args:
        stored: Elements.
        FORMAT: Of them.
        COMPUTE: Of the result.
        CONVERTED: Whether the target has an instruction for e4m3, which is a sixth of the work.
    """
    if FORMAT == PLAIN:
        return stored.to(COMPUTE)
    if CONVERTED and FORMAT == E4M3FN:
        return stored.to(tl.float8e4nv, bitcast=True).to(tl.float16).to(COMPUTE)
    bits = stored.to(tl.uint16)
    if FORMAT == E5M2:
        return (bits << 8).to(tl.float16, bitcast=True).to(COMPUTE)
    half = (((bits & 0x80) << 8) | ((bits & 0x7F) << 7)).to(tl.float16, bitcast=True)
    if FORMAT == E4M3FN:
        return tl.where((bits & 0x7F) == 0x7F, float("nan"), half * 256.0).to(COMPUTE)
    return tl.where(bits == 0x80, float("nan"), half * 128.0).to(COMPUTE)


@triton.jit
def state_before(
    table_row, end, sums_stride_block, sums_stride_state, BLOCK_SIZE: tl.constexpr, STATE_ROWS: tl.constexpr
):
    """Offset in a head's V sums of the state that ends before row ``end``; anything where that is 0."""
    last = end - 1
    block = tl.load(table_row + last // BLOCK_SIZE, mask=end > 0, other=0).to(tl.int64)
    return block * sums_stride_block + last % BLOCK_SIZE // STATE_ROWS * sums_stride_state


@triton.jit
def theta_at(
    lengths,
    theta,
    law,
    theta_stride,
    head,  # [M]
    n,  # [M]
    valid,  # bool [M]
    NUM_LENGTHS: tl.constexpr,
    LENGTHS_PAD: tl.constexpr,
):
    """θ of each row's head at its context length, float32 [M]; −inf below the first length."""
    index = tl.arange(0, LENGTHS_PAD)
    known = tl.load(lengths + index, mask=index < NUM_LENGTHS, other=2147483647)
    right = tl.sum((known[None, :] < n[:, None]).to(tl.int32), axis=1)
    inside = valid & (right < NUM_LENGTHS)
    beyond = valid & (right >= NUM_LENGTHS)
    left = tl.maximum(right - 1, 0)
    length_right = tl.load(lengths + right, mask=inside, other=2)
    length_left = tl.load(lengths + left, mask=inside, other=1)
    row = theta + head.to(tl.int64) * theta_stride
    theta_right = tl.load(row + right, mask=inside, other=0.0)
    theta_left = tl.load(row + left, mask=inside, other=0.0)
    # Where n is a calibrated length, or below the first, the quotient is not used and may be anything.
    step = tl.log2(tl.maximum(length_right, length_left + 1).to(tl.float32) / length_left.to(tl.float32))
    weight = tl.log2(tl.maximum(n, 1).to(tl.float32) / length_left.to(tl.float32)) / step
    between = theta_left + weight * (theta_right - theta_left)
    c0 = tl.load(law + head * 2, mask=beyond, other=0.0)
    c1 = tl.load(law + head * 2 + 1, mask=beyond, other=0.0)
    extrapolated = c0 + c1 * tl.log(tl.maximum(n, 1).to(tl.float32))
    found = tl.where(n == length_right, theta_right, tl.where(right == 0, -float("inf"), between))
    return tl.where(beyond, extrapolated, found)


@triton.jit
def softcapped(scores, softcap):
    """softcap · tanh(scores / softcap); where exp2 overflows the quotient is 0, as it should be."""
    return softcap - 2.0 * softcap / (tl.exp2(scores * (2.0 * LOG2E / softcap)) + 1.0)


@triton.jit
def _bits_set(word):
    """How many bits of uint64 numbers are 1. Compilers know these operations, and have an instruction for them."""
    word = word - ((word >> 1) & 0x5555555555555555)
    word = (word & 0x3333333333333333) + ((word >> 2) & 0x3333333333333333)
    word = (word + (word >> 4)) & 0x0F0F0F0F0F0F0F0F
    return ((word * 0x0101010101010101) >> 56).to(tl.int32)


@triton.jit
def ranks(chosen, SIZE: tl.constexpr):
    """How many of the elements in front of each are chosen, int32 [SIZE], and how many of all.

    Choices are the bits of a word, which one sum puts together: it crosses warps once, where a scan does twice.

    Args:
        chosen: bool [SIZE].
        SIZE: A power of two, 128 at most.
    """
    index = tl.arange(0, SIZE)
    bit = tl.full([SIZE], 1, tl.uint64) << (index % 64).to(tl.uint64)
    zero = tl.zeros([SIZE], tl.uint64)
    word = tl.sum(tl.where(chosen & (index < 64), bit, zero), axis=0)
    in_word = _bits_set(word)
    if SIZE <= 64:
        rank = _bits_set(word & (bit - 1))
        total = in_word
    else:
        second = tl.sum(tl.where(chosen & (index >= 64), bit, zero), axis=0)
        ahead = tl.where(index < 64, word, second) & (bit - 1)
        rank = _bits_set(ahead) + tl.where(index < 64, 0, in_word)
        total = in_word + _bits_set(second)
    return rank, total
