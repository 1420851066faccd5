"""The kernel behind a cache write: the running V sums that end in the rows just written."""

import triton
import triton.language as tl

from topt_vllm.attention.triton.primitives import decode_stored, state_before
from topt_vllm.attention.triton.schedule import rows_of


@triton.jit
def _first_to_sum(
    first, sequence, batch, BLOCK_SIZE: tl.constexpr, STATE_ROWS: tl.constexpr, AT_ONCE: tl.constexpr
):
    """The first state that has to be summed so that state ``first`` of a sequence can be written.

    An earlier one where other programs are writing the states before: a sequence may find blocks in the prefix
    cache that another fills in the same step.
    """
    sequences, query_start_loc, seq_lens, block_table, table_stride = batch
    start = first
    searching = first > 0
    while searching:
        last = start * STATE_ROWS - 1
        column = block_table + last // BLOCK_SIZE
        block = tl.load(column + sequence.to(tl.int64) * table_stride)
        found = start
        for base in range(0, sequences, AT_ONCE):
            other = base + tl.arange(0, AT_ONCE)
            _, count, other_len = rows_of(query_start_loc, seq_lens, other, other < sequences)
            begin = tl.maximum(other_len - count, 0)
            writes = (other != sequence) & (begin <= last) & (last < other_len)
            theirs = tl.load(column + other.to(tl.int64) * table_stride, mask=writes, other=-1)
            shared = writes & (theirs == block)
            found = tl.minimum(found, tl.min(tl.where(shared, begin // STATE_ROWS, start), axis=0))
        searching = (found < start) & (found > 0)
        start = found
    return start


@triton.jit(
    do_not_specialize=["sequences"],
    do_not_specialize_on_alignment=["query_start_loc", "seq_lens", "block_table"],
)
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
    sequences,
    VALUE_DIM: tl.constexpr,
    VALUE_PAD: tl.constexpr,
    BLOCK_SIZE: tl.constexpr,
    STATE_ROWS: tl.constexpr,
    TILE: tl.constexpr,
    AT_ONCE: tl.constexpr,
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
    batch = sequences, query_start_loc, seq_lens, block_table, table_stride
    sum_from = _first_to_sum(first, sequence, batch, BLOCK_SIZE, STATE_ROWS, AT_ONCE)
    before = state_before(
        table_row, sum_from * STATE_ROWS, sums_stride_block, sums_stride_state, BLOCK_SIZE, STATE_ROWS
    )
    total = tl.load(sums_head + before + dim, mask=dim_mask & (sum_from > 0), other=0.0)
    for step in tl.range(sum_from * PARTS, end * PARTS, num_stages=STAGES):
        start = step // PARTS * STATE_ROWS
        offset = step % PARTS * TILE + tl.arange(0, TILE)
        block = tl.load(table_row + start // BLOCK_SIZE).to(tl.int64)
        row = value_head + block * value_stride_block + (start % BLOCK_SIZE + offset) * value_stride_slot
        stored = tl.load(
            row[:, None] + dim[None, :], mask=(offset < STATE_ROWS)[:, None] & dim_mask[None, :], other=0
        )
        total += tl.sum(decode_stored(stored, FORMAT, tl.float32), axis=0)
        state = block * sums_stride_block + start % BLOCK_SIZE // STATE_ROWS * sums_stride_state
        done = (step % PARTS == PARTS - 1) & (step >= first * PARTS)
        tl.store(sums_head + state + dim, total, mask=dim_mask & done)
