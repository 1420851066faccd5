"""What a decode call of the Triton kernel has to move through memory.

Tables and lengths are left out: 4 bytes per block and KV head. So are the lists of keys whose V rows are to be
read, which stay in the L2 cache.
"""

from dataclasses import dataclass

from topt_vllm.attention.triton.arguments import screen_bytes
from topt_vllm.attention.triton.launch import GpuLimits, LaunchShape, choose
from topt_vllm.attention.triton.queries_kernel import COEFFICIENTS
from topt_vllm.benchmarks.cases import Shape

_WORD = 4  # bytes of float32 and int32


@dataclass(frozen=True)
class Traffic:
    """Bytes of one call.

    Attributes:
        key: K, all of it; with a K screen that of its candidates.
        codes: What a K screen reads of every key instead.
        value: V rows that some head of their group keeps.
        sums: One V sum of each KV head and row.
        partials: Partial results of the segments, written and read.
        rows: Query, which every segment reads, and output; with a K screen also the query's codes.
        again: What the merge kernel reads once more, out of the cache: V rows behind the sums, and
            the sums for all heads of a group but the first.
    """

    key: int
    value: int
    sums: int
    partials: int
    rows: int
    again: int
    codes: int = 0


def traffic(
    shape: Shape,
    v_rows_read: int,
    limits: GpuLimits,
    programs: int,
    k_rows_read: int | None = None,
) -> Traffic:
    """Bytes of a call with thresholds, V means and statistics, some probability being dropped in every head.

    Args:
        shape: Of the batch; all contexts are of one length.
        v_rows_read: (KV head, key) pairs of the whole batch whose V row is read.
        limits: GPU.
        programs: Of a KV head.
        k_rows_read: (KV head, key) pairs that a K screen lets through; None without one.
    """
    screened = k_rows_read is not None
    row = shape.head_dim * shape.dtype.itemsize
    pairs = shape.batch * shape.kv_heads
    keys = pairs * shape.longest
    segments = _segments(shape, limits, programs, screened)
    # Codes and coefficients of the query: written with the query read; all but that of hard bounds by each segment.
    numbers = shape.head_dim + COEFFICIENTS.value * _WORD
    queries = shape.heads * (shape.batch * (row + numbers) + segments * (numbers - _WORD)) if screened else 0
    behind = (shape.longest - 1) % shape.state_rows + 1
    sums = pairs * shape.head_dim * _WORD if shape.longest > shape.state_rows else 0
    return Traffic(
        key=(keys if k_rows_read is None else k_rows_read) * row,
        codes=keys * screen_bytes("int4", shape.head_dim, 1) if screened else 0,
        value=v_rows_read * row,
        sums=sums,
        # Written and read: outputs, and three numbers of the softmax.
        partials=2 * shape.heads * segments * (shape.head_dim + 3) * _WORD,
        rows=shape.heads * (segments + shape.batch) * row + queries,
        again=shape.batch * shape.heads * behind * row + (shape.heads // shape.kv_heads - 1) * sums,
    )


def _segments(shape: Shape, limits: GpuLimits, programs: int, screened: bool) -> int:
    """Parts of one KV head that programs and sequences cut the batch into."""
    heads = shape.heads, shape.kv_heads, shape.head_dim
    called = LaunchShape(1, *heads, shape.dtype.itemsize, screened, shape.batch, shape.block_size)
    launch = choose(called, limits, programs)
    tiles = -(-shape.longest // launch.tile)
    total = tiles * shape.batch
    used = max(1, min(launch.programs, total // launch.min_tiles))
    share, larger = divmod(total, used)
    cuts = {program * share + min(program, larger) for program in range(used)}
    return len(cuts | {sequence * tiles for sequence in range(shape.batch)})
