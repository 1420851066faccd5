"""Quantiles of the scores of single decode rows, in eager PyTorch: what SiftAttention's warm-up records."""

import math

import torch

from topt_vllm.attention.common import DecodeBatch, PagedCache
from topt_vllm.attention.reference import gather, scaled_scores


def first_rows(batch: DecodeBatch, sequences: list[int]) -> list[tuple[int, int, int]]:
    """Of each of these sequences its index in the batch, its first query row, and that row's context (tokens).

    On GPUs it waits for the device, so ask once a step.
    """
    starts, lengths = batch.query_start_loc.tolist(), batch.seq_lens.tolist()
    return [(s, starts[s], lengths[s] - (starts[s + 1] - 1 - starts[s])) for s in sequences]


def score_quantiles(
    query: torch.Tensor,
    cache: PagedCache,
    batch: DecodeBatch,
    rows: list[tuple[int, int, int]],
    tau: float,
    scale: float,
    softcap: float = 0.0,
) -> torch.Tensor:
    """The score that a share ``tau`` of a row's keys stays below, for the first query row of some sequences.

    It is a score that occurs: the keys that reach it are the max(1, n − ⌈tau·n⌉) best ones, and ties of the
    last.

    Args:
        query: [R, H, D].
        cache: K of the layer; V isn't read.
        batch: For its block table.
        rows: What :func:`first_rows` gave.
        tau: Above 0 and below 1.
        scale: Factor of q·k.
        softcap: Logits softcap, 0 for none.

    Returns:
        float32 [len(rows), H], scaled logits.
    """
    block_size = cache.key.shape[2]
    found = query.new_empty(len(rows), query.shape[1], dtype=torch.float32)
    for index, (sequence, row, n) in enumerate(rows):
        blocks = batch.block_table[sequence, : -(-n // block_size)].long()
        key = gather(cache.key, blocks, cache.key_scale)[:, :n]
        scores = scaled_scores(query[row], key, scale, softcap)
        found[index] = quantile(scores, n, tau)
    return found


def quantile(scores: torch.Tensor, n: int, tau: float) -> torch.Tensor:
    """That of one row by head: scores [H, at least n], −inf at keys that it doesn't see, to [H]."""
    return scores.topk(kept_of(n, tau), dim=-1, sorted=False).values.amin(dim=-1)


def kept_of(n: int, tau: float) -> int:
    """Keys of a context of ``n`` that a quantile ``tau`` leaves, at least one."""
    return max(1, n - math.ceil(tau * n))
