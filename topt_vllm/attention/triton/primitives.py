"""Device functions that the kernels share."""

import triton
import triton.language as tl

LOG2E = tl.constexpr(1.4426950408889634)

# Formats of stored K and V. Not every target can convert every fp8, so their bits are decoded with integers.
PLAIN = tl.constexpr(0)
E4M3FN = tl.constexpr(1)
E5M2 = tl.constexpr(2)
E4M3FNUZ = tl.constexpr(3)


@triton.jit
def decode_stored(stored, FORMAT: tl.constexpr, COMPUTE: tl.constexpr):
    """Elements of the cache as ``COMPUTE``, exactly; fp8 comes as uint8.

    The fields of an fp8 number are those of a float16 with a smaller exponent: shifted into place they are off by a
    power of two, the difference of the exponents' biases, subnormals included.
    """
    if FORMAT == PLAIN:
        return stored.to(COMPUTE)
    bits = stored.to(tl.uint16)
    if FORMAT == E5M2:
        return (bits << 8).to(tl.float16, bitcast=True).to(COMPUTE)
    half = (((bits & 0x80) << 8) | ((bits & 0x7F) << 7)).to(tl.float16, bitcast=True)
    if FORMAT == E4M3FN:
        return tl.where((bits & 0x7F) == 0x7F, float("nan"), half * 256.0).to(COMPUTE)
    return tl.where(bits == 0x80, float("nan"), half * 128.0).to(COMPUTE)


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
def rows_of(query_start_loc, seq_lens, sequence):
    """(first query row, number of query rows, context length of the last one) of a sequence; no rows if padding."""
    first = tl.load(query_start_loc + sequence)
    count = tl.load(query_start_loc + sequence + 1) - first
    last_len = tl.load(seq_lens + sequence)
    return first, tl.where(last_len > 0, count, 0), last_len


@triton.jit
def chunk_contexts(count, last_len, chunk, ROWS: tl.constexpr):
    """Context lengths of the first and of the last row of a chunk of a sequence's query rows."""
    last_row = tl.minimum(chunk * ROWS + ROWS, count) - 1
    return last_len - (count - 1 - chunk * ROWS), last_len - (count - 1 - last_row)


@triton.jit
def tiles_per_split(n_last, splits, TILE: tl.constexpr, MIN_TILES: tl.constexpr):
    """Tiles that each split takes: an even share, but so many that its partial result pays."""
    tiles = tl.cdiv(n_last, TILE)
    return tl.maximum(tl.cdiv(tiles, splits), MIN_TILES)
