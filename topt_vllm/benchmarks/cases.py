"""Decode batches on vLLM's CPU cache layout; synthetic ones, and thresholds that read a chosen share of V rows."""

from dataclasses import dataclass

import torch

from topt_vllm.attention import api
from topt_vllm.attention.common import DecodeBatch, PagedCache, Policy, Thetas


@dataclass(frozen=True)
class Shape:
    """Dimensions of one decode batch, every sequence equally long.

    Attributes:
        batch: Sequences, one query row each.
        seq_len: Context length (tokens).
        heads: Query heads.
        kv_heads: KV heads.
        head_dim: D.
        block_size: Tokens of a block.
        dtype: Of the query, and of the cache unless ``cache`` says more.
        cache: fp8 format of the cache; None for ``dtype``.
    """

    batch: int
    seq_len: int
    heads: int
    kv_heads: int
    head_dim: int
    block_size: int
    dtype: torch.dtype
    cache: torch.dtype | None = None

    @property
    def blocks(self) -> int:
        """Blocks of one sequence."""
        return -(-self.seq_len // self.block_size)


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
    def finished_blocks(self) -> torch.Tensor:
        """Physical numbers of the blocks that are full, int64 [any]."""
        return self.batch.block_table[:, : self.shape.seq_len // self.shape.block_size].flatten().long()

    def gather(self, sequence: int, kv_head: int, dtype: torch.dtype) -> tuple[torch.Tensor, torch.Tensor]:
        """K and V of one KV head of one sequence, [n, D] each."""
        blocks = self.batch.block_table[sequence].long()
        rows = [part[blocks, kv_head].flatten(0, 1) for part in (self.cache.key, self.cache.value)]
        return rows[0][: self.shape.seq_len].to(dtype), rows[1][: self.shape.seq_len].to(dtype)

    def scores(self, dtype: torch.dtype) -> torch.Tensor:
        """Scaled, softcapped scores, computed in ``dtype``, [S, H, n]."""
        shape = self.shape
        group = shape.heads // shape.kv_heads
        sizes = (shape.batch, shape.kv_heads, group, shape.seq_len)
        scores = torch.empty(sizes, dtype=dtype, device=self.query.device)
        for sequence in range(shape.batch):
            for head in range(shape.kv_heads):
                key, _ = self.gather(sequence, head, dtype)
                query = self.query[sequence, head * group : (head + 1) * group].to(dtype)
                torch.matmul(query, key.T, out=scores[sequence, head]).mul_(self.scale)
        if self.softcap:
            scores = self.softcap * torch.tanh(scores / self.softcap)
        return scores.flatten(1, 2)


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
        table: int32 [S, blocks of a sequence].
        scale: Factor of q·k.
        softcap: Logits softcap, 0 for none.
    """
    total, size, dim = memory.shape[0], shape.block_size, shape.head_dim
    key, value = memory.chunk(2, dim=2)
    # The first half holds [D, P]; reading it as [P, D] and transposing gives the logical view.
    key = key.as_strided((total, shape.kv_heads, size, dim), (*memory.stride()[:2], 1, size))
    cache = PagedCache(key, value, torch.zeros(total, shape.kv_heads, dim))
    starts = torch.arange(shape.batch + 1, dtype=torch.int32)
    batch = DecodeBatch(starts, torch.full((shape.batch,), shape.seq_len, dtype=torch.int32), table)
    inputs = Inputs(shape, query, memory, cache, batch, scale, softcap)
    api.finish_blocks(api.load_implementation("reference", "cpu")[1], cache, inputs.finished_blocks)
    return inputs


def make_inputs(shape: Shape, seed: int = 0) -> Inputs:
    """Gaussian queries, keys and values, blocks in random order.

    Independent keys put the survivors anywhere, one to a cache line's neighbourhood: the worst case for gathering.
    Those of real models cluster.
    """
    generator = torch.Generator().manual_seed(seed)
    total, size, dim = shape.batch * shape.blocks, shape.block_size, shape.head_dim
    memory = torch.empty(total, shape.kv_heads, 2 * size, dim, dtype=shape.cache or shape.dtype)
    for block in memory:
        block.copy_(torch.randn(block.shape, generator=generator))
    table = torch.randperm(total, generator=generator).int().view(shape.batch, shape.blocks)
    query = torch.randn(shape.batch, shape.heads, dim, generator=generator).to(shape.dtype)
    return paged_inputs(shape, query, memory, table, dim**-0.5)


def thetas_for(inputs: Inputs, keep: float, policy: Policy) -> Thetas | None:
    """θ per head such that ``keep`` of the V rows are read, the group's union counted; None for all of them."""
    if keep >= 1:
        return None
    shape = inputs.shape
    scores = inputs.scores(torch.float32)
    ordered = scores.transpose(0, 1).flatten(1).sort(dim=1).values
    forced = shape.seq_len % shape.block_size if policy.compensation == "vmean" else policy.recent_tokens

    def at(share: float) -> torch.Tensor:
        # In the widest of some gaps between scores, so that rounding decides nothing.
        rank = min(ordered.shape[1] - 9, max(8, int((1 - share) * ordered.shape[1])))
        window = ordered[:, rank - 8 : rank + 9]
        gap, widest = window.diff(dim=1).max(dim=1, keepdim=True)
        return (window.gather(1, widest) + gap / 2).flatten()

    def read(theta: torch.Tensor) -> float:
        kept = scores >= theta[:, None]
        kept[:, :, shape.seq_len - max(forced, 1) :] = True
        return float(kept.unflatten(1, (shape.kv_heads, -1)).any(dim=2).float().mean())

    low, high = 0.0, keep
    for _ in range(20):
        middle = (low + high) / 2
        low, high = (middle, high) if read(at(middle)) < keep else (low, middle)
    device = inputs.query.device
    lengths = torch.tensor([shape.seq_len], dtype=torch.int32, device=device)
    return Thetas(lengths, at(high)[:, None].contiguous(), torch.zeros(shape.heads, 2, device=device))
