"""Quantiles of the scores of single decode rows, in eager PyTorch: what SiftAttention's warm-up records."""

import math

import torch

from topt_vllm.attention.common import DecodeArguments
from topt_vllm.attention.reference import gather, scaled_scores


def score_quantiles(given: DecodeArguments, rows: list[tuple[int, int, int]], tau: float) -> torch.Tensor:
    """The score that a share ``tau`` of a row's keys stays below, for the first query row of some sequences.

    It is a score that occurs: the keys that reach it are the max(1, n − ⌈tau·n⌉) best ones, and ties of the
    last. Nothing waits for a device.

    Args:
        given: Of the layer; V isn't read.
        rows: For each sequence its index in the batch, its first query row, and that row's context (tokens), or
            more: what the batch says counts.
        tau: Above 0 and below 1.

    Returns:
        float32 [len(rows), H], scaled logits.
    """
    query, cache, batch = given.query, given.cache, given.batch
    block_size = cache.key.shape[2]
    found = query.new_empty(len(rows), query.shape[1], dtype=torch.float32)
    # Of each sequence's first row, and the last of its best keys, as kept_of has them.
    contexts = batch.seq_lens - batch.query_start_loc.diff() + 1
    last = (contexts - (tau * contexts.double()).ceil()).clamp(min=1).long() - 1
    for index, (sequence, row, most) in enumerate(rows):
        blocks = batch.block_table[sequence, : -(-most // block_size)].long()
        key = gather(cache.key, blocks, cache.key_scale)[:, :most]
        scores = scaled_scores(query[row], key, given.scale, given.softcap)
        unseen = torch.arange(most, device=scores.device) >= contexts[sequence]
        best = scores.masked_fill(unseen, -torch.inf).topk(kept_of(most, tau), dim=-1).values
        found[index] = best.index_select(1, last[sequence].view(1))[:, 0]
    return found


def quantile(scores: torch.Tensor, n: int, tau: float) -> torch.Tensor:
    """That of one row by head: scores [H, at least n], −inf at keys that it doesn't see, to [H]."""
    return scores.topk(kept_of(n, tau), dim=-1, sorted=False).values.amin(dim=-1)


def kept_of(n: int, tau: float) -> int:
    """Keys of a context of ``n`` that a quantile ``tau`` leaves, at least one."""
    return max(1, n - math.ceil(tau * n))
