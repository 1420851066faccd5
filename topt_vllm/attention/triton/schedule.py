"""How the work of a batch is shared out: device functions with which programs find their parts by arithmetic.

An *item* is a chunk of the query rows of one sequence, ``sequence * chunks + chunk``; its work is the tiles of keys
that its last row sees. All items' tiles in a row, ``total`` of them, are dealt out evenly: each of the programs in
use gets ``total // used`` in order, the first ``total % used`` of them one more, wherever sequences begin and end.
What one program does of one item is a *segment*. Segment (p, item) is number ``p + item``, which no other one is: a
later program never has an earlier item.
"""

import triton
import triton.language as tl

# Items that are looked at together; more would not fit in a program's registers.
MOST_ITEMS = tl.constexpr(2048)


@triton.jit
def rows_of(query_start_loc, seq_lens, sequence, listed=True):
    """(first query row, number of query rows, context length of the last one) of a sequence; no rows if padding."""
    first = tl.load(query_start_loc + sequence, mask=listed, other=0)
    count = tl.load(query_start_loc + sequence + 1, mask=listed, other=0) - first
    last_len = tl.load(seq_lens + sequence, mask=listed, other=0)
    return first, tl.where(last_len > 0, count, 0), last_len


@triton.jit
def chunk_context(count, last_len, chunk, ROWS: tl.constexpr):
    """Context length of the last row of a chunk of a sequence's query rows."""
    last_row = tl.minimum(chunk * ROWS + ROWS, count) - 1
    return last_len - (count - 1 - last_row)


@triton.jit
def chunk_tiles(count, n_last, chunk, ROWS: tl.constexpr, TILE: tl.constexpr):
    """Tiles of keys that a chunk sees; none where a sequence has no rows in it."""
    return tl.where(chunk * ROWS < count, tl.cdiv(n_last, TILE), 0)


@triton.jit
def tiles_of(query_start_loc, seq_lens, item, listed, chunks, ROWS: tl.constexpr, TILE: tl.constexpr):
    """Tiles of items; none where ``listed`` is false."""
    _, count, last_len = rows_of(query_start_loc, seq_lens, item // chunks, listed)
    chunk = item % chunks
    n_last = chunk_context(count, last_len, chunk, ROWS)
    return chunk_tiles(count, n_last, chunk, ROWS, TILE)


@triton.jit
def programs_used(total, programs, MIN_TILES: tl.constexpr):
    """Programs that take part: no more than give each ``MIN_TILES``, for a shorter one costs more than it saves."""
    return tl.maximum(tl.minimum(programs, total // MIN_TILES), tl.minimum(total, 1))


@triton.jit
def first_tile(program, total, used):
    """The tile with which a program's share begins."""
    return program * (total // used) + tl.minimum(program, total % used)


@triton.jit
def program_of(tile, total, used):
    """Whose share a tile is in."""
    share = total // used
    in_larger = total % used * (share + 1)  # tiles of the programs that have one more
    return tl.where(
        tile < in_larger, tile // (share + 1), total % used + (tile - in_larger) // tl.maximum(share, 1)
    )
