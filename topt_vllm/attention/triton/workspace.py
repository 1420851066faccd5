"""Memory that the decode kernel leaves its partial results in, allocated once for every batch."""

from dataclasses import dataclass

import torch

from topt_vllm.attention.triton import launch


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
            shape = (
                sequences,
                max_query_rows,
                num_heads,
                num_kv_heads,
                head_dim,
                capacity,
                item_bytes,
                device,
            )
            parameters = launch.choose(*shape, splits=splits)
            words = max(words, sum(parts(parameters, rows, sequences, num_heads, num_kv_heads, head_dim)))
    return Workspace(torch.empty(words, dtype=torch.float32, device=device), splits)


def parts(
    parameters: launch.Launch, rows: int, sequences: int, num_heads: int, num_kv_heads: int, head_dim: int
) -> tuple[int, int, int, int]:
    """Words of the partial outputs, softmax terms, V sums and counts."""
    rows_heads = rows * num_heads * parameters.splits
    tiles = sequences * parameters.chunks * num_kv_heads * parameters.splits
    return rows_heads * head_dim, rows_heads * 3, tiles * head_dim, tiles * 2
