"""Memory that the decode kernel keeps lists and partial results in, allocated once for every batch."""

from itertools import product

import torch

from topt_vllm.attention.common import LargestBatch
from topt_vllm.attention.triton.launch import Launch, LaunchShape, choose, limits_of, power_of_two
from topt_vllm.attention.triton.queries_kernel import COEFFICIENTS

# Those that aren't float32.
_DTYPES = {
    "listed_slots": torch.int32,
    "partial_reached": torch.int32,
    "listed_positions": torch.int32,
    "query_codes": torch.int8,
}


def words_of(
    launch: Launch, items: int, num_heads: int, num_kv_heads: int, head_dim: int, value_dim: int
) -> dict[str, int]:
    """Words of what the decode kernel keeps, and of what it leaves for the merge kernel, by the kernels' names.

    ``items`` as :mod:`topt_vllm.attention.triton.schedule` has them.
    """
    columns = launch.rows * num_heads // num_kv_heads
    listed = num_kv_heads * launch.programs * launch.list_keys
    segments = num_kv_heads * (launch.programs + items)
    vectors = items * launch.rows * num_heads if launch.screened else 0
    words = {
        # [Hkv, programs, list_keys, rows * group up to a power of two], scores of listed keys.
        "listed_scores": listed * power_of_two(columns),
        # [Hkv, programs, list_keys], where they are in the cache.
        "listed_slots": listed,
        # [Hkv, segments, rows * group, Dv].
        "partial_out": segments * columns * value_dim,
        # [Hkv, segments, rows * group, 3]: the score that the rest is relative to, mass, kept mass.
        "partial_softmax": segments * columns * 3,
        # [Hkv, segments, rows * group], keys that reach θ.
        "partial_reached": segments * columns,
        # [Hkv, programs, list_keys], candidates' positions; like what follows with a K screen only.
        "listed_positions": listed if launch.screened else 0,
        # [R, H, 2, D / 2], q'.
        "query_codes": vectors * head_dim // 4,
        # [R, H, COEFFICIENTS], the queries kernel's.
        "coefficients": vectors * COEFFICIENTS.value,
    }
    # Triton compiles a kernel again for a pointer that isn't at a multiple of 16 bytes.
    return {name: -(-count // 4) * 4 for name, count in words.items()}


def cut(memory: torch.Tensor, words: dict[str, int]) -> dict[str, torch.Tensor]:
    """The parts of ``memory`` by the kernels' names."""
    parts = memory[: sum(words.values())].split(list(words.values()))
    return {name: part.view(_DTYPES.get(name, memory.dtype)) for name, part in zip(words, parts, strict=True)}


def allocate_workspace(largest: LargestBatch, programs: int | None = None) -> torch.Tensor:
    """Memory for every batch of up to these sizes, float32; layers that run one after another can share it.

    Args:
        largest: The sizes.
        programs: Fixed number of programs of a KV head instead of the heuristic's.
    """
    words = 0
    heads = largest.num_heads, largest.num_kv_heads, largest.head_dim
    limits = limits_of(largest.device)
    sequences, rows = {1, largest.max_sequences}, {1, largest.max_query_rows}
    kinds = product(rows, (1, 2, 4), (False, True), sequences, (16, 64))
    for query_rows, item_bytes, screened, batch, block_size in kinds:
        shape = LaunchShape(query_rows, *heads, item_bytes, screened, batch, block_size)
        launch = choose(shape, limits, programs)
        items = largest.max_sequences * launch.chunks(query_rows)
        words = max(words, sum(words_of(launch, items, *heads, largest.head_dim).values()))
    return torch.empty(words, dtype=torch.float32, device=largest.device)
