"""Synthetic decode batches with a chosen share of V rows, and the float64 oracle that gates every timing."""

from dataclasses import dataclass, replace

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
        dtype: Of query and cache.
    """

    batch: int
    seq_len: int
    heads: int
    kv_heads: int
    head_dim: int
    block_size: int
    dtype: torch.dtype

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
        memory: [B, Hkv, 2 P, D], vLLM's allocation: K of a block as [D, P] in the first half, V after it.
        cache: Its views.
        batch: Rows and block table.
        scores: float32 [S, H, n], scaled.
    """

    shape: Shape
    query: torch.Tensor
    memory: torch.Tensor
    cache: PagedCache
    batch: DecodeBatch
    scores: torch.Tensor

    @property
    def scale(self) -> float:
        """Factor of q·k."""
        return self.shape.head_dim**-0.5


def make_inputs(shape: Shape, seed: int = 0) -> Inputs:
    """Gaussian queries, keys and values, blocks in random order.

    Independent keys put the survivors anywhere, one to a cache line's neighbourhood: the worst case for gathering.
    Those of real models cluster.
    """
    generator = torch.Generator().manual_seed(seed)
    total, size, dim = shape.batch * shape.blocks, shape.block_size, shape.head_dim
    memory = torch.empty(total, shape.kv_heads, 2 * size, dim, dtype=shape.dtype)
    for block in memory:
        block.copy_(torch.randn(block.shape, generator=generator))
    table = torch.randperm(total, generator=generator).int().view(shape.batch, shape.blocks)
    key, value = memory.chunk(2, dim=2)
    # The first half holds [D, P]; reading it as [P, D] and transposing gives the logical view.
    key = (
        key.unflatten(2, (1, size))
        .squeeze(2)
        .as_strided((total, shape.kv_heads, size, dim), (*memory.stride()[:2], 1, size))
    )
    cache = PagedCache(key, value, torch.zeros(total, shape.kv_heads, dim))
    finished = table[:, : shape.seq_len // size].flatten().long()
    api.finish_blocks(api.load_implementation("reference", "cpu")[1], cache, finished)
    query = torch.randn(shape.batch, shape.heads, dim, generator=generator).to(shape.dtype)
    starts = torch.arange(shape.batch + 1, dtype=torch.int32)
    batch = DecodeBatch(starts, torch.full((shape.batch,), shape.seq_len, dtype=torch.int32), table)
    inputs = Inputs(shape, query, memory, cache, batch, torch.empty(0))
    return replace(inputs, scores=_scores(inputs))


def _gather(inputs: Inputs, sequence: int, kv_head: int) -> tuple[torch.Tensor, torch.Tensor]:
    """K and V of one KV head of one sequence, float32 [n, D] each."""
    blocks = inputs.batch.block_table[sequence].long()
    pick = [part[blocks, kv_head].flatten(0, 1) for part in (inputs.cache.key, inputs.cache.value)]
    return pick[0][: inputs.shape.seq_len].float(), pick[1][: inputs.shape.seq_len].float()


def _scores(inputs: Inputs) -> torch.Tensor:
    shape = inputs.shape
    group = shape.heads // shape.kv_heads
    scores = torch.empty(shape.batch, shape.kv_heads, group, shape.seq_len)
    for sequence in range(shape.batch):
        for head in range(shape.kv_heads):
            key, _ = _gather(inputs, sequence, head)
            query = inputs.query[sequence, head * group : (head + 1) * group].float()
            torch.matmul(query * inputs.scale, key.T, out=scores[sequence, head])
    return scores.flatten(1, 2)


def thetas_for(inputs: Inputs, keep: float, policy: Policy) -> Thetas | None:
    """θ per head such that ``keep`` of the V rows are read, the group's union counted; None for all of them."""
    if keep >= 1:
        return None
    shape = inputs.shape
    ordered = inputs.scores.transpose(0, 1).flatten(1).sort(dim=1).values
    forced = shape.seq_len % shape.block_size if policy.compensation == "vmean" else policy.recent_tokens

    def at(share: float) -> torch.Tensor:
        # In the widest of some gaps between scores, so that rounding decides nothing.
        rank = min(ordered.shape[1] - 9, max(8, int((1 - share) * ordered.shape[1])))
        window = ordered[:, rank - 8 : rank + 9]
        gap, widest = window.diff(dim=1).max(dim=1, keepdim=True)
        return (window.gather(1, widest) + gap / 2).flatten()

    def read(theta: torch.Tensor) -> float:
        kept = inputs.scores >= theta[:, None]
        kept[:, :, shape.seq_len - max(forced, 1) :] = True
        return float(kept.unflatten(1, (shape.kv_heads, -1)).any(dim=2).float().mean())

    low, high = 0.0, keep
    for _ in range(20):
        middle = (low + high) / 2
        low, high = (middle, high) if read(at(middle)) < keep else (low, middle)
    lengths = torch.tensor([shape.seq_len], dtype=torch.int32)
    return Thetas(lengths, at(high)[:, None].contiguous(), torch.zeros(shape.heads, 2))


def oracle(inputs: Inputs, thetas: Thetas | None, policy: Policy, dtype: torch.dtype) -> torch.Tensor:
    """The operator with every operation in ``dtype``, [S, H, D]: float64 is the truth, the cache's own dtype what
    eager attention makes of it."""
    shape = inputs.shape
    group, n = shape.heads // shape.kv_heads, shape.seq_len
    out = torch.empty(inputs.query.shape, dtype=dtype)
    for sequence in range(shape.batch):
        for head in range(shape.kv_heads):
            heads = slice(head * group, (head + 1) * group)
            key, value = (part.to(dtype) for part in _gather(inputs, sequence, head))
            probabilities = (inputs.query[sequence, heads].to(dtype) @ key.T * inputs.scale).softmax(dim=-1)
            used = torch.ones(n, dtype=torch.bool)
            if thetas is not None:
                used = (inputs.scores[sequence, heads] >= thetas.at(n)[heads, None]).any(dim=0)
                used[n - policy.recent_tokens :] = True
                if policy.compensation == "vmean":
                    used[n // shape.block_size * shape.block_size :] = True
            result = probabilities[:, used] @ value[used]
            if policy.compensation == "vmean":
                result += probabilities[:, ~used].sum(dim=1, keepdim=True) * value.mean(dim=0)
            out[sequence, heads] = result
    return out
