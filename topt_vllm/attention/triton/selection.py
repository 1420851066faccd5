"""Device functions that the phases of the decode kernel share: where keys are, what is kept, and softmax."""

import triton
import triton.language as tl

from topt_vllm.attention.triton.primitives import LOG2E


@triton.jit
def place_of(table_row, start, offset, inside, TILE: tl.constexpr, BLOCK_SIZE: tl.constexpr):
    """Physical block and slot in it of the keys of a tile; the block is one number where they all lie in it."""
    if BLOCK_SIZE % TILE == 0:
        block = tl.load(table_row + start // BLOCK_SIZE)
        slot = start % BLOCK_SIZE + offset
    else:
        block = tl.load(table_row + (start + offset) // BLOCK_SIZE, mask=inside, other=0)
        slot = (start + offset) % BLOCK_SIZE
    return block, slot


@triton.jit
def visible_keys(position, inside, n, valid, SINGLE_ROW: tl.constexpr):
    """Which keys [TILE] a column sees: bool [TILE, COLUMNS]. With a single row, all of the loop's."""
    return inside[:, None] & (valid[None, :] if SINGLE_ROW else position[:, None] < n[None, :])


@triton.jit
def forced_start(n, recent_tokens, VMEAN: tl.constexpr, STATE_ROWS: tl.constexpr):
    """The first key at the end of contexts that is kept whatever its score."""
    start = n - recent_tokens
    if VMEAN:
        start = tl.minimum(start, (n - 1) // STATE_ROWS * STATE_ROWS)
    return start


@triton.jit
def forced_keys(position, forced_from, sink_tokens, SINGLE_ROW: tl.constexpr):
    """Which keys [TILE] are kept whatever their score: bool [TILE, 1] with a single row, else [TILE, COLUMNS]."""
    if SINGLE_ROW:
        forced = ((position < sink_tokens) | (position >= forced_from))[:, None]
    else:
        forced = (position < sink_tokens)[:, None] | (position[:, None] >= forced_from[None, :])
    return forced


@triton.jit
def rows_with(chosen, same_row, COMPUTE: tl.constexpr, PRECISION: tl.constexpr):
    """Whether some head of a column's query row has chosen a key: bool [TILE, COLUMNS]."""
    return tl.dot(chosen.to(COMPUTE), same_row, input_precision=PRECISION) > 0


@triton.jit
def select(
    scores,  # [TILE, COLUMNS], −inf where not visible
    visible,  # bool [TILE, COLUMNS]
    position,  # [TILE]
    rule,
    UNION: tl.constexpr,
    SINGLE_ROW: tl.constexpr,
    COMPUTE: tl.constexpr,
    PRECISION: tl.constexpr,
):
    """What is kept of a tile.

    ``rule``: thresholds [COLUMNS]; bool [COLUMNS], whether every key is kept; from where on keys are forced, one
    for a single row, else [COLUMNS]; first tokens that are; and which columns are of the same query row, [COLUMNS,
    COLUMNS], or anything with a single row.

    Returns:
        Scores to be listed, −inf where a column doesn't use the key; how many columns keep each key; how many
        belong to a row that some head keeps it for (with a single row the same as the former, which isn't used).
    """
    threshold, always, forced_from, sink_tokens, same_row = rule
    forced = forced_keys(position, forced_from, sink_tokens, SINGLE_ROW) | always[None, :]
    keep = ((scores >= threshold[None, :]) | forced) & visible
    stored = scores
    if SINGLE_ROW:
        kept_here = tl.sum(keep.to(tl.int32), axis=1)
        read_here = kept_here
        if not UNION:
            stored = tl.where(keep, scores, -float("inf"))
    else:
        read = rows_with(keep, same_row, COMPUTE, PRECISION)
        stored = tl.where(read if UNION else keep, scores, -float("inf"))
        # Both counts in one sum.
        both = tl.sum(keep.to(tl.int32) + (read.to(tl.int32) << 16), axis=1)
        kept_here = both & 0xFFFF
        read_here = both >> 16
    return stored, kept_here, read_here


@triton.jit
def softmax_step(best, mass, scores):
    """Takes scores into the best score and the mass so far of each key of a tile and column."""
    new_best = tl.maximum(best, scores)
    mass = mass * tl.exp2((best - new_best) * LOG2E) + tl.exp2((scores - new_best) * LOG2E)
    return new_best, mass


@triton.jit
def softmax_of(best, mass):
    """Best score of a tile's columns and their mass relative to it: what threads hold crosses warps."""
    level = tl.max(best, axis=0)
    return level, tl.sum(mass * tl.exp2((best - level[None, :]) * LOG2E), axis=0)


@triton.jit
def to_wide(values, column, wide, COLUMNS: tl.constexpr, WIDE: tl.constexpr):
    """[COLUMNS] as [WIDE]."""
    if COLUMNS == WIDE:
        wide_values = values
    else:
        wide_values = tl.sum(tl.where(column[:, None] == wide[None, :], values[:, None], 0.0), axis=0)
    return wide_values
