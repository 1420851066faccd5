"""What a rule sees and answers, and attention under it.

Shapes as in :mod:`topt_vllm.attention.common`; ``r`` query rows of one sequence, ``m`` the longest context of them.
"""

from abc import ABC, abstractmethod
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, ClassVar

import torch

from topt_vllm.replay.scores import (
    LayerCall,
    any_of_group,
    in_threads,
    ones_and_zeros,
    probabilities,
    true_per_row,
)


@dataclass(frozen=True)
class Rows:
    """Some query rows of one layer.

    Attributes:
        layer: Index in the model.
        scores: float32 [H, r, m], scaled and softcapped; −inf at keys that a row doesn't see.
        contexts: int64 [r], context length of each row: it sees the keys before this index.
        query: float32 [H, r, D].
        num_kv_heads: Hkv.
        shared: What :meth:`Rule.prepare` made of the layer's keys.
        scale: Factor of q·k.
        softcap: Logits softcap, 0 for none.
        candidates: bool [Hkv, r, m], keys that a K screen lets through; None where there is none.
        sinks: [H], scores of the heads' attention sinks; None without.
    """

    layer: int
    scores: torch.Tensor
    contexts: torch.Tensor
    query: torch.Tensor
    num_kv_heads: int
    shared: Any = None
    scale: float = 1.0
    softcap: float = 0.0
    candidates: torch.Tensor | None = None
    sinks: torch.Tensor | None = None

    @property
    def pairs(self) -> int:
        """(KV head, key) pairs in context."""
        return self.num_kv_heads * int(self.contexts.sum())

    def log_denominator(self) -> torch.Tensor:
        """Of the softmax, sinks included: float32 [H, r, 1]."""
        keys = self.scores.logsumexp(dim=-1, keepdim=True)
        return keys if self.sinks is None else torch.logaddexp(keys, self.sinks.float()[:, None, None])

    def by_group(self, tensor: torch.Tensor) -> torch.Tensor:
        """A view [Hkv, heads of a group, …] of a tensor [H, …]."""
        return tensor.unflatten(0, (self.num_kv_heads, -1))


class Rule(ABC):
    """Which V rows each query head keeps, and what the softmax then is.

    Attributes:
        union: Each head uses every row that some head of its group keeps.
        renormalise: The softmax runs over the used keys only, and the head's sink, not over all.
        compensate: The dropped probability times the mean of V is added.
        in_order: What a row keeps depends on the rows before it, which have to come first.
    """

    union: ClassVar[bool] = False
    renormalise: ClassVar[bool] = False
    compensate: ClassVar[bool] = False
    in_order: ClassVar[bool] = False

    def prepare(self, key: torch.Tensor) -> Any:
        """What the rule knows of all keys of a layer, [Hkv, n, D], whatever the row; None for nothing."""
        return None

    def see(self, rows: Rows) -> Rows:
        """The rows with scores as the rule can know them, which the softmax takes too; exact ones by default."""
        return rows

    def k_rows_read(self, rows: Rows) -> float:
        """What is read of K, in rows of it, for (KV head, key) pairs that the rows, as it saw them, have."""
        return float(rows.pairs)

    def on_sample(self) -> "Rule":
        """The rule that reads as much of rows out of order; tuning samples such rows."""
        return self

    @abstractmethod
    def keep(self, rows: Rows) -> torch.Tensor:
        """What each head keeps by its own rule: bool [H, r, m], false at keys that a row doesn't see."""


@dataclass(frozen=True)
class Outcome:
    """Attention of some rows under a rule.

    Attributes:
        out: float32 [H, r, Dv].
        kept: int32 [H, r], keys that the head's own rule keeps.
        read: (KV head, key) pairs whose V row is read: some head of the group keeps it.
        dropped: Probability of keys that isn't multiplied with V, summed over heads and rows.
        candidates: (KV head, key) pairs that a K screen lets through; all of them without one.
        k_rows: K that is read, in rows of it.
    """

    out: torch.Tensor
    kept: torch.Tensor
    read: int
    dropped: float
    candidates: int
    k_rows: float


def attend(
    call: LayerCall, rule: Rule | None, count: Callable[[Rows, Outcome], None] = lambda *_: None
) -> torch.Tensor:
    """Attention of every query row of a call, for what torch's fused kernel can't do: skipping, softcap, sinks.

    Args:
        call: The layer.
        rule: Chooses the V rows; None for all.
        count: Gets the rows part by part, in the order of the sequence only if the rule asks for it, and from
            several threads.

    Returns:
        [H, n − first, Dv] in the query's dtype.
    """
    out = call.query.new_empty(*call.query.shape[:2], call.value.shape[2])
    queries = torch.arange(call.first, call.key.shape[1], device=call.query.device)
    shared = rule.prepare(call.key) if rule is not None else None

    def compute(part: slice) -> None:
        rows = rows_of(call, queries[part], shared)
        value = call.values[:, : rows.scores.shape[-1]]
        if rule is None:
            weights = rows.by_group(probabilities(rows.scores, rows.sinks))
            found = _weighted(weights, value).flatten(0, 1)
        else:
            outcome = attend_rows(rule, rows, value, call.means[:, part])
            count(rows, outcome)
            found = outcome.out
        out[:, part] = found.to(out.dtype)

    if rule is not None and rule.in_order:
        for part in call.chunks(queries):
            compute(part)
    else:
        _ = call.keys, call.values, call.means  # made before the threads need them
        in_threads(compute, list(call.chunks(queries)), call.query.device)
    return out


def rows_of(call: LayerCall, rows: torch.Tensor, shared: object) -> Rows:
    """Some query rows of a call: int64 [r], ascending indices in the sequence.

    Args:
        call: The layer.
        rows: The rows.
        shared: What the rule has prepared for the layer's keys.
    """
    query = call.query[:, rows - call.first].float()
    heads = call.key.shape[0]
    return Rows(
        call.layer,
        call.scores(rows),
        rows + 1,
        query,
        heads,
        shared,
        call.scale,
        call.softcap,
        sinks=call.sinks,
    )


def visible(rows: Rows) -> torch.Tensor:
    """Keys in a row's context, bool [r, m]."""
    return torch.arange(rows.scores.shape[-1], device=rows.scores.device) < rows.contexts[:, None]


def attend_rows(rule: Rule, rows: Rows, value: torch.Tensor, means: torch.Tensor) -> Outcome:
    """Attention of the rows under the rule.

    Args:
        rule: Chooses what is kept.
        rows: The query rows.
        value: float32 [Hkv, m, Dv].
        means: float32 [Hkv, r, Dv], the mean of V over each row's context.
    """
    rows = rule.see(rows)
    kept = rule.keep(rows)
    grouped = rows.by_group(kept)
    read = any_of_group(grouped)
    used = read[:, None] if rule.union else grouped
    weights = rows.by_group(probabilities(rows.scores, rows.sinks))
    seen = 1.0 if rows.sinks is None else weights.sum(dim=-1, keepdim=True)
    weights.mul_(ones_and_zeros(used))
    mass = weights.sum(dim=-1, keepdim=True)
    if rule.renormalise:
        weights /= mass + (1.0 - seen)
    out = _weighted(weights, value)
    dropped = seen - mass
    if rule.compensate:
        out += dropped * means[:, None]
    return Outcome(
        out=out.flatten(0, 1),
        kept=true_per_row(kept),
        read=int(true_per_row(read).sum()),
        dropped=float(dropped.sum()),
        candidates=rows.pairs if rows.candidates is None else int(true_per_row(rows.candidates).sum()),
        k_rows=rule.k_rows_read(rows),
    )


def _weighted(weights: torch.Tensor, value: torch.Tensor) -> torch.Tensor:
    """Sums of V rows, float32 [Hkv, heads of a group, r, Dv]."""
    return torch.bmm(weights.flatten(1, 2), value).unflatten(1, weights.shape[1:3])
