"""Quantiles of the scores of single decode rows, in eager PyTorch: what SiftAttention's warm-up records."""

import math

import torch

from topt_vllm.attention.common import DecodeBatch, PagedCache
from topt_vllm.attention.reference import gather, scaled_scores


def score_quantiles(
    query: torch.Tensor,
    cache: PagedCache,
    batch: DecodeBatch,
    sequences: list[int],
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
        batch: Rows, context lengths and block table.
        sequences: Indices of sequences in the batch.
        tau: Above 0 and below 1.
        scale: Factor of q·k.
        softcap: Logits softcap, 0 for none.

    Returns:
        float32 [len(sequences), H], scaled logits.
    """
    block_size = cache.key.shape[2]
    starts = batch.query_start_loc.tolist()
    found = query.new_empty(len(sequences), query.shape[1], dtype=torch.float32)
    for index, sequence in enumerate(sequences):
        first, end = starts[sequence], starts[sequence + 1]
        n = int(batch.seq_lens[sequence]) - (end - 1 - first)
        blocks = batch.block_table[sequence, : -(-n // block_size)].long()
        key = gather(cache.key, blocks, cache.key_scale)[:, :n]
        scores = scaled_scores(query[first], key, scale, softcap)
        found[index] = quantile(scores, n, tau)
    return found


def quantile(scores: torch.Tensor, n: int, tau: float) -> torch.Tensor:
    """That of one row by head: scores [H, at least n], −inf at keys that it doesn't see, to [H]."""
    return scores.topk(kept_of(n, tau), dim=-1, sorted=False).values.amin(dim=-1)


def kept_of(n: int, tau: float) -> int:
    """Keys of a context of ``n`` that a quantile ``tau`` leaves, at least one."""
    return max(1, n - math.ceil(tau * n))
