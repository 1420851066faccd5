"""Scores of chosen query rows of one layer, chunk by chunk.

Shapes as in :mod:`topt_vllm.attention.common`; here ``n`` is the length of the whole sequence. The queries are
those of its last rows, all n in a whole forward pass; row i of the sequence sees the keys 0..i.
"""

from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from functools import cached_property
from typing import TypeVar

import numpy as np
import torch

Item = TypeVar("Item")
Result = TypeVar("Result")

# Scores held at once, [H, rows, n]: 4 MiB in fp32, so that what is made of them stays in a CPU's cache.
_CHUNK_ELEMENTS = 1 << 20


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
        first: Index in the sequence of the first query row.
        window: Keys that a row sees at most, counted back from its own; 0 for all.
        sinks: [H], the score of each head's attention sink, which takes probability and has no value; None without.
    """

    layer: int
    query: torch.Tensor
    key: torch.Tensor
    value: torch.Tensor
    scale: float
    softcap: float = 0.0
    first: int = 0
    window: int = 0
    sinks: torch.Tensor | None = None

    @property
    def plain(self) -> bool:
        """Whether torch's own attention can compute it, which knows no softcaps and no sinks."""
        return not self.softcap and self.sinks is None

    def visible(self, rows: torch.Tensor, start: int = 0) -> torch.Tensor:
        """Which keys from ``start`` on the rows see: bool [rows, m − start], m behind the last row's."""
        m = int(rows.max()) + 1
        keys = torch.arange(start, m, device=rows.device)
        seen = keys <= rows[:, None]
        return seen & (keys > rows[:, None] - self.window) if self.window else seen

    def scores(self, rows: torch.Tensor) -> torch.Tensor:
        """Scaled, softcapped scores, float32 [H, rows, m], −inf where a row doesn't see a key.

        Args:
            rows: int64 [rows], ascending indices in the sequence of query rows.
        """
        m = int(rows[-1]) + 1
        query = self.query[:, rows - self.first].float().mul_(self.scale)
        grouped = query.view(self.key.shape[0], -1, self.query.shape[-1])
        scores = torch.bmm(grouped, self.keys[:, :, :m]).view(self.query.shape[0], len(rows), m)
        if self.softcap > 0:
            scores.div_(self.softcap).tanh_().mul_(self.softcap)
        # Before the first row's own key, only masks and windows hide anything.
        start = 0 if self.window else int(rows[0])
        scores[..., start:].masked_fill_(~self.visible(rows, start), float("-inf"))
        return scores

    @cached_property
    def keys(self) -> torch.Tensor:
        """float32 [Hkv, D, n]; contiguous for many queries, whose product reads it fastest so."""
        keys = self.key.transpose(1, 2).float()
        return keys if self.query.shape[1] == 1 else keys.contiguous()

    @cached_property
    def values(self) -> torch.Tensor:
        """float32 [Hkv, n, Dv]."""
        return self.value.float()

    @cached_property
    def means(self) -> torch.Tensor:
        """Mean of V over each query row's context, float32 [Hkv, n − first, Dv]."""
        before = self.values[:, : self.first].sum(dim=1, keepdim=True)
        counts = torch.arange(self.first + 1, self.value.shape[1] + 1, device=self.value.device)
        return (before + self.values[:, self.first :].cumsum(dim=1)) / counts[:, None]

    def chunks(self, rows: torch.Tensor) -> Iterator[slice]:
        """Parts of ``rows`` whose scores fit in memory."""
        step = max(1, _CHUNK_ELEMENTS // (self.query.shape[0] * self.key.shape[1]))
        for start in range(0, len(rows), step):
            yield slice(start, min(start + step, len(rows)))


def probabilities(scores: torch.Tensor, sinks: torch.Tensor | None) -> torch.Tensor:
    """Of the keys, float32 [H, r, m]; beside a sink they sum to less than 1.

    Args:
        scores: float32 [H, r, m].
        sinks: [H], scores of the heads' attention sinks; None without.
    """
    weights = torch.softmax(scores, dim=-1)
    if sinks is None:
        return weights
    keys = scores.logsumexp(dim=-1, keepdim=True)
    return weights.mul_(torch.sigmoid(keys - sinks.float()[:, None, None]))


def in_threads(
    compute: Callable[[Item], Result], items: Sequence[Item], device: torch.device
) -> list[Result]:
    """``compute`` of each item, in order; on CPUs in a thread per core, each of which computes alone.

    Operations on a chunk of scores are so short that cores which share one mostly wait for each other where other
    programs run too.
    """
    threads = torch.get_num_threads()
    if device.type != "cpu" or threads == 1 or len(items) == 1:
        return [compute(item) for item in items]
    inference = torch.is_inference_mode_enabled()

    def run(item: Item) -> Result:
        with torch.inference_mode(inference):
            return compute(item)

    try:
        with ThreadPoolExecutor(threads, initializer=torch.set_num_threads, initargs=(1,)) as pool:
            return list(pool.map(run, items))
    finally:
        torch.set_num_threads(threads)


def percentiles(values: torch.Tensor) -> tuple[float, float, float]:
    """p5, p50 and p95 of any number of values."""
    # quantile() refuses more than 16M numbers; sorting doesn't.
    ordered = values.double().sort().values
    p5, p50, p95 = (ordered[round(p * (len(ordered) - 1))].item() for p in (0.05, 0.5, 0.95))
    return p5, p50, p95


def any_of_group(kept: torch.Tensor) -> torch.Tensor:
    """Keys that some head of a group keeps: bool [Hkv, heads of a group, r, m] to [Hkv, r, m]."""
    # Several times as fast as any(dim=1) on CPUs.
    read = kept[:, 0]
    for head in range(1, kept.shape[1]):
        read = read | kept[:, head]
    return read


def reaching(scores: torch.Tensor, theta: torch.Tensor) -> torch.Tensor:
    """Scores [..., m] of at least θ [...], bool."""
    if scores.device.type != "cpu":
        return scores >= theta[..., None]
    # numpy compares with a number for each row three times as fast as torch.
    return torch.from_numpy(np.greater_equal(scores.numpy(), theta[..., None].numpy()))


def true_per_row(kept: torch.Tensor) -> torch.Tensor:
    """How many of the last dimension are true, int32."""
    if kept.device.type != "cpu":
        return kept.sum(dim=-1, dtype=torch.int32)
    # numpy counts a row three times as fast as torch sums it.
    counts = [np.count_nonzero(row) for row in kept.reshape(-1, kept.shape[-1]).numpy()]
    return torch.tensor(counts, dtype=torch.int32).view(kept.shape[:-1])


def ones_and_zeros(mask: torch.Tensor) -> torch.Tensor:
    """float32 of bool."""
    # On CPUs torch converts bytes three times as fast as booleans, which products with booleans do first.
    return mask.view(torch.uint8).float()
