"""The merge kernel: joins the segments of one query row and head, compensates, and counts. README.md derives it."""

import triton
import triton.language as tl

from topt_vllm.attention.triton.primitives import LOG2E, LOWEST, decode_stored, state_before
from topt_vllm.attention.triton.schedule import (
    MOST_ITEMS,
    chunk_context,
    program_of,
    programs_used,
    rows_of,
    tiles_of,
)


@triton.jit(
    do_not_specialize=["items", "chunks", "programs", "max_rows", "statistics_slots"],
    do_not_specialize_on_alignment=["query_start_loc", "seq_lens", "block_table", "sinks", "reached"],
)
def _topt_merge_kernel(
    value,
    value_sums,
    query_start_loc,
    seq_lens,
    block_table,
    value_scale,
    sinks,
    partial_out,
    partial_softmax,
    partial_reached,
    result,
    reached,
    statistics,
    value_stride_block,
    value_stride_head,
    value_stride_slot,
    sums_stride_block,
    sums_stride_head,
    sums_stride_state,
    table_stride,
    result_stride_row,
    result_stride_head,
    items,
    chunks,
    programs,
    max_rows,
    statistics_slots,
    KV_HEADS: tl.constexpr,
    GROUP: tl.constexpr,
    ROWS: tl.constexpr,
    VALUE_DIM: tl.constexpr,
    VALUE_PAD: tl.constexpr,
    BLOCK_SIZE: tl.constexpr,
    STATE_ROWS: tl.constexpr,
    ITEMS_PAD: tl.constexpr,
    TILE: tl.constexpr,
    MIN_TILES: tl.constexpr,
    SEGMENTS: tl.constexpr,
    TAIL: tl.constexpr,
    SPARSE: tl.constexpr,
    SCREEN: tl.constexpr,
    VMEAN: tl.constexpr,
    SINKS: tl.constexpr,
    COUNT: tl.constexpr,
    REACHED: tl.constexpr,
    SCALED_VALUE: tl.constexpr,
    FORMAT: tl.constexpr,
):
    HEADS: tl.constexpr = KV_HEADS * GROUP
    USED: tl.constexpr = ROWS * GROUP
    head = tl.program_id(1)
    kv_head = head // GROUP
    sequence, row = tl.program_id(0) // max_rows, tl.program_id(0) % max_rows
    first, count, last_len = rows_of(query_start_loc, seq_lens, sequence)
    if row >= count:
        return
    chunk = row // ROWS
    item = sequence * chunks + chunk
    n = last_len - (count - 1 - row)
    n_last = chunk_context(count, last_len, chunk, ROWS)

    if ITEMS_PAD <= MOST_ITEMS:
        every_item = tl.arange(0, ITEMS_PAD)
        tiles = tiles_of(query_start_loc, seq_lens, every_item, every_item < items, chunks, ROWS, TILE)
        total = tl.sum(tiles, axis=0)
        before = tl.sum(tl.where(every_item < item, tiles, 0), axis=0)
    else:
        total = tl.full([], 0, tl.int32)
        before = tl.full([], 0, tl.int32)
        for start in range(0, items, MOST_ITEMS):
            some_items = start + tl.arange(0, MOST_ITEMS)
            tiles = tiles_of(query_start_loc, seq_lens, some_items, some_items < items, chunks, ROWS, TILE)
            total += tl.sum(tiles, axis=0)
            before += tl.sum(tl.where(some_items < item, tiles, 0), axis=0)
    used = programs_used(total, programs, MIN_TILES)
    first_program = program_of(before, total, used)
    segments = program_of(before + tl.cdiv(n_last, TILE) - 1, total, used) - first_program + 1
    first_segment = (kv_head * (programs + items) + first_program + item).to(tl.int64)

    column = row % ROWS * GROUP + head % GROUP
    dim = tl.arange(0, VALUE_PAD)
    dim_mask = dim < VALUE_DIM
    if VMEAN:
        # Asked for before it is known to be needed, so that it has come by then.
        table_row = block_table + sequence.to(tl.int64) * table_stride
        value_head = value + kv_head.to(tl.int64) * value_stride_head
        sums_head = value_sums + kv_head.to(tl.int64) * sums_stride_head
        sums_end = (n - 1) // STATE_ROWS * STATE_ROWS
        state = state_before(
            table_row, sums_end, sums_stride_block, sums_stride_state, BLOCK_SIZE, STATE_ROWS
        )
        sums = tl.load(sums_head + state + dim, mask=dim_mask & (sums_end > 0), other=0.0)
    best = LOWEST
    mass = 0.0
    kept = 0.0
    out = tl.zeros([VALUE_PAD], tl.float32)
    keys_reached = tl.zeros([SEGMENTS], tl.int32)
    for start in range(0, segments, SEGMENTS):
        index = start + tl.arange(0, SEGMENTS)
        written = index < segments
        segment = first_segment + index
        place = segment * USED + column
        levels = tl.load(partial_softmax + place * 3, mask=written, other=LOWEST)
        masses = tl.load(partial_softmax + place * 3 + 1, mask=written, other=0.0)
        parts = tl.load(
            partial_out + place[:, None] * VALUE_DIM + dim[None, :],
            mask=written[:, None] & dim_mask[None, :],
            other=0.0,
        )
        new_best = tl.maximum(best, tl.max(levels, axis=0))
        shrink = tl.exp2((best - new_best) * LOG2E)
        weights = tl.where(written, tl.exp2((levels - new_best) * LOG2E), 0.0)
        best = new_best
        mass = mass * shrink + tl.sum(weights * masses, axis=0)
        out = out * shrink + tl.sum(parts * weights[:, None], axis=0)
        if SPARSE:
            kept_masses = tl.load(partial_softmax + place * 3 + 2, mask=written, other=0.0)
            kept = kept * shrink + tl.sum(weights * kept_masses, axis=0)
        if REACHED:
            keys_reached += tl.load(partial_reached + place, mask=written, other=0)

    denominator = mass
    if SINKS:
        # A sink takes probability as a key would, and gives nothing for it.
        denominator += tl.exp2((tl.load(sinks + head).to(tl.float32) - best) * LOG2E)
    out /= denominator
    if SPARSE:
        # Both are sums of the same numbers in another order.
        dropped = tl.maximum(mass - kept, 0.0) / denominator
        if VMEAN:  # noqa: SIM102 - one condition is the compiler's, the other the device's
            if dropped > 0:
                # Rows that are always kept: the decode kernel has just read them.
                for start in range(sums_end, n, TAIL):
                    position = start + tl.arange(0, TAIL)
                    inside = position < n
                    block = tl.load(table_row + position // BLOCK_SIZE, mask=inside, other=0).to(tl.int64)
                    place = block * value_stride_block + position % BLOCK_SIZE * value_stride_slot
                    tail = tl.load(
                        value_head + place[:, None] + dim[None, :],
                        mask=inside[:, None] & dim_mask[None, :],
                        other=0,
                    )
                    sums += tl.sum(decode_stored(tail, FORMAT, tl.float32), axis=0)
                out += dropped * sums / n
    if SCALED_VALUE:
        out *= tl.load(value_scale)
    query_row = (first + row).to(tl.int64)
    tl.store(
        result + query_row * result_stride_row + head * result_stride_head + dim,
        out.to(result.dtype.element_ty),
        mask=dim_mask,
    )

    if REACHED:
        counter = reached + query_row * HEADS + head
        tl.store(counter, tl.load(counter) + tl.sum(keys_reached, axis=0))
    if COUNT:
        counters = statistics + (query_row % statistics_slots) * 8
        group_rows = n.to(tl.float64) * KV_HEADS
        if head == 0:
            tl.atomic_add(counters, 1.0, sem="relaxed")
            tl.atomic_add(counters + 1, group_rows * GROUP, sem="relaxed")
            tl.atomic_add(counters + 3, group_rows, sem="relaxed")
            if not SCREEN:
                tl.atomic_add(counters + 6, group_rows, sem="relaxed")
                tl.atomic_add(counters + 7, group_rows, sem="relaxed")
        # What thresholds keep and read the decode kernel counts.
        if SPARSE:
            # A row of NaN would make the sum NaN for good.
            share = tl.where(dropped == dropped, dropped, 0.0)
            tl.atomic_add(counters + 5, share.to(tl.float64), sem="relaxed")
        elif head == 0:
            tl.atomic_add(counters + 2, group_rows * GROUP, sem="relaxed")
            tl.atomic_add(counters + 4, group_rows, sem="relaxed")
