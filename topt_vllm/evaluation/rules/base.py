"""What a rule sees and answers, and attention under it.

Shapes as in :mod:`topt_vllm.attention.common`; ``r`` query rows of one sequence, ``m`` the longest context of them.
"""

from abc import ABC, abstractmethod
from dataclasses import dataclass
from typing import ClassVar

import torch


@dataclass(frozen=True)
class Rows:
    """Some query rows of one layer.

    Attributes:
        layer: Index in the model.
        scores: float32 [H, r, m], scaled and softcapped; −inf at keys that a row doesn't see.
        contexts: int64 [r], context length of each row: it sees the keys before this index.
        query: float32 [H, r, D].
        key: float32 [Hkv, m, D].
    """

    layer: int
    scores: torch.Tensor
    contexts: torch.Tensor
    query: torch.Tensor
    key: torch.Tensor

    def by_group(self, tensor: torch.Tensor) -> torch.Tensor:
        """A view [Hkv, heads of a group, …] of a tensor [H, …]."""
        return tensor.unflatten(0, (self.key.shape[0], -1))


class Rule(ABC):
    """Which V rows each query head keeps, and what the softmax then is.

    Attributes:
        union: Each head uses every row that some head of its group keeps.
        renormalise: The softmax runs over the used keys only, not over all.
        compensate: The dropped probability times the mean of V is added.
    """

    union: ClassVar[bool] = False
    renormalise: ClassVar[bool] = False
    compensate: ClassVar[bool] = False

    @abstractmethod
    def keep(self, rows: Rows) -> torch.Tensor:
        """What each head keeps by its own rule: bool [H, r, m], false at keys that a row doesn't see."""


@dataclass(frozen=True)
class Outcome:
    """Attention of some rows under a rule.

    Attributes:
        out: float32 [H, r, Dv].
        kept: (query head, key) pairs that the heads' own rule keeps.
        read: (KV head, key) pairs whose V row is read: some head of the group keeps it.
        dropped: Probability not multiplied with V, summed over heads and rows.
    """

    out: torch.Tensor
    kept: int
    read: int
    dropped: float


def attend(rule: Rule, rows: Rows, value: torch.Tensor, means: torch.Tensor) -> Outcome:
    """Attention of the rows under the rule.

    Args:
        rule: Chooses what is kept.
        rows: The query rows.
        value: [Hkv, m, Dv].
        means: float32 [Hkv, r, Dv], the mean of V over each row's context.
    """
    kept = rows.by_group(rule.keep(rows))
    read = kept.any(dim=1)
    used = read[:, None] if rule.union else kept
    weights = rows.by_group(torch.softmax(rows.scores, dim=-1)).mul_(used)
    mass = weights.sum(dim=-1, keepdim=True)
    if rule.renormalise:
        weights /= mass
    out = (weights.flatten(1, 2) @ value.float()).unflatten(1, weights.shape[1:3])
    dropped = 1.0 - mass
    if rule.compensate:
        out += dropped * means[:, None]
    return Outcome(out.flatten(0, 1), int(kept.sum()), int(read.sum()), float(dropped.sum()))
