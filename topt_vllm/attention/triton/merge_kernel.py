"""The merge kernel: joins the splits of one query row and head, compensates, and counts. README.md derives it."""

import triton
import triton.language as tl

from topt_vllm.attention.triton.primitives import (
    LOG2E,
    chunk_contexts,
    decode_stored,
    rows_of,
    tiles_per_split,
)


@triton.jit(do_not_specialize=["splits", "max_rows", "statistics_slots"])
def _topt_merge_kernel(
    value,
    query_start_loc,
    seq_lens,
    block_table,
    value_scale,
    partial_out,
    partial_softmax,
    partial_sums,
    partial_counts,
    result,
    statistics,
    value_stride_block,
    value_stride_head,
    value_stride_slot,
    table_stride,
    result_stride_row,
    result_stride_head,
    splits,
    max_rows,
    statistics_slots,
    CHUNKS: tl.constexpr,
    KV_HEADS: tl.constexpr,
    GROUP: tl.constexpr,
    ROWS: tl.constexpr,
    HEAD_DIM: tl.constexpr,
    DIM_PAD: tl.constexpr,
    BLOCK_SIZE: tl.constexpr,
    TILE: tl.constexpr,
    MIN_TILES: tl.constexpr,
    SPLITS_PAD: tl.constexpr,
    TAIL: tl.constexpr,
    SPARSE: tl.constexpr,
    VMEAN: tl.constexpr,
    COUNT: tl.constexpr,
    SCALED_VALUE: tl.constexpr,
    FORMAT: tl.constexpr,
):
    HEADS: tl.constexpr = KV_HEADS * GROUP
    head = tl.program_id(0)
    kv_head = head // GROUP
    sequence, row = tl.program_id(1) // max_rows, tl.program_id(1) % max_rows
    first, count, last_len = rows_of(query_start_loc, seq_lens, sequence)
    if row >= count:
        return
    chunk = row // ROWS
    n = last_len - (count - 1 - row)
    n_first, n_last = chunk_contexts(count, last_len, chunk, ROWS)
    share = tiles_per_split(n_last, splits, TILE, MIN_TILES)
    used_splits = tl.cdiv(tl.cdiv(n_last, TILE), share)

    split = tl.arange(0, SPLITS_PAD)
    written = split < used_splits
    dim = tl.arange(0, DIM_PAD)
    dim_mask = dim < HEAD_DIM
    query_row = (first + row).to(tl.int64)
    place = (query_row * HEADS + head) * splits + split
    best = tl.load(partial_softmax + place * 3, mask=written, other=-float("inf"))
    mass = tl.load(partial_softmax + place * 3 + 1, mask=written, other=0.0)
    top = tl.max(best, axis=0)
    weight = tl.exp2((best - tl.where(top == -float("inf"), 0.0, top)) * LOG2E)
    total = tl.sum(weight * mass, axis=0)
    partial = tl.load(
        partial_out + place[:, None] * HEAD_DIM + dim[None, :],
        mask=written[:, None] & dim_mask[None, :],
        other=0.0,
    )
    out = tl.sum(partial * weight[:, None], axis=0) / total

    here = ((sequence * CHUNKS + chunk) * KV_HEADS + kv_head).to(tl.int64) * splits + split
    if SPARSE:
        lost = tl.load(partial_softmax + place * 3 + 2, mask=written, other=0.0)
        dropped = tl.sum(weight * lost, axis=0) / total
        if VMEAN:  # noqa: SIM102 - one condition is the compiler's, the other the device's
            if dropped > 0:
                sums = tl.load(
                    partial_sums + here[:, None] * HEAD_DIM + dim[None, :],
                    mask=written[:, None] & dim_mask[None, :],
                    other=0.0,
                )
                mean = tl.sum(sums, axis=0)
                table_row = block_table + sequence.to(tl.int64) * table_stride
                value_head = value + kv_head.to(tl.int64) * value_stride_head
                # Behind the blocks that every row of the chunk has finished; the decode kernel has just read these.
                for start in range(n_first // BLOCK_SIZE * BLOCK_SIZE, n, TAIL):
                    position = start + tl.arange(0, TAIL)
                    inside = position < n
                    block = tl.load(table_row + position // BLOCK_SIZE, mask=inside, other=0).to(tl.int64)
                    place_in_cache = block * value_stride_block + position % BLOCK_SIZE * value_stride_slot
                    tail = tl.load(
                        value_head + place_in_cache[:, None] + dim[None, :],
                        mask=inside[:, None] & dim_mask[None, :],
                        other=0,
                    )
                    mean += tl.sum(decode_stored(tail, FORMAT, tl.float32), axis=0)
                out += dropped * mean / n
    if SCALED_VALUE:
        out *= tl.load(value_scale)
    tl.store(
        result + query_row * result_stride_row + head * result_stride_head + dim,
        out.to(result.dtype.element_ty),
        mask=dim_mask,
    )

    if COUNT:
        slot = statistics + (query_row % statistics_slots) * 7
        group_rows = n.to(tl.float64) * KV_HEADS
        if head == 0:
            tl.atomic_add(slot, 1.0, sem="relaxed")
            tl.atomic_add(slot + 1, group_rows * GROUP, sem="relaxed")
            tl.atomic_add(slot + 3, group_rows, sem="relaxed")
            tl.atomic_add(slot + 6, group_rows, sem="relaxed")
        if SPARSE:
            tl.atomic_add(slot + 5, dropped.to(tl.float64), sem="relaxed")
            # The decode kernel counted a chunk of rows and a group of heads together.
            if (head % GROUP == 0) & (row % ROWS == 0):
                kept = tl.load(partial_counts + here * 2, mask=written, other=0)
                read = tl.load(partial_counts + here * 2 + 1, mask=written, other=0)
                tl.atomic_add(slot + 2, tl.sum(kept.to(tl.int64), axis=0).to(tl.float64), sem="relaxed")
                tl.atomic_add(slot + 4, tl.sum(read.to(tl.int64), axis=0).to(tl.float64), sem="relaxed")
        elif head == 0:
            tl.atomic_add(slot + 2, group_rows * GROUP, sem="relaxed")
            tl.atomic_add(slot + 4, group_rows, sem="relaxed")
