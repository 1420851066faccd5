"""Launch parameters of the kernels: a small heuristic by device and shape. README.md gives the reasons."""

from dataclasses import dataclass
from functools import cache

import torch

MAX_SPLITS = 64
# A split shorter than this costs more in its partial result than it saves in time.
MIN_SPLIT_TOKENS = 256
# The matrix instructions of all targets take at least 16 rows.
MIN_TILE_ROWS = 16
MAX_TILE_ROWS = 64
# Programs that a multiprocessor holds at once, at least; scripts of `topt-vllm bench compile` check it.
PROGRAMS_PER_MULTIPROCESSOR = 2
# Rounds of programs: two even out sequences of different lengths.
ROUNDS = 2


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
    """

    group_pad: int
    rows: int
    chunks: int
    splits: int
    tile: int
    min_tiles: int
    num_warps: int
    num_stages: int


def choose(
    sequences: int,
    max_query_rows: int,
    num_heads: int,
    num_kv_heads: int,
    head_dim: int,
    capacity: int,
    item_bytes: int,
    device: torch.device,
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
        device: Of the tensors.
        splits: Fixed number of splits instead of the heuristic's.
    """
    group_pad = power_of_two(num_heads // num_kv_heads)
    rows = max(power_of_two(max_query_rows), -(-MIN_TILE_ROWS // group_pad))
    rows = min(rows, max(1, MAX_TILE_ROWS // group_pad))
    chunks = -(-max_query_rows // rows)
    tile, num_warps, num_stages = _tile(rows * group_pad, power_of_two(head_dim), item_bytes, is_amd(device))
    if splits is None:
        splits = _splits(sequences * chunks * num_kv_heads, capacity, multiprocessors(device))
    min_tiles = max(1, MIN_SPLIT_TOKENS // tile)
    return Launch(group_pad, rows, chunks, splits, tile, min_tiles, num_warps, num_stages)


def _tile(tile_rows: int, dim_pad: int, item_bytes: int, amd: bool) -> tuple[int, int, int]:
    """Keys per iteration, warps, pipeline stages."""
    tile = 64 if dim_pad <= 128 and tile_rows <= 32 else 32
    return tile, 4, 2 if amd or item_bytes > 2 else 3


def _splits(programs: int, capacity: int, num_multiprocessors: int) -> int:
    wanted = ROUNDS * PROGRAMS_PER_MULTIPROCESSOR * num_multiprocessors
    return max(1, min(-(-wanted // programs), -(-capacity // MIN_SPLIT_TOKENS), MAX_SPLITS))


def power_of_two(number: int) -> int:
    """The least power of two that is no smaller."""
    return 1 << max(0, number - 1).bit_length()


def is_amd(device: torch.device) -> bool:
    """Whether the device is driven by ROCm."""
    return device.type == "cuda" and torch.version.hip is not None


@cache
def multiprocessors(device: torch.device) -> int:
    """Multiprocessors of a GPU; 1 for the interpreter, which runs one program after another."""
    return torch.cuda.get_device_properties(device).multi_processor_count if device.type == "cuda" else 1
