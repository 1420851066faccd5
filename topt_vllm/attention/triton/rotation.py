"""The K screen's rotation and rounding on the device, to the bit as ``attention/screen.py`` has them."""

import triton
import triton.language as tl

# Hard bounds also cover the rounding of both scores.
SLACK = tl.constexpr(1.01)


@triton.jit
def rotate(x, ROWS: tl.constexpr, PAD: tl.constexpr, BLOCK: tl.constexpr):
    """Butterflies of float32 [ROWS, PAD] over neighbours at distance 1, 2, 4, … in blocks of ``BLOCK`` channels.

    Every round takes neighbours apart and puts their sums in front of their differences, in each block: so the
    next round's pairs become neighbours, and after the last one all channels are where they were.
    """
    for _ in tl.static_range(BLOCK.bit_length() - 1):
        low, high = tl.split(tl.reshape(x, [ROWS, PAD // BLOCK, BLOCK // 2, 2]))
        x = tl.permute(tl.join(low + high, low - high), (0, 1, 3, 2))
    return tl.reshape(x, [ROWS, PAD])


@triton.jit
def rounded_up(x):
    """Bits, int32, of the least float16 not below x ≥ 0; infinite beyond float16."""
    rounded = x.to(tl.float16)
    return rounded.to(tl.int16, bitcast=True).to(tl.int32) + (rounded.to(tl.float32) < x).to(tl.int32)


@triton.jit
def float_of(bits):
    """float32 of a float16's bits, the lower half of int32."""
    return bits.to(tl.int16).to(tl.float16, bitcast=True).to(tl.float32)


@triton.jit
def nearest(x):
    """The nearest whole number, even ones at ties, of float32 below 2**22: there are no fractions above 2**23."""
    return (x + 12582912.0) - 12582912.0


@triton.jit
def neighbours(x, ROWS: tl.constexpr, PAD: tl.constexpr):
    """Channels 2p and channels 2p + 1 of [ROWS, PAD]: two halves of a byte of codes."""
    return tl.split(tl.reshape(x, [ROWS, PAD // 2, 2]))
