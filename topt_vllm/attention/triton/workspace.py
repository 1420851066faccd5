"""Memory that the decode kernel keeps lists and partial results in, allocated once for every batch."""

from dataclasses import astuple, dataclass
from itertools import product

import torch

from topt_vllm.attention.common import LargestBatch
from topt_vllm.attention.triton.launch import Launch, LaunchShape, choose, limits_of, power_of_two
from topt_vllm.attention.triton.queries_kernel import COEFFICIENTS


@dataclass(frozen=True)
class Parts:
    """Words of what the decode kernel keeps for itself, and of what it leaves for the merge kernel.

    Attributes:
        scores: float32 [Hkv, programs, list_keys, rows * group up to a power of two], scores of listed keys.
        slots: int32 [Hkv, programs, list_keys], where they are in the cache.
        outputs: float32 [Hkv, segments, rows * group, Dv].
        softmax: float32 [Hkv, segments, rows * group, 3]: the score that the rest is relative to, mass, kept mass.
        reached: int32 [Hkv, segments, rows * group], keys that reach θ.
        positions: int32 [Hkv, programs, list_keys], candidates' positions; like what follows with a K screen only.
        query_codes: int8 [R, H, 2, D / 2], q'.
        coefficients: float32 [R, H, COEFFICIENTS], the queries kernel's.
    """

    scores: int
    slots: int
    outputs: int
    softmax: int
    reached: int
    positions: int
    query_codes: int
    coefficients: int

    @classmethod
    def of(
        cls, launch: Launch, items: int, num_heads: int, num_kv_heads: int, head_dim: int, value_dim: int
    ) -> "Parts":
        """For one batch; ``items`` as :mod:`topt_vllm.attention.triton.schedule` has them."""
        columns = launch.rows * num_heads // num_kv_heads
        listed = num_kv_heads * launch.programs * launch.list_keys
        segments = num_kv_heads * (launch.programs + items)
        vectors = items * launch.rows * num_heads if launch.screened else 0
        words = (
            listed * power_of_two(columns),
            listed,
            segments * columns * value_dim,
            segments * columns * 3,
            segments * columns,
            listed if launch.screened else 0,
            vectors * head_dim // 4,
            vectors * COEFFICIENTS.value,
        )
        # Triton compiles a kernel again for a pointer that isn't at a multiple of 16 bytes.
        return cls(*(-(-count // 4) * 4 for count in words))

    @property
    def words(self) -> int:
        """All of them."""
        return sum(astuple(self))

    def cut(self, memory: torch.Tensor) -> dict[str, torch.Tensor]:
        """The parts of ``memory`` by the kernels' names."""
        scores, slots, outputs, softmax, reached, positions, codes, coefficients = memory[: self.words].split(
            astuple(self)
        )
        return {
            "listed_scores": scores,
            "listed_slots": slots.view(torch.int32),
            "partial_out": outputs,
            "partial_softmax": softmax,
            "partial_reached": reached.view(torch.int32),
            "listed_positions": positions.view(torch.int32),
            "query_codes": codes.view(torch.int8),
            "coefficients": coefficients,
        }


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
        words = max(words, Parts.of(launch, items, *heads, largest.head_dim).words)
    return torch.empty(words, dtype=torch.float32, device=largest.device)
