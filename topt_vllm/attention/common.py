"""Types and maths that every implementation of the operator shares.

Shapes are in brackets: ``R`` query rows, ``S`` sequences, ``H`` query heads, ``Hkv`` KV heads, ``D`` head
dimension, ``Dv`` that of V where it may differ, ``B`` blocks, ``P`` rows of a block, ``T`` rows of a state, ``n``
the context length of one row.
"""

import math
from collections.abc import Mapping
from dataclasses import dataclass, field
from enum import IntEnum
from typing import Literal, get_args

import torch

from topt_vllm.attention.margin import DEFAULT_MARGIN
from topt_vllm.attention.screen import ScreenFormat, ScreenTransform

GroupKeep = Literal["head", "union"]
Compensation = Literal["none", "vmean"]

# Lengths are int32 (tokens).
LONGEST_CONTEXT = 2**31 - 1


class Stat(IntEnum):
    """Index of each accumulator in a slot of statistics [8]. Every decoded row adds to all of them."""

    ROWS = 0  # query rows decoded
    ELEMENTS = 1  # (query head, key) pairs in context: sum of n * H
    KEPT_ELEMENTS = 2  # pairs that the head's own rule keeps, before the group's union
    V_ROWS = 3  # (KV head, key) pairs in context: sum of n * Hkv
    V_ROWS_READ = 4  # pairs whose V row some head of the group keeps
    DROPPED_MASS = 5  # probability that was not multiplied with V, summed over query heads
    K_ROWS_READ = 6  # (KV head, key) pairs whose K was read in full: all of them without a K screen
    CANDIDATES = 7  # (KV head, key) pairs that a K screen let through; all of them without one


def new_statistics(device: torch.device | str = "cpu", slots: int = 1) -> torch.Tensor:
    """Zeroed accumulators float64 [slots, 8], indexed by :class:`Stat`; what counts is their sum over slots."""
    return torch.zeros(slots, len(Stat), dtype=torch.float64, device=device)


@dataclass(frozen=True)
class ScreenLimits:
    """Where a K screen beats reading K in full; elsewhere it is left out.

    Attributes:
        largest_share: Of candidates among the keys, in a layer.
        min_seq_len: Rows with n <= min_seq_len read K in full (tokens).
    """

    largest_share: float = 1.0
    min_seq_len: int = 0


# int4: measured on an H100, where it pays below 62 % of candidates at 16 sequences of 32k and below 36 % at one.
# int4+4: on an Intel Xeon, two threads, it pays below 59 % with one sequence of 32k, below 39 % with eight of
# 8k and three heads of 64 in a group (docs/results.md). A row of a thousand keys fits their caches, and the
# query's transform costs what reading less of K spares.
SCREEN_LIMITS: Mapping[ScreenFormat, ScreenLimits] = {
    "int4": ScreenLimits(largest_share=0.36),
    "int4+4": ScreenLimits(largest_share=0.36, min_seq_len=1024),
}


@dataclass(frozen=True)
class Capabilities:
    """What an implementation of the operator does beyond what all of them do.

    Attributes:
        narrow_values: Takes heads of V that are smaller than those of K.
        screens: Formats of the K screens that it has, and where each pays.
        graphs: Runs on buffers that were allocated before, and reads nothing back: a CUDA graph can hold it.
        amx_copies: Copies blocks of a CPU cache into the layout of vLLM's AMX kernels.
    """

    narrow_values: bool = False
    screens: Mapping[ScreenFormat, ScreenLimits] = field(default_factory=dict)
    graphs: bool = False
    amx_copies: bool = False


@dataclass(frozen=True)
class Selection:
    """What is kept whatever its score, and what becomes of the rest.

    Attributes:
        min_seq_len: Rows with n <= min_seq_len are attended densely (tokens).
        sink_tokens: The first tokens of the context, always kept.
        recent_tokens: The last tokens of the context, always kept; at least 1, so that no row is empty.
        group_keep: ``head``: each query head uses what it keeps itself. ``union``: each head uses every V row
            that some head of its GQA group keeps, which reads no more bytes.
        compensation: ``vmean``: the dropped probability times the mean of all V rows of the context is added.
            It keeps the row's last 1 to T keys, from (n − 1) // T · T on: V sums end there.
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


def choose_rows_per_state(block_size: int) -> int:
    """T for blocks of P rows: the largest of 64, 32 and 16 that divides P, else P.

    Sums of 64 rows are 4 bytes beside 256 of K and V in 16 bits. More rows would make more of a context dense.
    """
    return next((rows for rows in (64, 32, 16) if block_size % rows == 0), block_size)


@dataclass(frozen=True)
class KeyScreen:
    """A low-bit copy of K: keys that can't reach θ are dropped without reading their K (``screen.py``).

    Attributes:
        format: Of the copy, one of those that the implementation has.
        transform: Calibrated for this layer.
        codes: uint8 [B, Hkv, bytes], contiguous in a block; the bytes are the implementation's ``screen_bytes``.
            Rows count once ``finish`` has seen them; until then their codes may be anything, and aren't used.
        margin: Standard deviations of plane one's error that a score may lie below θ; None for a hard bound, which
            misses nothing.
        min_seq_len: Rows with n <= min_seq_len read K in full, as if there were no screen (tokens).
    """

    format: ScreenFormat
    transform: ScreenTransform
    codes: torch.Tensor
    margin: float | None = DEFAULT_MARGIN
    min_seq_len: int = 0

    def __post_init__(self) -> None:
        if self.format not in get_args(ScreenFormat):
            allowed = ", ".join(get_args(ScreenFormat))
            raise ValueError(f"format is {self.format!r}; it must be one of {allowed}")
        if self.margin is not None and not 0.0 <= self.margin < math.inf:
            raise ValueError(f"margin is {self.margin}; it must be a number of at least 0, or None")


@dataclass(frozen=True)
class PagedCache:
    """The KV cache of one layer as logical views; strides tell how each platform lays a block out.

    Attributes:
        key: [B, Hkv, P, D]. On vLLM's CPU build a block of K is stored column-major: stride(2) == 1.
        value: [B, Hkv, P, Dv].
        value_sums: float32 [B, Hkv, P / T, Dv], running sums of V, any strides but the last, which is 1: state t
            of a block is the sum of all V rows of the context from its first to the last of the state's T. It
            depends on the prefix alone, as K and V do, so blocks can be shared. A state counts once its last row is
            written; until then its memory may hold anything, and is not read. Needed for ``vmean`` only.
        key_screen: With it, keys that can't reach θ are dropped without reading their K; None for none.
        key_scale: float32 [1], K is what is stored times this; None for 1. For fp8 caches.
        value_scale: float32 [1], as ``key_scale`` for V; ``value_sums`` are sums of what is stored.
    """

    key: torch.Tensor
    value: torch.Tensor
    value_sums: torch.Tensor | None = None
    key_screen: KeyScreen | None = None
    key_scale: torch.Tensor | None = None
    value_scale: torch.Tensor | None = None

    @property
    def rows_per_state(self) -> int | None:
        """T; None where there are no V sums.

        Raises:
            ValueError: ``value_sums`` doesn't fit ``value``.
        """
        if self.value_sums is None:
            return None
        blocks, num_kv_heads, block_size, dim = self.value.shape
        states = self.value_sums.shape[2] if self.value_sums.dim() == 4 else 0
        fits = states > 0 and block_size % states == 0
        if not fits or self.value_sums.shape != (blocks, num_kv_heads, states, dim):
            raise ValueError(
                f"value_sums {tuple(self.value_sums.shape)} must be [B={blocks}, Hkv={num_kv_heads}, "
                f"P / T of P={block_size}, Dv={dim}] with rows of a state T that divide P"
            )
        return block_size // states


@dataclass(frozen=True)
class DecodeBatch:
    """Which rows attend to which blocks. Query row r of sequence s has context n = seq_lens[s] − (rows after it).

    Attributes:
        query_start_loc: int32 [S + 1], first query row of each sequence, ascending from any number.
        seq_lens: int32 [S], context length of each sequence's last query row (tokens); 0 for padding.
        block_table: int32 [S, max blocks], physical block of each logical block.
        max_query_rows: No sequence has more query rows; None for unknown. Spares a GPU programs without rows.
    """

    query_start_loc: torch.Tensor
    seq_lens: torch.Tensor
    block_table: torch.Tensor
    max_query_rows: int | None = None


@dataclass(frozen=True)
class LargestBatch:
    """What buffers have to do for.

    Attributes:
        max_sequences: Most sequences of a step.
        max_query_rows: Most query rows of one sequence.
        num_heads: Query heads.
        num_kv_heads: KV heads.
        head_dim: Of K or V, whichever is larger.
        device: Of the tensors.
    """

    max_sequences: int
    max_query_rows: int
    num_heads: int
    num_kv_heads: int
    head_dim: int
    device: torch.device


@dataclass(frozen=True)
class DecodeArguments:
    """What an implementation decodes.

    Attributes:
        query: [R, H, D].
        cache: Of the layer.
        batch: Rows, context lengths and block table.
        thetas: Thresholds of the layer's query heads, or of each row; None for θ = −inf, which keeps every row.
        selection: Selection and compensation.
        scale: Factor of q·k.
        softcap: Logits softcap, 0 for none.
        out: [R, H, Dv] to write into.
        statistics: float64 [slots, 8], accumulators to add to (:class:`Stat`); what counts is their sum over slots.
        reached: int64 [R, H], counters to add to: keys whose score is θ(n) or more, whatever else keeps them. Rows
            that are dense for their length add nothing. Not with thresholds by row.
        sinks: [H] of any floating dtype, a logit of each query head that takes probability as one more key would,
            has no V row and is compensated by nothing; None for none.
    """

    query: torch.Tensor
    cache: PagedCache
    batch: DecodeBatch
    thetas: Thetas | RowThetas | None
    selection: Selection
    scale: float
    softcap: float
    out: torch.Tensor
    statistics: torch.Tensor | None = None
    reached: torch.Tensor | None = None
    sinks: torch.Tensor | None = None

    @property
    def vmean(self) -> bool:
        """Whether the V sums are read."""
        return self.thetas is not None and self.selection.compensation == "vmean"
