"""Launch parameters of the kernels: a small heuristic by device and shape. README.md gives the reasons."""

from dataclasses import dataclass
from functools import cache

import torch

MAX_SPLITS = 64
# A split shorter than this costs more in its partial result than it saves in time.
MIN_SPLIT_TOKENS = 256
# The matrix instructions of all targets take at least 16 rows; with more, registers spill.
TILE_ROWS = 16
# Programs that a multiprocessor holds at once, at least; scripts of `topt-vllm bench compile` check it.
PROGRAMS_PER_MULTIPROCESSOR = 2
# Rounds of programs: two even out sequences of different lengths.
ROUNDS = 2


@dataclass(frozen=True)
class Target:
    """What the heuristic knows of a GPU.

    Attributes:
        amd: Whether ROCm drives it.
        multiprocessors: Multiprocessors or compute units.
    """

    amd: bool
    multiprocessors: int


@dataclass(frozen=True)
class Launch:
    """What the kernels are compiled and launched with; nothing in it depends on lengths or any other data.

    Attributes:
        group_pad: Heads of a group, up to a power of two.
        rows: Query rows of one sequence that share a tile; tile rows are rows * group_pad.
        chunks: Tiles that the rows of one sequence are spread over.
        splits: Programs that share the keys of one sequence and KV head.
        tile: Keys per iteration.
        min_tiles: Least tiles of a split.
        num_warps: Of the decode kernel.
        num_stages: Depth of its software pipeline.
        max_registers: Bound on its registers per thread; None for AMD.
    """

    group_pad: int
    rows: int
    chunks: int
    splits: int
    tile: int
    min_tiles: int
    num_warps: int
    num_stages: int
    max_registers: int | None


def choose(
    sequences: int,
    max_query_rows: int,
    num_heads: int,
    num_kv_heads: int,
    head_dim: int,
    capacity: int,
    item_bytes: int,
    target: Target,
    splits: int | None = None,
) -> Launch:
    """Launch parameters for a shape.

    Args:
        sequences: Of the batch, padding included.
        max_query_rows: Most query rows of a sequence.
        num_heads: Query heads.
        num_kv_heads: KV heads.
        head_dim: D.
        capacity: Tokens that a row of the block table has room for.
        item_bytes: Of an element of K and V in memory.
        target: GPU.
        splits: Fixed number of splits instead of the heuristic's.
    """
    group_pad = power_of_two(num_heads // num_kv_heads)
    rows = max(1, TILE_ROWS // group_pad)
    chunks = -(-max_query_rows // rows)
    multi_row = max_query_rows > 1
    tile, num_stages = _pipeline(power_of_two(head_dim), item_bytes, multi_row, target.amd)
    # A bound keeps NVIDIA's assembler from spilling to fit one more block. Decoding fp8 and several rows need more.
    lean = item_bytes == 2 and not multi_row and head_dim <= 128
    max_registers = None if target.amd else 192 if lean else 255
    if splits is None:
        splits = _splits(sequences * chunks * num_kv_heads, capacity, target.multiprocessors)
    min_tiles = max(1, MIN_SPLIT_TOKENS // tile)
    return Launch(group_pad, rows, chunks, splits, tile, min_tiles, 4, num_stages, max_registers)


def _pipeline(dim_pad: int, item_bytes: int, multi_row: bool, amd: bool) -> tuple[int, int]:
    """Keys per iteration and pipeline stages: what two blocks per multiprocessor leave room for without spills."""
    if amd:
        return 64, 2 if dim_pad <= 128 and not multi_row else 1
    return 64 if dim_pad <= 128 else 32, 3 if item_bytes <= 2 else 2


def _splits(programs: int, capacity: int, num_multiprocessors: int) -> int:
    wanted = ROUNDS * PROGRAMS_PER_MULTIPROCESSOR * num_multiprocessors
    return max(1, min(-(-wanted // programs), -(-capacity // MIN_SPLIT_TOKENS), MAX_SPLITS))


def power_of_two(number: int) -> int:
    """The least power of two that is no smaller."""
    return 1 << max(0, number - 1).bit_length()


@cache
def target_of(device: torch.device) -> Target:
    """The GPU of tensors; one multiprocessor for the interpreter, which runs one program after another."""
    if device.type != "cuda":
        return Target(amd=False, multiprocessors=1)
    count = torch.cuda.get_device_properties(device).multi_processor_count
    return Target(torch.version.hip is not None, count)
