"""The kernel behind a cache write: the running V sums that end in the rows just written."""

import triton
import triton.language as tl

from topt_vllm.attention.triton.primitives import decode_stored, state_before
from topt_vllm.attention.triton.schedule import rows_of


@triton.jit
def _topt_finish_kernel(
    value,
    value_sums,
    query_start_loc,
    seq_lens,
    block_table,
    value_stride_block,
    value_stride_head,
    value_stride_slot,
    sums_stride_block,
    sums_stride_head,
    sums_stride_state,
    table_stride,
    VALUE_DIM: tl.constexpr,
    VALUE_PAD: tl.constexpr,
    BLOCK_SIZE: tl.constexpr,
    STATE_ROWS: tl.constexpr,
    TILE: tl.constexpr,
    STAGES: tl.constexpr,
    FORMAT: tl.constexpr,
):
    """One program per sequence and KV head; in a decode step nearly all of them find no sum to write and leave.

    Tiles are added in the order of the context, whatever batch they came in, so that the bits are always the same.
    """
    PARTS: tl.constexpr = (STATE_ROWS + TILE - 1) // TILE
    sequence, kv_head = tl.program_id(0), tl.program_id(1).to(tl.int64)
    _, count, last_len = rows_of(query_start_loc, seq_lens, sequence)
    first, end = tl.maximum(last_len - count, 0) // STATE_ROWS, last_len // STATE_ROWS
    if first >= end:
        return
    table_row = block_table + sequence.to(tl.int64) * table_stride
    value_head = value + kv_head * value_stride_head
    sums_head = value_sums + kv_head * sums_stride_head
    dim = tl.arange(0, VALUE_PAD)
    dim_mask = dim < VALUE_DIM
    place = state_before(
        table_row, first * STATE_ROWS, sums_stride_block, sums_stride_state, BLOCK_SIZE, STATE_ROWS
    )
    total = tl.load(sums_head + place + dim, mask=dim_mask & (first > 0), other=0.0)
    for step in tl.range(first * PARTS, end * PARTS, num_stages=STAGES):
        start = step // PARTS * STATE_ROWS
        offset = step % PARTS * TILE + tl.arange(0, TILE)
        block = tl.load(table_row + start // BLOCK_SIZE).to(tl.int64)
        row = value_head + block * value_stride_block + (start % BLOCK_SIZE + offset) * value_stride_slot
        stored = tl.load(
            row[:, None] + dim[None, :], mask=(offset < STATE_ROWS)[:, None] & dim_mask[None, :], other=0
        )
        total += tl.sum(decode_stored(stored, FORMAT, tl.float32), axis=0)
        state = block * sums_stride_block + start % BLOCK_SIZE // STATE_ROWS * sums_stride_state
        tl.store(sums_head + state + dim, total, mask=dim_mask & (step % PARTS == PARTS - 1))
