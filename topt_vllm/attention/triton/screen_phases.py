"""The decode kernel's first two phases with a K screen: which keys are candidates, and which of those are kept."""

import triton
import triton.language as tl

from topt_vllm.attention.triton.primitives import LOG2E, LOWEST, decode_stored, ranks, softcapped
from topt_vllm.attention.triton.queries_kernel import COEFFICIENTS
from topt_vllm.attention.triton.rotation import float_of
from topt_vllm.attention.triton.selection import (
    forced_keys,
    place_of,
    rows_with,
    select,
    softmax_of,
    softmax_step,
    visible_keys,
)

# Exponents of 2 between the highest score and what a mass is relative to that float32 bears: it has 126.
_FAR = tl.constexpr(60.0)


@triton.jit
def _low_codes(packed, FOUR_AT_ONCE: tl.constexpr):
    """Lower codes of bytes as int8. Left to itself, NVIDIA's compiler takes bytes apart one by one."""
    if FOUR_AT_ONCE:
        codes = tl.inline_asm_elementwise(
            "and.b32 $0, $1, 0x0F0F0F0F;", "=r,r", [packed], dtype=tl.int8, is_pure=True, pack=4
        )
    else:
        codes = (packed & 15).to(tl.int8)
    return codes


@triton.jit
def _high_codes(packed, FOUR_AT_ONCE: tl.constexpr):
    """Upper codes of bytes as int8."""
    if FOUR_AT_ONCE:
        codes = tl.inline_asm_elementwise(
            "{ .reg .b32 t; shr.u32 t, $1, 4; and.b32 $0, t, 0x0F0F0F0F; }",
            "=r,r",
            [packed],
            dtype=tl.int8,
            is_pure=True,
            pack=4,
        )
    else:
        codes = (packed >> 4).to(tl.int8)
    return codes


@triton.jit
def load_queries(
    query_codes,
    coefficients,
    query_row,  # int64 [COLUMNS]
    head,  # [COLUMNS]
    valid,  # bool [COLUMNS]
    HEADS: tl.constexpr,
    HEAD_DIM: tl.constexpr,
    HALF_PAD: tl.constexpr,
):
    """Codes of q', two of int8 [HALF_PAD, COLUMNS], and where the columns' coefficients are."""
    HALF: tl.constexpr = HEAD_DIM // 2
    half = tl.arange(0, HALF_PAD)
    vector = query_row * HEADS + head
    place = query_codes + (vector * HEAD_DIM)[None, :] + half[:, None]
    mask = valid[None, :] & (half < HALF)[:, None]
    low = tl.load(place, mask=mask, other=0)
    high = tl.load(place + HALF, mask=mask, other=0)
    return low, high, coefficients + vector * COEFFICIENTS


@triton.jit
def without_softcap(score, softcap):
    """The score [COLUMNS] that a softcap makes this one of; infinite at its ends and beyond."""
    part = tl.minimum(tl.maximum(score / softcap, -1.0), 1.0)
    between = 0.5 * softcap * tl.log((1.0 + part) / (1.0 - part))
    return tl.where(part >= 1.0, float("inf"), tl.where(part <= -1.0, -float("inf"), between))


@triton.jit
def flag_candidates(
    begin,
    end,
    table_row,
    codes_head,
    words_head,
    codes_stride_block,
    my_flags,
    queries,  # int8 [HALF_PAD, COLUMNS] twice, and pointers [COLUMNS]
    limit,  # [COLUMNS], the score that a candidate may reach
    n,  # [COLUMNS]
    valid,  # bool [COLUMNS]
    dense,
    rule,  # as in select
    softcap,
    candidate_count,  # int32 [TILE]
    HEAD_DIM: tl.constexpr,
    HALF_PAD: tl.constexpr,
    BLOCK_SIZE: tl.constexpr,
    TILE: tl.constexpr,
    STAGES: tl.constexpr,
    SINGLE_ROW: tl.constexpr,
    SOFTCAP: tl.constexpr,
    HARD: tl.constexpr,
    COUNT: tl.constexpr,
    FOUR_AT_ONCE: tl.constexpr,
    COMPUTE: tl.constexpr,
    PRECISION: tl.constexpr,
):
    """Streams codes of the keys from ``begin`` to ``end``: flags candidates, and takes all others into the mass.

    The mass is relative to a score that is set beforehand, so that no maximum is in its way: q·mean, which is in
    the middle of the scores. Where the highest turns out to be so far from it that float32 might not do, it is done
    again relative to that. A ``dense`` segment's keys are all candidates: no code is read, and nothing flagged.

    Returns:
        Best score and mass [COLUMNS] of the others; candidates of each query row, unless there is a single one.
    """
    query_low, query_high, numbers = queries
    _, always, forced_from, sink_tokens, same_row = rule
    HALF: tl.constexpr = HEAD_DIM // 2
    offset, half = tl.arange(0, TILE), tl.arange(0, HALF_PAD)
    # Exponents of 2, in which the mass is summed.
    factor = tl.load(numbers, mask=valid, other=0.0) * LOG2E
    bias = tl.load(numbers + 1, mask=valid, other=0.0) * LOG2E
    in_steps = tl.load(numbers + 2, mask=valid, other=0.0) * LOG2E
    mean_score = tl.load(numbers + 4, mask=valid, other=0.0) * LOG2E
    if HARD:
        in_errors = tl.load(numbers + 3, mask=valid, other=0.0) * LOG2E
    # Columns that stand for nothing have no candidates.
    reached = tl.where(valid, limit * LOG2E - mean_score, float("inf"))
    stop = tl.where(dense, begin, end)
    level = tl.zeros_like(mean_score)
    top = tl.full(level.shape, LOWEST, tl.float32)
    mass = tl.zeros([TILE, query_low.shape[1]], tl.float32)
    counted = candidate_count
    unsure = tl.full([], 1, tl.int32)
    passes = tl.full([], 0, tl.int32)
    # Scores beyond 2^30, of broken weights, would never settle.
    while (unsure > 0) & (passes < 2):
        best = tl.full([TILE, query_low.shape[1]], LOWEST, tl.float32)
        mass = tl.zeros([TILE, query_low.shape[1]], tl.float32)
        counted = candidate_count
        for start in tl.range(begin, stop, TILE, num_stages=STAGES):
            position = start + offset
            inside = position < end
            block, slot = place_of(table_row, start, offset, inside, TILE, BLOCK_SIZE)
            there = block.to(tl.int64) * codes_stride_block
            packed = tl.load(
                codes_head + (there + slot * HALF)[:, None] + half[None, :],
                mask=inside[:, None] & (half < HALF)[None, :],
                other=0,
            )
            word = tl.load(words_head + (there // 4 + BLOCK_SIZE * HALF // 4 + slot), mask=inside, other=0)
            sums = tl.dot(_low_codes(packed, FOUR_AT_ONCE), query_low, out_dtype=tl.int32)
            sums = tl.dot(_high_codes(packed, FOUR_AT_ONCE), query_high, sums, out_dtype=tl.int32)
            step = float_of(word)[:, None]
            # Relative to q·mean.
            in_step = sums.to(tl.float32) * factor[None, :] + bias[None, :]
            scores = step * in_step
            upper = step * (in_step + in_steps[None, :])
            if HARD:
                upper += float_of(word >> 16)[:, None] * in_errors[None, :]
                upper += 1e-4 * tl.abs(scores + mean_score[None, :])
            # Keys that can't be told, whose upper end is NaN, are candidates.
            may = ~(upper < reached[None, :])
            forced = forced_keys(position, forced_from, sink_tokens, SINGLE_ROW)
            if SINGLE_ROW:
                some = (tl.max(may.to(tl.int32), axis=1) > 0) | tl.reshape(forced, [TILE])
                counts = (inside & ~some)[:, None]
            else:
                visible = visible_keys(position, inside, n, valid, SINGLE_ROW)
                chosen = (may | forced | always[None, :]) & visible
                some = tl.max(chosen.to(tl.int32), axis=1) > 0
                if COUNT:
                    of_row = rows_with(chosen, same_row, COMPUTE, PRECISION)
                    counted += tl.sum(of_row.to(tl.int32), axis=1)
                counts = visible & (~some)[:, None]
            tl.store(my_flags + (start - begin) + offset, some.to(tl.int8), mask=inside)
            if SOFTCAP:
                full = (scores + mean_score[None, :]) * (1.0 / LOG2E)
                scores = softcapped(full, softcap) * LOG2E - mean_score[None, :]
            scores = tl.where(counts, scores - level[None, :], -float("inf"))
            best = tl.maximum(best, scores)
            mass += tl.exp2(scores)
        top = tl.max(best, axis=0)
        far = (tl.abs(top) > _FAR) & (tl.abs(top) < -LOWEST)
        unsure = tl.max(far.to(tl.int32), axis=0)
        passes += 1
        level += tl.where(far, top, 0.0)
    all_mass = tl.sum(mass, axis=0) * tl.exp2(-top)
    none = top == LOWEST
    told_level = tl.where(none, LOWEST, (mean_score + level + top) * (1.0 / LOG2E))
    return told_level, tl.where(none, 0.0, all_mass), counted


@triton.jit
def list_flagged(
    begin, end, table_row, my_flags, lists, every, BLOCK_SIZE: tl.constexpr, FLAGS: tl.constexpr
):
    """Lists flagged keys, or all if ``every``: many at a time, for a key's place in the list crosses warps.

    Returns:
        How many are listed.
    """
    my_slots, my_positions = lists
    offset = tl.arange(0, FLAGS)
    listed = 0
    for start in tl.range(begin, end, FLAGS):
        position = start + offset
        flag = tl.load(my_flags + (start - begin) + offset, mask=(position < end) & (not every), other=0)
        some = ((flag != 0) | every) & (position < end)
        block = tl.load(table_row + position // BLOCK_SIZE, mask=some, other=0)
        number = some.to(tl.int32)
        place = listed + tl.cumsum(number, axis=0) - number
        tl.store(my_slots + place, block * BLOCK_SIZE + position % BLOCK_SIZE, mask=some)
        tl.store(my_positions + place, position, mask=some)
        listed += tl.sum(number, axis=0)
    return listed


@triton.jit
def keep_candidates(
    listed,
    lists,
    key_head,
    key_strides,  # of block, slot and dim
    q,  # [DIM_PAD, COLUMNS]
    n,  # [COLUMNS]
    valid,  # bool [COLUMNS]
    rule,  # as in select
    counted_from,  # [COLUMNS]
    scale,
    softcap,
    counts,  # int32 [CANDIDATES] twice, and [CANDIDATES, COLUMNS]
    HEAD_DIM: tl.constexpr,
    BLOCK_SIZE: tl.constexpr,
    CANDIDATES: tl.constexpr,
    STORED: tl.constexpr,
    STAGES: tl.constexpr,
    SINGLE_ROW: tl.constexpr,
    UNION: tl.constexpr,
    SOFTCAP: tl.constexpr,
    COUNT: tl.constexpr,
    REACHED: tl.constexpr,
    FORMAT: tl.constexpr,
    CONVERTED: tl.constexpr,
    COMPUTE: tl.constexpr,
    PRECISION: tl.constexpr,
):
    """Gathers K of the listed candidates and lists those that are kept in their place, with their scores.

    What is written is never behind what was read: a key's new place is not above its old one, and keys of later
    iterations, which may be under way, have higher ones.

    Returns:
        How many are kept; best score and mass [COLUMNS] of all candidates; counts.
    """
    my_slots, my_positions, my_scores = lists
    key_stride_block, key_stride_slot, key_stride_dim = key_strides
    kept_count, read_count, reached = counts
    rank, dim = tl.arange(0, CANDIDATES), tl.arange(0, q.shape[0])
    column = tl.arange(0, q.shape[1])
    best = tl.full([CANDIDATES, q.shape[1]], LOWEST, tl.float32)
    mass = tl.zeros([CANDIDATES, q.shape[1]], tl.float32)
    kept = 0
    for start in tl.range(0, listed, CANDIDATES, num_stages=STAGES):
        inside = start + rank < listed
        # Behind the last of the list there is memory, with what an earlier one left.
        place = tl.load(my_slots + start + rank)
        position = tl.load(my_positions + start + rank)
        block, slot = (place // BLOCK_SIZE).to(tl.int64), place % BLOCK_SIZE
        key_row = key_head + block * key_stride_block + slot * key_stride_slot
        k = tl.load(
            key_row[:, None] + (dim * key_stride_dim)[None, :],
            mask=inside[:, None] & (dim < HEAD_DIM)[None, :],
            other=0,
        )
        scores = tl.dot(decode_stored(k, FORMAT, COMPUTE, CONVERTED), q, input_precision=PRECISION) * scale
        if SOFTCAP:
            scores = softcapped(scores, softcap)
        visible = visible_keys(position, inside, n, valid, SINGLE_ROW)
        scores = tl.where(visible, scores, -float("inf"))
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
        ahead, more = ranks(some, CANDIDATES)
        tl.store(my_slots + kept + ahead, place, mask=some)
        tl.store(
            my_scores + (kept + ahead)[:, None] * STORED + column[None, :],
            stored,
            mask=some[:, None] & (column < STORED)[None, :],
        )
        kept += more
        best, mass = softmax_step(best, mass, scores)
    level, all_mass = softmax_of(best, mass)
    return kept, level, all_mass, kept_count, read_count, reached
