"""The kernel behind a cache write that brings a K screen's codes up to date. README.md has their layout."""

import triton
import triton.language as tl

from topt_vllm.attention.triton.primitives import decode_stored
from topt_vllm.attention.triton.rotation import SLACK, float_of, neighbours, rotate, rounded_up

# The largest finite float16, and a NaN.
_LARGEST, _NAN = tl.constexpr(0x7BFF), tl.constexpr(0x7E00)


@triton.jit
def _sequence_of(row, listed, query_start_loc, sequences, first_jump):
    """The sequence that each row of a batch [ROWS] belongs to, by bisection."""
    sequence = tl.zeros_like(row)
    jump = first_jump
    while jump > 0:
        further = sequence + jump
        start = tl.load(query_start_loc + further, mask=listed & (further < sequences), other=2147483647)
        sequence = tl.where(start <= row, further, sequence)
        jump //= 2
    return sequence


@triton.jit(
    do_not_specialize=["sequences", "first_jump"],
    do_not_specialize_on_alignment=["query_start_loc", "seq_lens", "block_table"],
)
def _topt_codes_kernel(
    key,
    codes,
    words,
    mean,
    channel_scale,
    signs,
    key_scale,
    query_start_loc,
    seq_lens,
    block_table,
    key_stride_block,
    key_stride_head,
    key_stride_slot,
    key_stride_dim,
    codes_stride_block,
    codes_stride_head,
    table_stride,
    sequences,
    first_jump,
    HEAD_DIM: tl.constexpr,
    DIM_PAD: tl.constexpr,
    ROTATED: tl.constexpr,
    BLOCK_SIZE: tl.constexpr,
    ROWS: tl.constexpr,
    SCALED_KEY: tl.constexpr,
    FORMAT: tl.constexpr,
):
    """Programs of a KV head take the batch's rows in turns, so many at a time; a decode step has few of them."""
    HALF: tl.constexpr = HEAD_DIM // 2
    program, programs, kv_head = tl.program_id(0), tl.num_programs(0), tl.program_id(1).to(tl.int64)
    first = tl.load(query_start_loc)
    end = tl.load(query_start_loc + sequences)
    dim, half = tl.arange(0, DIM_PAD), tl.arange(0, DIM_PAD // 2)
    dim_mask, half_mask = dim < HEAD_DIM, half < HALF
    channel = kv_head * HEAD_DIM + dim
    center = tl.load(mean + channel, mask=dim_mask, other=0.0)
    inverse_scale = tl.div_rn(1.0, tl.load(channel_scale + channel, mask=dim_mask, other=1.0))
    sign = tl.load(signs + dim, mask=dim_mask, other=1.0)
    for start in tl.range(first + program * ROWS, end, programs * ROWS):
        row = start + tl.arange(0, ROWS)
        listed = row < end
        sequence = _sequence_of(row, listed, query_start_loc, sequences, first_jump)
        length = tl.load(seq_lens + sequence, mask=listed, other=0)
        behind = tl.load(query_start_loc + sequence + 1, mask=listed, other=0) - row
        position = length - behind
        written = listed & (length > 0) & (position >= 0)
        block = tl.load(
            block_table + sequence.to(tl.int64) * table_stride + position // BLOCK_SIZE, mask=written, other=0
        ).to(tl.int64)
        slot = tl.where(written, position % BLOCK_SIZE, 0)

        place = block * key_stride_block + kv_head * key_stride_head + slot * key_stride_slot
        k = tl.load(
            key + place[:, None] + (dim * key_stride_dim)[None, :],
            mask=written[:, None] & dim_mask[None, :],
            other=0,
        )
        k = decode_stored(k, FORMAT, tl.float32)
        if SCALED_KEY:
            k *= tl.load(key_scale)
        z = tl.where(dim_mask[None, :], (k - center[None, :]) * inverse_scale[None, :] * sign[None, :], 0.0)
        z = rotate(z, ROWS, DIM_PAD, ROTATED)

        # A maximum may pass over a NaN.
        largest = tl.max(tl.where(z == z, tl.abs(z), float("inf")), axis=1)
        step_bits = rounded_up(largest * 0.125)
        storable = step_bits <= _LARGEST
        step = tl.where(storable, float_of(step_bits), 0.0)
        inverse = tl.where(step > 0, tl.div_rn(16.0, tl.where(step > 0, step, 1.0)), 0.0)
        fine = tl.where(storable[:, None], z * inverse[:, None], 0.0)
        plane_one = tl.minimum(tl.maximum(tl.floor(fine), -128.0), 127.0).to(tl.int32) >> 4
        unseen = tl.where(
            storable[:, None] & dim_mask[None, :], z - (plane_one.to(tl.float32) + 0.5) * step[:, None], 0.0
        )
        error = SLACK * tl.sqrt_rn(tl.sum(unseen * unseen, axis=1))

        low, high = neighbours(plane_one + 8, ROWS, DIM_PAD)
        here = block * codes_stride_block + kv_head * codes_stride_head
        tl.store(
            codes + (here + slot * HALF)[:, None] + half[None, :],
            (low | (high << 4)).to(tl.uint8),
            mask=written[:, None] & half_mask[None, :],
        )
        step_bits = tl.where(storable, step_bits, _NAN)
        error_bits = tl.where(storable, rounded_up(error), _NAN)
        tl.store(
            words + here // 4 + BLOCK_SIZE * HALF // 4 + slot, step_bits | (error_bits << 16), mask=written
        )
