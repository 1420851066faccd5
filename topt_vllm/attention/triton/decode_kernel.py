"""The decode kernel: one split of one KV head of one sequence, in one pass over K. README.md derives it.

``M`` are the tile's rows: query row r and head g of the group at r * GROUP_PAD + g.
"""

import triton
import triton.language as tl

from topt_vllm.attention.triton.primitives import (
    LOG2E,
    chunk_contexts,
    decode_stored,
    rows_of,
    theta_at,
    tiles_per_split,
)


@triton.jit(do_not_specialize=["min_seq_len", "sink_tokens", "recent_tokens"])
def _topt_decode_kernel(
    query,
    key,
    value,
    value_sums,
    query_start_loc,
    seq_lens,
    block_table,
    lengths,
    theta,
    law,
    key_scale,
    partial_out,
    partial_softmax,
    partial_sums,
    partial_counts,
    query_stride_row,
    query_stride_head,
    key_stride_block,
    key_stride_head,
    key_stride_slot,
    key_stride_dim,
    value_stride_block,
    value_stride_head,
    value_stride_slot,
    sums_stride_block,
    sums_stride_head,
    table_stride,
    theta_stride,
    scale,
    softcap,
    min_seq_len,
    sink_tokens,
    recent_tokens,
    CHUNKS: tl.constexpr,
    KV_HEADS: tl.constexpr,
    GROUP: tl.constexpr,
    GROUP_PAD: tl.constexpr,
    ROWS: tl.constexpr,
    SINGLE_ROW: tl.constexpr,
    HEAD_DIM: tl.constexpr,
    DIM_PAD: tl.constexpr,
    BLOCK_SIZE: tl.constexpr,
    TILE: tl.constexpr,
    MIN_TILES: tl.constexpr,
    SUMS_PER_TILE: tl.constexpr,
    NUM_LENGTHS: tl.constexpr,
    LENGTHS_PAD: tl.constexpr,
    UNION: tl.constexpr,
    VMEAN: tl.constexpr,
    SOFTCAP: tl.constexpr,
    SCALED_KEY: tl.constexpr,
    FORMAT: tl.constexpr,
    COMPUTE: tl.constexpr,
    PRECISION: tl.constexpr,
):
    M: tl.constexpr = ROWS * GROUP_PAD
    SPARSE: tl.constexpr = NUM_LENGTHS > 0
    # Chunks of a sequence read the same keys: side by side, the second finds them in the L2 cache.
    split, chunk, splits = tl.program_id(0) // CHUNKS, tl.program_id(0) % CHUNKS, tl.num_programs(0) // CHUNKS
    kv_head = tl.program_id(1)
    sequence = tl.program_id(2)

    first, count, last_len = rows_of(query_start_loc, seq_lens, sequence)
    if chunk * ROWS >= count:
        return
    n_first, n_last = chunk_contexts(count, last_len, chunk, ROWS)
    share = tiles_per_split(n_last, splits, TILE, MIN_TILES)
    begin = split * share
    end = tl.minimum(begin + share, tl.cdiv(n_last, TILE))
    if begin >= end:
        return

    m = tl.arange(0, M)
    row, member = chunk * ROWS + m // GROUP_PAD, m % GROUP_PAD
    head = kv_head * GROUP + member
    valid = (row < count) & (member < GROUP)
    n = tl.where(valid, last_len - (count - 1 - row), 0)
    dim = tl.arange(0, DIM_PAD)
    dim_mask = dim < HEAD_DIM
    query_row = (first + row).to(tl.int64)
    q = tl.load(
        query + (query_row * query_stride_row + head * query_stride_head)[:, None] + dim[None, :],
        mask=valid[:, None] & dim_mask[None, :],
        other=0.0,
    ).to(COMPUTE)
    if SCALED_KEY:
        scale *= tl.load(key_scale)
    if SPARSE:
        threshold = theta_at(lengths, theta, law, theta_stride, head, n, valid, NUM_LENGTHS, LENGTHS_PAD)
        # A NaN score is not >= −inf, but dense attention would read the row.
        always = threshold == -float("inf")
        if not SINGLE_ROW:
            # Times a tile of 0 and 1, it tells every head how many of its row's group are 1.
            same_row = (row[:, None] == row[None, :]).to(COMPUTE)
            leads = valid & (member == 0)
        # One context length for the whole tile, or one for each of its rows.
        length = n_last if SINGLE_ROW else n[:, None]
        forced_from = tl.where(length <= min_seq_len, 0, length - recent_tokens)
        if VMEAN:
            forced_from = tl.minimum(forced_from, length // BLOCK_SIZE * BLOCK_SIZE)

    offset = tl.arange(0, TILE)
    table_row = block_table + sequence.to(tl.int64) * table_stride
    key_head = key + kv_head.to(tl.int64) * key_stride_head
    value_head = value + kv_head.to(tl.int64) * value_stride_head

    best = tl.full([M], -float("inf"), tl.float32)
    # Kept per column and summed after the loop: a sum over columns crosses warps.
    mass = tl.zeros([M, TILE], tl.float32)
    out = tl.zeros([M, DIM_PAD], tl.float32)
    if SPARSE:
        dropped = tl.zeros([M, TILE], tl.float32)
        kept_count = tl.zeros([TILE], tl.int32)
        read_count = tl.zeros([TILE], tl.int32)
    if VMEAN:
        sums = tl.zeros([SUMS_PER_TILE, DIM_PAD], tl.float32)
        # Every row of the chunk has finished these; what lies behind them the merge kernel adds from V.
        finished = tl.where(n_last > min_seq_len, n_first // BLOCK_SIZE, 0)

    for tile in range(begin, end):
        position = tile * TILE + offset
        in_context = position < n_last
        if BLOCK_SIZE % TILE == 0:
            block = tl.load(table_row + tile * TILE // BLOCK_SIZE).to(tl.int64)
            slot = tile * TILE % BLOCK_SIZE + offset
        else:
            block = tl.load(table_row + position // BLOCK_SIZE, mask=in_context, other=0).to(tl.int64)
            slot = position % BLOCK_SIZE
        if VMEAN:
            logical = tl.cdiv(tile * TILE, BLOCK_SIZE) + tl.arange(0, SUMS_PER_TILE)
            starts_here = (logical * BLOCK_SIZE < (tile + 1) * TILE) & (logical < finished)
            physical = tl.load(table_row + logical, mask=starts_here, other=0).to(tl.int64)
            sums += tl.load(
                value_sums
                + (physical * sums_stride_block + kv_head * sums_stride_head)[:, None]
                + dim[None, :],
                mask=starts_here[:, None] & dim_mask[None, :],
                other=0.0,
            )
        k_column = (block * key_stride_block + slot * key_stride_slot)[None, :]
        k = tl.load(
            key_head + k_column + (dim * key_stride_dim)[:, None],
            mask=in_context[None, :] & dim_mask[:, None],
            other=0,
        )
        scores = tl.dot(q, decode_stored(k, FORMAT, COMPUTE), input_precision=PRECISION) * scale
        if SOFTCAP:
            # softcap · tanh(score / softcap); where exp2 overflows the quotient is 0, as it should be.
            scores = softcap - 2.0 * softcap / (tl.exp2(scores * (2.0 * LOG2E / softcap)) + 1.0)
        visible = in_context[None, :] if SINGLE_ROW else position[None, :] < n[:, None]

        if SPARSE:
            forced = (position[None, :] < sink_tokens) | (position[None, :] >= forced_from)
            keep = ((scores >= threshold[:, None]) | always[:, None] | forced) & visible & valid[:, None]
            if SINGLE_ROW:
                kept_here = tl.sum(keep.to(tl.int32), axis=0)
                rows_here = (kept_here > 0).to(tl.int32)
                used = (kept_here > 0)[None, :] if UNION else keep
            else:
                read = tl.dot(same_row, keep.to(COMPUTE), input_precision=PRECISION) > 0
                # Both counts in one sum over rows.
                both = tl.sum(keep.to(tl.int32) + ((read & leads[:, None]).to(tl.int32) << 16), axis=0)
                kept_here, rows_here = both & 0xFFFF, both >> 16
                used = read & visible if UNION else keep
            kept_count += kept_here
            read_count += rows_here
            some = rows_here > 0

        scores = tl.where(visible, scores, -float("inf"))
        new_best = tl.maximum(best, tl.max(scores, axis=1))
        # −inf − −inf is NaN, and all scores so far may be −inf.
        shift = tl.where(new_best == -float("inf"), 0.0, new_best)
        shrink = tl.exp2((best - shift) * LOG2E)
        p = tl.exp2((scores - shift[:, None]) * LOG2E)
        best = new_best
        mass = mass * shrink[:, None] + p
        out *= shrink[:, None]
        value_row = (
            value_head + (block * value_stride_block + slot * value_stride_slot)[:, None] + dim[None, :]
        )
        if SPARSE:
            dropped = dropped * shrink[:, None] + tl.where(used, 0.0, p)
            if tl.max(some.to(tl.int32), axis=0) > 0:
                v = tl.load(value_row, mask=some[:, None] & dim_mask[None, :], other=0)
                weights = tl.where(used, p, 0.0).to(COMPUTE)
                out = tl.dot(weights, decode_stored(v, FORMAT, COMPUTE), out, input_precision=PRECISION)
        else:
            v = tl.load(value_row, mask=in_context[:, None] & dim_mask[None, :], other=0)
            out = tl.dot(p.to(COMPUTE), decode_stored(v, FORMAT, COMPUTE), out, input_precision=PRECISION)

    place = (query_row * (KV_HEADS * GROUP) + head) * splits + split
    tl.store(
        partial_out + place[:, None] * HEAD_DIM + dim[None, :], out, mask=valid[:, None] & dim_mask[None, :]
    )
    tl.store(partial_softmax + place * 3, best, mask=valid)
    tl.store(partial_softmax + place * 3 + 1, tl.sum(mass, axis=1), mask=valid)
    here = ((sequence * CHUNKS + chunk) * KV_HEADS + kv_head).to(tl.int64) * splits + split
    if SPARSE:
        tl.store(partial_softmax + place * 3 + 2, tl.sum(dropped, axis=1), mask=valid)
        tl.store(partial_counts + here * 2, tl.sum(kept_count, axis=0))
        tl.store(partial_counts + here * 2 + 1, tl.sum(read_count, axis=0))
    if VMEAN:
        tl.store(partial_sums + here * HEAD_DIM + dim, tl.sum(sums, axis=0), mask=dim_mask)
