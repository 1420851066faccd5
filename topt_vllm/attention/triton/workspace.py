"""Memory that the decode kernel leaves its partial results in, allocated once for every batch."""

from dataclasses import dataclass

import torch

from topt_vllm.attention.triton.launch import Launch, choose, target_of


@dataclass(frozen=True)
class Parts:
    """Words of what the decode kernel leaves for the merge kernel.

    Attributes:
        outputs: float32 [R, H, splits, D].
        softmax: float32 [R, H, splits, 3]: best score, mass, dropped mass.
        sums: float32 [S, chunks, Hkv, splits, D], V sums of finished blocks.
        counts: int32 [S, chunks, Hkv, splits, 2]: pairs kept, V rows read.
    """

    outputs: int
    softmax: int
    sums: int
    counts: int

    @classmethod
    def of(
        cls, launch: Launch, rows: int, sequences: int, num_heads: int, num_kv_heads: int, head_dim: int
    ) -> "Parts":
        """For one batch."""
        of_rows = rows * num_heads * launch.splits
        of_tiles = sequences * launch.chunks * num_kv_heads * launch.splits
        words = (of_rows * head_dim, of_rows * 3, of_tiles * head_dim, of_tiles * 2)
        # Triton compiles a kernel again for a pointer that isn't at a multiple of 16 bytes.
        return cls(*(-(-count // 4) * 4 for count in words))

    @property
    def words(self) -> int:
        """All of them."""
        return self.outputs + self.softmax + self.sums + self.counts

    def cut(self, memory: torch.Tensor) -> dict[str, torch.Tensor]:
        """The parts of ``memory`` by the kernels' names."""
        sizes = (self.outputs, self.sums, self.softmax, self.counts)
        outputs, sums, softmax, counts = memory[: self.words].split(sizes)
        return {
            "partial_out": outputs,
            "partial_softmax": softmax,
            "partial_sums": sums,
            "partial_counts": counts.view(torch.int32),
        }


@dataclass(frozen=True)
class Workspace:
    """What the decode kernel leaves for the merge kernel.

    Attributes:
        memory: float32 [any].
        splits: Fixed number of splits; None for the heuristic's.
    """

    memory: torch.Tensor
    splits: int | None = None


def allocate_workspace(
    max_rows: int,
    max_sequences: int,
    num_heads: int,
    num_kv_heads: int,
    head_dim: int,
    capacity: int,
    max_query_rows: int,
    device: torch.device,
    splits: int | None = None,
) -> Workspace:
    """A workspace for every batch of up to these sizes; layers that run one after another can share it.

    Args:
        max_rows: Most decode rows of a step.
        max_sequences: Most sequences of a step.
        num_heads: Query heads.
        num_kv_heads: KV heads.
        head_dim: D.
        capacity: Tokens that a row of the block table has room for.
        max_query_rows: Most query rows of one sequence.
        device: Of the tensors.
        splits: Fixed number of splits instead of the heuristic's.
    """
    words = 0
    for sequences in range(1, max_sequences + 1):
        rows = min(max_rows, sequences * max_query_rows)
        for item_bytes in (1, 2, 4):
            shape = (sequences, max_query_rows, num_heads, num_kv_heads, head_dim, capacity, item_bytes)
            launch = choose(*shape, target_of(device), splits)
            parts = Parts.of(launch, rows, sequences, num_heads, num_kv_heads, head_dim)
            words = max(words, parts.words)
    return Workspace(torch.empty(words, dtype=torch.float32, device=device), splits)
