"""Decode batches on vLLM's CPU cache layout; synthetic ones, and thresholds that read a chosen share of V rows."""

from collections.abc import Iterator
from dataclasses import dataclass
from itertools import accumulate, pairwise

import torch

from topt_vllm.attention import api
from topt_vllm.attention.common import (
    DecodeArguments,
    DecodeBatch,
    PagedCache,
    Selection,
    Thetas,
    choose_rows_per_state,
)


@dataclass(frozen=True)
class Shape:
    """Dimensions of one decode batch.

    Attributes:
        lengths: Context length of each sequence (tokens); one query row each.
        heads: Query heads.
        kv_heads: KV heads.
        head_dim: D.
        block_size: Tokens of a block.
        dtype: Of the query, and of the cache unless ``cache`` says more.
        cache: fp8 format of the cache; None for ``dtype``.
    """

    lengths: tuple[int, ...]
    heads: int
    kv_heads: int
    head_dim: int
    block_size: int
    dtype: torch.dtype
    cache: torch.dtype | None = None

    @property
    def batch(self) -> int:
        """Sequences."""
        return len(self.lengths)

    @property
    def longest(self) -> int:
        """Context length of the longest sequence (tokens)."""
        return max(self.lengths)

    @property
    def blocks(self) -> int:
        """Blocks of the longest sequence: the width of the block table."""
        return max(self.sequence_blocks)

    @property
    def sequence_blocks(self) -> tuple[int, ...]:
        """Blocks of each sequence."""
        return tuple(-(-length // self.block_size) for length in self.lengths)

    @property
    def state_rows(self) -> int:
        """T, rows of a running V sum."""
        return choose_rows_per_state(self.block_size)

    @property
    def sums_shape(self) -> tuple[int, int, int, int]:
        """Of the V sums, [B, Hkv, P / T, D]."""
        return self.total_blocks, self.kv_heads, self.block_size // self.state_rows, self.head_dim

    def rows_behind_sums(self, n: int) -> int:
        """Last rows of a context of ``n`` that ``vmean`` keeps, for V sums end before them."""
        return (n - 1) % self.state_rows + 1

    @property
    def total_blocks(self) -> int:
        """Blocks of all sequences."""
        return sum(self.sequence_blocks)

    def block_table(self, order: torch.Tensor) -> torch.Tensor:
        """Gives each sequence its blocks; entries behind them are 0, as vLLM leaves them.

        Args:
            order: int64 [total_blocks], physical blocks.

        Returns:
            int32 [S, blocks].
        """
        table = torch.zeros(self.batch, self.blocks, dtype=torch.int32, device=order.device)
        for row, (start, end) in zip(
            table, pairwise(accumulate(self.sequence_blocks, initial=0)), strict=True
        ):
            row[: end - start] = order[start:end]
        return table

    def decode_batch(self, table: torch.Tensor) -> DecodeBatch:
        """One query row of each sequence, with this block table."""
        starts = torch.arange(self.batch + 1, dtype=torch.int32, device=table.device)
        lengths = torch.tensor(self.lengths, dtype=torch.int32, device=table.device)
        return DecodeBatch(starts, lengths, table, 1)


@dataclass(frozen=True)
class Inputs:
    """A decode call on a scattered cache.

    Attributes:
        shape: Dimensions.
        query: [S, H, D].
        memory: The allocation behind the cache; vLLM's for the CPU is [B, Hkv, 2 P, D], K of a block as [D, P] in
            the first half, V after it.
        cache: Its views.
        batch: Rows and block table.
        scale: Factor of q·k.
        softcap: Logits softcap, 0 for none.
    """

    shape: Shape
    query: torch.Tensor
    memory: torch.Tensor
    cache: PagedCache
    batch: DecodeBatch
    scale: float
    softcap: float = 0.0

    @property
    def written(self) -> DecodeBatch:
        """All rows of the contexts, as a prompt writes them."""
        starts = torch.nn.functional.pad(self.batch.seq_lens.cumsum(0, dtype=torch.int32), (1, 0))
        return DecodeBatch(starts, self.batch.seq_lens, self.batch.block_table)

    def arguments(
        self,
        thetas: Thetas | None,
        selection: Selection,
        out: torch.Tensor,
        statistics: torch.Tensor | None = None,
    ) -> DecodeArguments:
        """Of an implementation's ``decode``."""
        given = (self.query, self.cache, self.batch, thetas, selection)
        return DecodeArguments(*given, self.scale, self.softcap, out, statistics)

    def groups(self) -> Iterator[tuple[int, int, int, slice]]:
        """Each KV head of each sequence: the sequence, its length, the KV head, and the query heads of it."""
        group = self.shape.heads // self.shape.kv_heads
        for sequence, n in enumerate(self.shape.lengths):
            for head in range(self.shape.kv_heads):
                yield sequence, n, head, slice(head * group, (head + 1) * group)

    def gather(self, sequence: int, kv_head: int, dtype: torch.dtype) -> tuple[torch.Tensor, torch.Tensor]:
        """K and V of one KV head of one sequence, [n, D] each."""
        n = self.shape.lengths[sequence]
        blocks = self.batch.block_table[sequence, : self.shape.sequence_blocks[sequence]].long()
        key, value = (part[blocks, kv_head].flatten(0, 1) for part in (self.cache.key, self.cache.value))
        return key[:n].to(dtype), value[:n].to(dtype)

    def scores(self, dtype: torch.dtype) -> list[torch.Tensor]:
        """Scaled, softcapped scores of each sequence, computed in ``dtype``, [H, n]."""
        found = [
            torch.empty(self.shape.heads, n, dtype=dtype, device=self.query.device)
            for n in self.shape.lengths
        ]
        for sequence, _, head, heads in self.groups():
            key, _ = self.gather(sequence, head, dtype)
            query = self.query[sequence, heads].to(dtype)
            torch.matmul(query, key.T, out=found[sequence][heads]).mul_(self.scale)
        if self.softcap:
            found = [self.softcap * torch.tanh(scores / self.softcap) for scores in found]
        return found


def paged_inputs(
    shape: Shape,
    query: torch.Tensor,
    memory: torch.Tensor,
    table: torch.Tensor,
    scale: float,
    softcap: float = 0.0,
) -> Inputs:
    """The views of an allocation, and its V sums.

    Args:
        shape: Dimensions.
        query: [S, H, D].
        memory: [B, Hkv, 2 P, D].
        table: int32 [S, blocks of the longest sequence].
        scale: Factor of q·k.
        softcap: Logits softcap, 0 for none.
    """
    total, size, dim = memory.shape[0], shape.block_size, shape.head_dim
    key, value = memory.chunk(2, dim=2)
    # The first half holds [D, P]; reading it as [P, D] and transposing gives the logical view.
    key = key.as_strided((total, shape.kv_heads, size, dim), (*memory.stride()[:2], 1, size))
    cache = PagedCache(key, value, torch.zeros(shape.sums_shape))
    inputs = Inputs(shape, query, memory, cache, shape.decode_batch(table), scale, softcap)
    api.load_implementation("reference", "cpu")[1].finish(cache, inputs.written)
    return inputs


@dataclass(frozen=True)
class SharedRows:
    """A batch whose sequences all have the same K and V, before they are laid out as some cache has them.

    Attributes:
        shape: Dimensions.
        query: [S, H, D].
        key: [blocks of a sequence, Hkv, P, D].
        value: As ``key``.
        table: int32 [S, blocks].
        scale: Factor of q·k.
        softcap: Logits softcap, 0 for none.
    """

    shape: Shape
    query: torch.Tensor
    key: torch.Tensor
    value: torch.Tensor
    table: torch.Tensor
    scale: float
    softcap: float

    def scattered(self, blocks: torch.Tensor) -> torch.Tensor:
        """A cache's memory [B, …] from what it has of one sequence's blocks, [blocks, …]."""
        memory = blocks.new_empty(self.shape.total_blocks, *blocks.shape[1:])
        memory[self.table.long()] = blocks.expand(self.shape.batch, *blocks.shape)
        return memory


def placed_inputs(rows: SharedRows) -> Inputs:
    """The batch on the layout of vLLM's CPU cache."""
    keys = rows.key.transpose(2, 3).reshape(rows.value.shape)
    memory = rows.scattered(torch.cat([keys, rows.value], dim=2))
    return paged_inputs(rows.shape, rows.query, memory, rows.table, rows.scale, rows.softcap)


def make_inputs(shape: Shape) -> Inputs:
    """Gaussian queries, keys and values, blocks in random order.

    Independent keys put the survivors anywhere, one to a cache line's neighbourhood: the worst case for gathering.
    Those of real models cluster.
    """
    generator = torch.Generator().manual_seed(0)
    total, size, dim = shape.total_blocks, shape.block_size, shape.head_dim
    memory = torch.empty(total, shape.kv_heads, 2 * size, dim, dtype=shape.cache or shape.dtype)
    for block in memory:
        block.copy_(torch.randn(block.shape, generator=generator))
    table = shape.block_table(torch.randperm(total, generator=generator))
    query = torch.randn(shape.batch, shape.heads, dim, generator=generator).to(shape.dtype)
    return paged_inputs(shape, query, memory, table, dim**-0.5)


def thetas_for(inputs: Inputs, keep: float, selection: Selection) -> Thetas | None:
    """θ per head such that ``keep`` of the V rows are read at each context length; None for all of them.

    Raises:
        ValueError: A context is too short to choose among its scores.
    """
    if keep >= 1:
        return None
    shape, scores = inputs.shape, inputs.scores(torch.float32)
    lengths = sorted(set(shape.lengths))
    columns = []
    for n in lengths:
        alike = [scores[sequence] for sequence, length in enumerate(shape.lengths) if length == n]
        forced = shape.rows_behind_sums(n) if selection.compensation == "vmean" else selection.recent_tokens
        columns.append(union_theta(torch.stack(alike), shape.kv_heads, keep, forced))
    device = inputs.query.device
    return Thetas(
        torch.tensor(lengths, dtype=torch.int32, device=device),
        torch.stack(columns, dim=1),
        torch.zeros(shape.heads, 2, device=device),
    )


# Scores on either side of a rank, of whose gaps the widest is taken.
_AROUND = 8


def union_theta(scores: torch.Tensor, kv_heads: int, keep: float, forced: int) -> torch.Tensor:
    """θ per head such that ``keep`` of the V rows are read, the group's union counted.

    Args:
        scores: float32 [R, H, n], of rows of one context length.
        kv_heads: KV heads.
        keep: Share of the V rows.
        forced: Last tokens that are read whatever their score.

    Returns:
        float32 [H].

    Raises:
        ValueError: There are too few scores to choose among.
    """
    n = scores.shape[2]
    ordered = scores.transpose(0, 1).flatten(1).sort(dim=1).values
    if ordered.shape[1] <= 2 * _AROUND:
        raise ValueError(
            f"{scores.shape[0]} sequences of {n} tokens have too few scores to find thresholds that read {keep:g} "
            f"of the V rows; use contexts of at least {2 * _AROUND + 1} tokens, or keep 1.0"
        )

    def at(share: float) -> torch.Tensor:
        # In the widest of some gaps between scores, so that rounding decides nothing.
        rank = min(ordered.shape[1] - _AROUND - 1, max(_AROUND, int((1 - share) * ordered.shape[1])))
        window = ordered[:, rank - _AROUND : rank + _AROUND + 1]
        gap, widest = window.diff(dim=1).max(dim=1, keepdim=True)
        return (window.gather(1, widest) + gap / 2).flatten()

    def read(theta: torch.Tensor) -> float:
        kept = scores >= theta[:, None]
        kept[:, :, n - forced :] = True
        return float(kept.unflatten(1, (kv_heads, -1)).any(dim=2).float().mean())

    low, high = 0.0, keep
    for _ in range(20):
        middle = (low + high) / 2
        low, high = (middle, high) if read(at(middle)) < keep else (low, middle)
    return at(high)
