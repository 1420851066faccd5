"""The decode kernel: scores and selects in one loop over K, then gathers the V rows that it listed. See README.md.

Keys are the rows of its tiles, ``[TILE]``; the columns, ``[COLUMNS]``, are the query heads of a group and as many
query rows of a sequence as fit: row r and head g at r * GROUP + g. ``[WIDE]`` are the same, 16 at least, for matrix
products that have them as rows.
"""

import triton
import triton.language as tl

from topt_vllm.attention.triton.primitives import LOG2E, LOWEST, decode_stored, ranks, softcapped, theta_at
from topt_vllm.attention.triton.schedule import (
    MOST_ITEMS,
    chunk_context,
    chunk_tiles,
    first_tile,
    programs_used,
    rows_of,
    tiles_of,
)
from topt_vllm.attention.triton.screen_phases import (
    flag_candidates,
    keep_candidates,
    list_flagged,
    load_queries,
    without_softcap,
)
from topt_vllm.attention.triton.selection import (
    forced_start,
    place_of,
    select,
    softmax_step,
    to_wide,
    visible_keys,
)


@triton.jit(
    do_not_specialize=["items", "chunks", "min_seq_len", "sink_tokens", "recent_tokens", "statistics_slots"],
    do_not_specialize_on_alignment=["query_start_loc", "seq_lens", "block_table", "theta", "law"],
)
def _topt_decode_kernel(
    query,
    key,
    value,
    query_start_loc,
    seq_lens,
    block_table,
    lengths,
    theta,
    law,
    key_scale,
    codes,
    words,
    query_codes,
    coefficients,
    listed_slots,
    listed_scores,
    listed_positions,
    partial_out,
    partial_softmax,
    partial_reached,
    statistics,
    query_stride_row,
    query_stride_head,
    key_stride_block,
    key_stride_head,
    key_stride_slot,
    key_stride_dim,
    value_stride_block,
    value_stride_head,
    value_stride_slot,
    codes_stride_block,
    codes_stride_head,
    table_stride,
    theta_stride,
    scale,
    softcap,
    items,
    chunks,
    min_seq_len,
    sink_tokens,
    recent_tokens,
    statistics_slots,
    KV_HEADS: tl.constexpr,
    GROUP: tl.constexpr,
    ROWS: tl.constexpr,
    SINGLE_ROW: tl.constexpr,
    COLUMNS: tl.constexpr,
    WIDE: tl.constexpr,
    HEAD_DIM: tl.constexpr,
    DIM_PAD: tl.constexpr,
    HALF_PAD: tl.constexpr,
    VALUE_DIM: tl.constexpr,
    VALUE_PAD: tl.constexpr,
    BLOCK_SIZE: tl.constexpr,
    STATE_ROWS: tl.constexpr,
    ITEMS_PAD: tl.constexpr,
    TILE: tl.constexpr,
    MIN_TILES: tl.constexpr,
    LIST: tl.constexpr,
    CANDIDATES: tl.constexpr,
    GATHER: tl.constexpr,
    KEY_STAGES: tl.constexpr,
    CANDIDATE_STAGES: tl.constexpr,
    VALUE_STAGES: tl.constexpr,
    SPARSE: tl.constexpr,
    SCREEN: tl.constexpr,
    HARD: tl.constexpr,
    FOUR_AT_ONCE: tl.constexpr,
    BY_ROW: tl.constexpr,
    NUM_LENGTHS: tl.constexpr,
    LENGTHS_PAD: tl.constexpr,
    UNION: tl.constexpr,
    VMEAN: tl.constexpr,
    SOFTCAP: tl.constexpr,
    SCALED_KEY: tl.constexpr,
    COUNT: tl.constexpr,
    REACHED: tl.constexpr,
    FORMAT: tl.constexpr,
    CONVERTED: tl.constexpr,
    COMPUTE: tl.constexpr,
    PRECISION: tl.constexpr,
):
    USED: tl.constexpr = ROWS * GROUP  # columns that stand for a query row and head
    # Columns of the list, so that a thread can move several at once.
    STORED: tl.constexpr = triton.next_power_of_2(USED)
    FLAGS: tl.constexpr = min(LIST, 512)  # flags that are listed at a time
    SELECTED: tl.constexpr = CANDIDATES if SCREEN else TILE  # keys that are selected from at a time
    program, programs, kv_head = tl.program_id(0), tl.num_programs(0), tl.program_id(1)

    if ITEMS_PAD <= MOST_ITEMS:
        every_item = tl.arange(0, ITEMS_PAD)
        tiles = tiles_of(query_start_loc, seq_lens, every_item, every_item < items, chunks, ROWS, TILE)
        total = tl.sum(tiles, axis=0)
    else:
        total = tl.full([], 0, tl.int32)
        for start in range(0, items, MOST_ITEMS):
            some_items = start + tl.arange(0, MOST_ITEMS)
            tiles = tiles_of(query_start_loc, seq_lens, some_items, some_items < items, chunks, ROWS, TILE)
            total += tl.sum(tiles, axis=0)
    used = programs_used(total, programs, MIN_TILES)
    if program >= used:
        return
    my_first = first_tile(program, total, used)
    my_end = first_tile(program + 1, total, used)
    if ITEMS_PAD <= MOST_ITEMS:
        ends = tl.cumsum(tiles, axis=0)
        first_item = tl.sum((ends <= my_first).to(tl.int32), axis=0)
        last_item = tl.sum((ends < my_end).to(tl.int32), axis=0)
        before = tl.sum(tl.where(every_item < first_item, tiles, 0), axis=0)
    else:
        first_item = tl.full([], 0, tl.int32)
        last_item = tl.full([], 0, tl.int32)
        before = tl.full([], 0, tl.int32)
        seen = tl.full([], 0, tl.int32)
        for start in range(0, items, MOST_ITEMS):
            some_items = start + tl.arange(0, MOST_ITEMS)
            tiles = tiles_of(query_start_loc, seq_lens, some_items, some_items < items, chunks, ROWS, TILE)
            ends = seen + tl.cumsum(tiles, axis=0)
            first_item += tl.sum((ends <= my_first).to(tl.int32), axis=0)
            last_item += tl.sum((ends < my_end).to(tl.int32), axis=0)
            before += tl.sum(tl.where(ends <= my_first, tiles, 0), axis=0)
            seen += tl.sum(tiles, axis=0)
    # Tiles that this program has yet to do, and those of its first item that are others'.
    left, skip = my_end - my_first, my_first - before

    column, wide = tl.arange(0, COLUMNS), tl.arange(0, WIDE)
    offset, rank = tl.arange(0, TILE), tl.arange(0, GATHER)
    dim, value_dim = tl.arange(0, DIM_PAD), tl.arange(0, VALUE_PAD)
    dim_mask, value_mask = dim < HEAD_DIM, value_dim < VALUE_DIM
    head = kv_head * GROUP + column % GROUP
    key_head = key + kv_head.to(tl.int64) * key_stride_head
    value_head = value + kv_head.to(tl.int64) * value_stride_head
    my_list = (kv_head * programs + program).to(tl.int64) * LIST
    my_slots, my_scores = listed_slots + my_list, listed_scores + my_list * STORED
    if SCREEN:
        my_positions = listed_positions + my_list
        codes_head = codes + kv_head.to(tl.int64) * codes_stride_head
        words_head = words + kv_head.to(tl.int64) * codes_stride_head // 4
        candidate_count = tl.zeros([TILE], tl.int32)
        candidates_listed = 0
    if SCALED_KEY:
        scale *= tl.load(key_scale)
    # Counted per key of a tile and added up at the end: a sum over keys crosses warps.
    kept_count = tl.zeros([SELECTED], tl.int32)
    read_count = tl.zeros([SELECTED], tl.int32)
    rows_listed = 0

    # Hoisted out of this loop and the one over lists, invariants take registers that the inner loops need.
    for item in tl.range(first_item, last_item + 1, disable_licm=True):
        sequence, chunk = item // chunks, item % chunks
        first, count, last_len = rows_of(query_start_loc, seq_lens, sequence)
        n_last = chunk_context(count, last_len, chunk, ROWS)
        mine = tl.minimum(chunk_tiles(count, n_last, chunk, ROWS, TILE) - skip, left)
        begin, end = skip * TILE, tl.minimum((skip + mine) * TILE, n_last)
        left, skip = left - mine, 0
        table_row = block_table + sequence.to(tl.int64) * table_stride
        segment = (kv_head * (programs + items) + program + item).to(tl.int64)

        row = chunk * ROWS + column // GROUP
        valid = (column < USED) & (row < count)
        n = tl.where(valid, last_len - (count - 1 - row), 0)
        query_row = (first + row).to(tl.int64)
        q = tl.load(
            query + (query_row * query_stride_row + head * query_stride_head)[None, :] + dim[:, None],
            mask=valid[None, :] & dim_mask[:, None],
            other=0.0,
        ).to(COMPUTE)
        if SPARSE:
            if BY_ROW:
                threshold = tl.load(theta + query_row * theta_stride + head, mask=valid, other=0.0)
            else:
                threshold = theta_at(
                    lengths, theta, law, theta_stride, head, n, valid, NUM_LENGTHS, LENGTHS_PAD
                )
            # A NaN score is not >= −inf, but dense attention would read the row: such columns are forced.
            always = (threshold == -float("inf")) | (n <= min_seq_len)
            dense = tl.sum(tl.where(always, 0, valid.to(tl.int32)), axis=0) == 0
            forced_from = forced_start(last_len if SINGLE_ROW else n, recent_tokens, VMEAN, STATE_ROWS)
            counted_from = tl.where(always, float("inf"), threshold)
            reached = tl.zeros([SELECTED, COLUMNS], tl.int32)
            # Times a tile of 0 and 1, it tells every head how many of its row's group are 1.
            same_row = (row[:, None] == row[None, :]).to(COMPUTE)
            rule = threshold, always, forced_from, sink_tokens, same_row
        if SCREEN:
            queries = load_queries(
                query_codes, coefficients, query_row, head, valid, KV_HEADS * GROUP, HEAD_DIM, HALF_PAD
            )
            limit = without_softcap(threshold, softcap) if SOFTCAP else threshold

        if SCREEN:
            all_mass = tl.zeros([COLUMNS], tl.float32)
        else:
            # The best score and the mass so far, per key of a tile: a maximum over keys crosses warps.
            best = tl.full([TILE, COLUMNS], LOWEST, tl.float32)
            mass = tl.zeros([TILE, COLUMNS], tl.float32)
        # What the output and the kept mass are relative to; it moves once per list.
        reference = tl.full([COLUMNS], LOWEST, tl.float32)
        out = tl.zeros([WIDE, VALUE_PAD], tl.float32)
        kept = tl.zeros([GATHER, WIDE], tl.float32)

        for list_begin in tl.range(begin, end, LIST, disable_licm=True):
            list_end = tl.minimum(list_begin + LIST, end)
            listed = 0
            if SCREEN:
                # Scores are listed later, and flags need less memory.
                my_flags = my_scores.to(tl.pointer_type(tl.int8))
                told_level, told_mass, candidate_count = flag_candidates(
                    list_begin,
                    list_end,
                    table_row,
                    codes_head,
                    words_head,
                    codes_stride_block,
                    my_flags,
                    queries,
                    limit,
                    n,
                    valid,
                    dense,
                    rule,
                    softcap,
                    candidate_count,
                    HEAD_DIM,
                    HALF_PAD,
                    BLOCK_SIZE,
                    TILE,
                    KEY_STAGES,
                    SINGLE_ROW,
                    SOFTCAP,
                    HARD,
                    COUNT,
                    FOUR_AT_ONCE,
                    COMPUTE,
                    PRECISION,
                )
                # Now all threads see what all have flagged, and then listed.
                tl.debug_barrier()
                lists = my_slots, my_positions
                listed = list_flagged(
                    list_begin, list_end, table_row, my_flags, lists, dense, BLOCK_SIZE, FLAGS
                )
                candidates_listed += listed
                tl.debug_barrier()
                listed, exact_level, exact_mass, kept_count, read_count, reached = keep_candidates(
                    listed,
                    (my_slots, my_positions, my_scores),
                    key_head,
                    (key_stride_block, key_stride_slot, key_stride_dim),
                    q,
                    n,
                    valid,
                    rule,
                    counted_from,
                    scale,
                    softcap,
                    (kept_count, read_count, reached),
                    HEAD_DIM,
                    BLOCK_SIZE,
                    CANDIDATES,
                    STORED,
                    CANDIDATE_STAGES,
                    SINGLE_ROW,
                    UNION,
                    SOFTCAP,
                    COUNT,
                    REACHED,
                    FORMAT,
                    CONVERTED,
                    COMPUTE,
                    PRECISION,
                )
            else:
                for start in tl.range(list_begin, list_end, TILE, num_stages=KEY_STAGES):
                    position = start + offset
                    inside = position < list_end
                    block, slot = place_of(table_row, start, offset, inside, TILE, BLOCK_SIZE)
                    key_row = key_head + block.to(tl.int64) * key_stride_block + slot * key_stride_slot
                    k = tl.load(
                        key_row[:, None] + (dim * key_stride_dim)[None, :],
                        mask=inside[:, None] & dim_mask[None, :],
                        other=0,
                    )
                    k = decode_stored(k, FORMAT, COMPUTE, CONVERTED)
                    scores = tl.dot(k, q, input_precision=PRECISION) * scale
                    if SOFTCAP:
                        scores = softcapped(scores, softcap)
                    visible = visible_keys(position, inside, n, valid, SINGLE_ROW)
                    scores = tl.where(visible, scores, -float("inf"))

                    stored = scores
                    if SPARSE:
                        stored, kept_here, read_here = select(
                            scores, visible, position, rule, UNION, SINGLE_ROW, COMPUTE, PRECISION
                        )
                        some = kept_here > 0
                        if COUNT:
                            kept_count += kept_here
                            if not SINGLE_ROW:
                                read_count += read_here
                        if REACHED:
                            reached += ((scores >= counted_from[None, :]) & visible).to(tl.int32)
                        ahead, listed_here = ranks(some, TILE)
                        place = listed + ahead
                        listed += listed_here
                    else:
                        some = inside
                        place = position - list_begin
                        listed = list_end - list_begin
                    tl.store(my_slots + place, block * BLOCK_SIZE + slot, mask=some)
                    tl.store(
                        my_scores + place[:, None] * STORED + column[None, :],
                        stored,
                        mask=some[:, None] & (column < STORED)[None, :],
                    )
                    best, mass = softmax_step(best, mass, scores)

            rows_listed += listed
            # Now all threads see what all have listed.
            tl.debug_barrier()
            if SCREEN:
                new_reference = tl.maximum(reference, tl.maximum(told_level, exact_level))
                all_mass *= tl.exp2((reference - new_reference) * LOG2E)
                all_mass += told_mass * tl.exp2((told_level - new_reference) * LOG2E)
                all_mass += exact_mass * tl.exp2((exact_level - new_reference) * LOG2E)
            else:
                new_reference = tl.maximum(reference, tl.max(best, axis=0))
            shrink = to_wide(tl.exp2((reference - new_reference) * LOG2E), column, wide, COLUMNS, WIDE)
            reference = new_reference
            level = to_wide(reference, column, wide, COLUMNS, WIDE)
            out *= shrink[:, None]
            kept *= shrink[None, :]
            for start in tl.range(0, listed, GATHER, num_stages=VALUE_STAGES):
                inside = start + rank < listed
                # Behind the last of the list there is memory, with what an earlier one left.
                place = tl.load(my_slots + start + rank)
                scores = tl.load(
                    my_scores + (start + rank)[:, None] * STORED + wide[None, :],
                    mask=(wide < STORED)[None, :],
                    other=-float("inf"),
                )
                block, slot = (place // BLOCK_SIZE).to(tl.int64), place % BLOCK_SIZE
                value_row = value_head + block * value_stride_block + slot * value_stride_slot
                v = tl.load(
                    value_row[:, None] + value_dim[None, :],
                    mask=inside[:, None] & value_mask[None, :],
                    other=0,
                )
                weights = tl.where(inside[:, None], tl.exp2((scores - level[None, :]) * LOG2E), 0.0)
                if SPARSE:
                    kept += weights
                weights = tl.trans(weights).to(COMPUTE)
                out = tl.dot(
                    weights, decode_stored(v, FORMAT, COMPUTE, CONVERTED), out, input_precision=PRECISION
                )
            # The next list is written over this one.
            tl.debug_barrier()

        here, there = segment * USED + column, segment * USED + wide
        if not SCREEN:
            all_mass = tl.sum(mass * tl.exp2((best - reference[None, :]) * LOG2E), axis=0)
        tl.store(partial_softmax + here * 3, reference, mask=valid)
        tl.store(partial_softmax + here * 3 + 1, all_mass, mask=valid)
        tl.store(
            partial_out + there[:, None] * VALUE_DIM + value_dim[None, :],
            out,
            mask=(wide < USED)[:, None] & value_mask[None, :],
        )
        if SPARSE:
            all_kept = tl.where(dense, USED, 0)
            tl.store(partial_softmax + here * 3 + 2, all_mass, mask=column < all_kept)
            tl.store(
                partial_softmax + there * 3 + 2, tl.sum(kept, axis=0), mask=(wide >= all_kept) & (wide < USED)
            )
            if REACHED:
                tl.store(partial_reached + here, tl.sum(reached, axis=0), mask=valid)

    if SPARSE and COUNT:
        counters = statistics + program % statistics_slots * 8
        tl.atomic_add(counters + 2, tl.sum(kept_count, axis=0).to(tl.float64), sem="relaxed")
        rows_read = tl.full([], rows_listed, tl.int32) if SINGLE_ROW else tl.sum(read_count, axis=0) // GROUP
        tl.atomic_add(counters + 4, rows_read.to(tl.float64), sem="relaxed")
        if SCREEN:
            if SINGLE_ROW:
                candidates = tl.full([], candidates_listed, tl.int32)
            else:
                candidates = tl.sum(candidate_count, axis=0) // GROUP
            tl.atomic_add(counters + 6, candidates.to(tl.float64), sem="relaxed")
            tl.atomic_add(counters + 7, candidates.to(tl.float64), sem="relaxed")
