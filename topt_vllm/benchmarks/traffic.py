"""What a decode call of the Triton kernel moves through memory, and the time that this takes at best.

A model, checked by the tests against every load and store of an interpreted run. Tables and lengths are left out:
4 bytes per block and KV head. So are the lists of keys whose V rows are to be read, which stay in the L2 cache.
"""

from dataclasses import dataclass
from itertools import product
from typing import Any

import torch

from topt_vllm.attention.triton.arguments import screen_bytes
from topt_vllm.attention.triton.launch import GpuLimits, LaunchShape, choose
from topt_vllm.attention.triton.queries_kernel import COEFFICIENTS
from topt_vllm.benchmarks.cases import Shape

_WORD = 4  # bytes of float32 and int32
_KIB = 1 << 10
_HOPPER = GpuLimits(amd=False, multiprocessors=132, shared_bytes=228 * _KIB, block_bytes=227 * _KIB)
_CDNA3 = GpuLimits(amd=True, multiprocessors=304, shared_bytes=64 * _KIB, block_bytes=64 * _KIB)


@dataclass(frozen=True)
class GpuProduct:
    """A GPU that there are predictions for.

    Attributes:
        name: As its maker calls it.
        bandwidth: Peak of its memory in bytes per second, from the data sheet.
        limits: What the launch heuristic knows of it.
    """

    name: str
    bandwidth: float
    limits: GpuLimits


GPUS = (
    GpuProduct("H100 SXM", 3.35e12, _HOPPER),
    GpuProduct("H200", 4.8e12, _HOPPER),
    GpuProduct("MI300X", 5.3e12, _CDNA3),
)


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
        again: What the merge kernel reads once more, out of the cache, so not in ``total``: V rows behind the sums,
            and the sums for all heads of a group but the first.
    """

    key: int
    value: int
    sums: int
    partials: int
    rows: int
    again: int
    codes: int = 0

    @property
    def total(self) -> int:
        """Bytes through memory."""
        return self.key + self.codes + self.value + self.sums + self.partials + self.rows


def traffic(
    shape: Shape,
    v_rows_read: int,
    limits: GpuLimits,
    programs: int | None = None,
    k_rows_read: int | None = None,
) -> Traffic:
    """Bytes of a call with thresholds, V means and statistics, some probability being dropped in every head.

    Args:
        shape: Of the batch; all contexts are of one length.
        v_rows_read: (KV head, key) pairs of the whole batch whose V row is read.
        limits: GPU.
        programs: Fixed number of programs of a KV head instead of the heuristic's.
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
        partials=_partials(shape, segments, 3),
        rows=shape.heads * (segments + shape.batch) * row + queries,
        again=shape.batch * shape.heads * behind * row + (shape.heads // shape.kv_heads - 1) * sums,
    )


def dense_traffic(shape: Shape, limits: GpuLimits) -> Traffic:
    """Bytes of a dense kernel that shares the keys likewise and needs nothing but K, V and partial outputs."""
    row = shape.head_dim * shape.dtype.itemsize
    keys = shape.batch * shape.kv_heads * shape.longest * row
    segments = _segments(shape, limits, None, False)
    partials = _partials(shape, segments, 2)
    return Traffic(keys, keys, 0, partials, shape.heads * (segments + shape.batch) * row, 0)


def _segments(shape: Shape, limits: GpuLimits, programs: int | None, screened: bool) -> int:
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


def _partials(shape: Shape, segments: int, softmax: int) -> int:
    """Written and read: outputs, and so many numbers of the softmax."""
    return 2 * shape.heads * segments * (shape.head_dim + softmax) * _WORD


def predictions(
    batches: list[int],
    seq_lens: list[int],
    keep: float,
    block_size: int,
    candidates: float | None = None,
) -> list[dict[str, Any]]:
    """One record per GPU, batch and length: microseconds at peak bandwidth, ours and dense.

    Args:
        batches: Sequences.
        seq_lens: Context lengths.
        keep: Share of the V rows that is read.
        block_size: P.
        candidates: Share of the K rows that a K screen lets through; None without one.
    """
    found: list[dict[str, Any]] = []
    for batch, seq_len, gpu in product(batches, seq_lens, GPUS):
        shape = Shape((seq_len,) * batch, 32, 8, 128, block_size, torch.bfloat16)
        keys = batch * shape.kv_heads * seq_len
        k_rows = None if candidates is None else round(candidates * keys)
        ours = traffic(shape, round(keep * keys), gpu.limits, k_rows_read=k_rows).total
        dense = dense_traffic(shape, gpu.limits).total
        found.append(
            {
                "gpu": gpu.name,
                "batch": batch,
                "seq_len": seq_len,
                "keep": keep,
                "candidates": candidates,
                "block_size": block_size,
                "bytes": ours,
                "bytes_dense": dense,
                "us": ours / gpu.bandwidth * 1e6,
                "us_dense": dense / gpu.bandwidth * 1e6,
                "ratio": dense / ours,
            }
        )
    return found
