"""Scores of chosen query rows of one layer, and attention computed from them chunk by chunk.

Shapes as in :mod:`topt_vllm.attention.common`; here ``n`` is the length of the whole sequence. The queries are
those of its last rows, all n in a whole forward pass; row i of the sequence sees the keys 0..i.
"""

from collections.abc import Callable, Iterator
from dataclasses import dataclass

import torch

# Scores held at once, [H, rows, n]: 16 MiB in fp32. Softmax, masks and selections make a few copies of it.
_CHUNK_ELEMENTS = 1 << 22


# Chooses the V rows that query heads use: from scores and their softmax [H, r, m], the rows' indices in the
# sequence (int64 [r]) and their place among all rows that are attended, it makes bool [H, r, m].
Select = Callable[[torch.Tensor, torch.Tensor, torch.Tensor, slice], torch.Tensor]


@dataclass(frozen=True)
class LayerCall:
    """What one attention layer was called with.

    Attributes:
        layer: Index in the model.
        query: [H, n − first, D].
        key: [Hkv, n, D].
        value: [Hkv, n, Dv].
        scale: Factor of q·k.
        softcap: Logits softcap, 0 for none.
        mask: bool [n, n], true where a row sees a key; None for plain causal attention.
        first: Index in the sequence of the first query row.
        window: Keys that a row sees at most, counted back from its own; 0 for all.
    """

    layer: int
    query: torch.Tensor
    key: torch.Tensor
    value: torch.Tensor
    scale: float
    softcap: float = 0.0
    mask: torch.Tensor | None = None
    first: int = 0
    window: int = 0

    def visible(self, rows: torch.Tensor) -> torch.Tensor:
        """Which keys the rows see: bool [rows, m], m being one more than the last row's index."""
        m = int(rows.max()) + 1
        if self.mask is not None:
            return self.mask[rows, :m]
        keys = torch.arange(m, device=rows.device)
        seen = keys <= rows[:, None]
        return seen & (keys > rows[:, None] - self.window) if self.window else seen

    def scores(self, rows: torch.Tensor) -> torch.Tensor:
        """Scaled, softcapped scores, float32 [H, rows, m], −inf where a row doesn't see a key.

        Args:
            rows: int64 [rows], ascending indices in the sequence of query rows.
        """
        m = int(rows.max()) + 1
        num_kv_heads = self.key.shape[0]
        query = self.query[:, rows - self.first].float().reshape(num_kv_heads, -1, self.query.shape[-1])
        scores = query @ self.key[:, :m].float().transpose(1, 2)
        scores = scores.view(self.query.shape[0], len(rows), m).mul_(self.scale)
        if self.softcap > 0:
            scores.div_(self.softcap).tanh_().mul_(self.softcap)
        return scores.masked_fill_(~self.visible(rows), float("-inf"))

    def chunks(self, rows: torch.Tensor) -> Iterator[slice]:
        """Parts of ``rows`` whose scores fit in memory."""
        step = max(1, _CHUNK_ELEMENTS // (self.query.shape[0] * self.key.shape[1]))
        for start in range(0, len(rows), step):
            yield slice(start, min(start + step, len(rows)))


def top_k(k: int) -> Select:
    """Each query head uses its k keys of the highest score."""

    def select(scores: torch.Tensor, _: torch.Tensor, rows: torch.Tensor, part: slice) -> torch.Tensor:
        if scores.shape[-1] <= k:
            return torch.ones_like(scores, dtype=torch.bool)
        return scores >= scores.topk(k, dim=-1).values[..., -1:]

    return select


def attend(call: LayerCall, select: Select | None) -> torch.Tensor:
    """Attention of every query row, for what torch's fused kernel can't do: softcap, or skipping with V-mean
    compensation.

    Args:
        call: The layer.
        select: Chooses the V rows; None for all.

    Returns:
        [H, n − first, Dv] in the query's dtype.
    """
    num_heads, count, _ = call.query.shape
    num_kv_heads, _, value_dim = call.value.shape
    group = num_heads // num_kv_heads
    out = call.query.new_empty(num_heads, count, value_dim)
    rows = torch.arange(call.first, call.first + count, device=call.query.device)
    means = _running_mean(call.value) if select is not None else None
    for part in call.chunks(rows):
        scores = call.scores(rows[part])
        weights = torch.softmax(scores, dim=-1)
        if select is not None:
            weights.masked_fill_(~select(scores, weights, rows[part], part), 0.0)
        used = weights.view(num_kv_heads, -1, weights.shape[-1])
        result = (used @ call.value[:, : weights.shape[-1]].float()).view(num_heads, -1, value_dim)
        if means is not None:
            dropped = 1.0 - weights.sum(dim=-1, keepdim=True)
            result += dropped * means[:, rows[part]].repeat_interleave(group, dim=0)
        out[:, part] = result.to(out.dtype)
    return out


def _running_mean(value: torch.Tensor) -> torch.Tensor:
    """Mean of V over each row's context, float32 [Hkv, n, Dv]."""
    counts = torch.arange(1, value.shape[1] + 1, device=value.device)
    return value.float().cumsum(dim=1) / counts[:, None]
