"""Types and maths that every implementation of the operator shares.

Shapes are in brackets: ``R`` query rows, ``S`` sequences, ``H`` query heads, ``Hkv`` KV heads, ``D`` head
dimension, ``Dv`` that of V where it may differ, ``B`` blocks, ``P`` rows of a block, ``n`` the context length of
one row.
"""

import math
from dataclasses import dataclass
from enum import IntEnum
from typing import Literal, get_args

import torch

GroupKeep = Literal["head", "union"]
Compensation = Literal["none", "vmean"]


class Stat(IntEnum):
    """Index of each accumulator in the float64 statistics tensor [7]. Every decoded row adds to all of them."""

    ROWS = 0  # query rows decoded
    ELEMENTS = 1  # (query head, key) pairs in context: sum of n * H
    KEPT_ELEMENTS = 2  # pairs that the head's own rule keeps, before the group's union
    V_ROWS = 3  # (KV head, key) pairs in context: sum of n * Hkv
    V_ROWS_READ = 4  # pairs whose V row some head of the group keeps
    DROPPED_MASS = 5  # probability that was not multiplied with V, summed over query heads
    K_ROWS_READ = 6  # (KV head, key) pairs whose K was read in full: all of them without a K screen


def new_statistics(device: torch.device | str = "cpu") -> torch.Tensor:
    """Zeroed accumulators, indexed by :class:`Stat`."""
    return torch.zeros(len(Stat), dtype=torch.float64, device=device)


@dataclass(frozen=True)
class Policy:
    """What is kept whatever its score, and what becomes of the rest.

    Attributes:
        min_seq_len: Rows with n <= min_seq_len are attended densely (tokens).
        sink_tokens: The first tokens of the context, always kept.
        recent_tokens: The last tokens of the context, always kept; at least 1, so that no row is empty.
        group_keep: ``head``: each query head uses what it keeps itself. ``union``: each head uses every V row
            that some head of its GQA group keeps, which reads no more bytes.
        compensation: ``vmean``: the dropped probability times the mean of all V rows of the context is added.
            It makes the unfinished last block of the row dense, for its V rows have no stored sum.
    """

    min_seq_len: int = 0
    sink_tokens: int = 0
    recent_tokens: int = 1
    group_keep: GroupKeep = "union"
    compensation: Compensation = "vmean"

    def __post_init__(self) -> None:
        if self.recent_tokens < 1:
            raise ValueError(f"recent_tokens is {self.recent_tokens}; it must be at least 1")
        for name, choices in (("group_keep", get_args(GroupKeep)), ("compensation", get_args(Compensation))):
            if getattr(self, name) not in choices:
                raise ValueError(f"{name} is {getattr(self, name)!r}; it must be one of {', '.join(choices)}")


@dataclass(frozen=True)
class Thetas:
    """θ(n) of the query heads of one layer, in scaled logits.

    Attributes:
        lengths: int32 [L], ascending context lengths at which θ was calibrated.
        theta: float32 [H, L], θ at those lengths.
        law: float32 [H, 2], (c0, c1) of θ(n) = c0 + c1 ln n, used beyond the last length.
    """

    lengths: torch.Tensor
    theta: torch.Tensor
    law: torch.Tensor

    def at(self, seq_len: int) -> torch.Tensor:
        """θ at one context length, float32 [H].

        Below the first calibrated length nothing is known: θ = −inf. Between lengths θ is linear in log2 n.
        """
        lengths = self.lengths.tolist()
        if seq_len < lengths[0]:
            return torch.full_like(self.theta[:, 0], -math.inf)
        if seq_len > lengths[-1]:
            return self.law[:, 0] + self.law[:, 1] * math.log(seq_len)
        right = next(i for i, length in enumerate(lengths) if seq_len <= length)
        if seq_len == lengths[right]:
            return self.theta[:, right]
        left = right - 1
        weight = math.log2(seq_len / lengths[left]) / math.log2(lengths[right] / lengths[left])
        return torch.lerp(self.theta[:, left], self.theta[:, right], weight)

    def at_each(self, contexts: torch.Tensor) -> torch.Tensor:
        """:meth:`at` for many context lengths at once: int64 [r] to float32 [H, r]."""
        lengths, n = self.lengths.float(), contexts.float()
        right = torch.searchsorted(lengths, n).clamp(1, max(len(lengths) - 1, 1)).clamp(max=len(lengths) - 1)
        left = (right - 1).clamp(min=0)
        span = (lengths[right] / lengths[left]).log2().clamp(min=1e-9)
        weight = ((n / lengths[left]).log2() / span).clamp(0, 1)
        theta = self.theta[:, left].lerp(self.theta[:, right], weight)
        beyond = self.law[:, :1] + self.law[:, 1:] * n.log()
        theta = torch.where(n > lengths[-1], beyond, theta)
        return theta.masked_fill(n < lengths[0], -math.inf)

    def to(self, device: torch.device) -> "Thetas":
        """The same thresholds on a device."""
        return Thetas(self.lengths.to(device), self.theta.to(device), self.law.to(device))

    def heads(self, start: int, count: int) -> "Thetas":
        """The part of a tensor-parallel rank: ``count`` query heads from ``start``."""
        part = slice(start, start + count)
        return Thetas(self.lengths, self.theta[part].contiguous(), self.law[part].contiguous())


@dataclass(frozen=True)
class RowThetas:
    """θ of each query row by itself, whatever its context length: for thresholds that belong to a request.

    Attributes:
        theta: float32 [R, H], in scaled logits; −inf keeps every key.
    """

    theta: torch.Tensor


@dataclass(frozen=True)
class PagedCache:
    """The KV cache of one layer as logical views; strides tell how each platform lays a block out.

    Attributes:
        key: [B, Hkv, P, D]. On vLLM's CPU build a block of K is stored column-major: stride(2) == 1.
        value: [B, Hkv, P, Dv].
        value_sums: float32 [B, Hkv, Dv], the sum of each finished block's V rows; needed for ``vmean`` only.
        key_screen: uint8 [B, Hkv, bytes], a low-bit copy of each finished block's K in the implementation's own
            layout; with it, keys that can't reach θ are dropped without reading their K. None for none.
        key_scale: float32 [1], K is what is stored times this; None for 1. For fp8 caches.
        value_scale: float32 [1], as ``key_scale`` for V; ``value_sums`` are sums of what is stored.
        posit8: K and V are uint8 codes of 8-bit posits (:mod:`topt_vllm.attention.posit`), for which torch has no
            dtype. vLLM has no such cache; this is for callers of the operator.
    """

    key: torch.Tensor
    value: torch.Tensor
    value_sums: torch.Tensor | None = None
    key_screen: torch.Tensor | None = None
    key_scale: torch.Tensor | None = None
    value_scale: torch.Tensor | None = None
    posit8: bool = False


@dataclass(frozen=True)
class DecodeBatch:
    """Which rows attend to which blocks. Query row r of sequence s has context n = seq_lens[s] − (rows after it).

    Attributes:
        query_start_loc: int32 [S + 1], first query row of each sequence.
        seq_lens: int32 [S], context length of each sequence's last query row (tokens).
        block_table: int32 [S, max blocks], physical block of each logical block.
        max_query_rows: No sequence has more query rows; None for unknown. Spares a GPU programs without rows.
    """

    query_start_loc: torch.Tensor
    seq_lens: torch.Tensor
    block_table: torch.Tensor
    max_query_rows: int | None = None
