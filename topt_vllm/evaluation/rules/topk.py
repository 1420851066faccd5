"""Exact top-k: the bound that approximations are measured against.

Rule: each query head keeps its k keys of the highest score; ties keep more. The softmax runs over them only.
Parameter: k.
Source: the definition; as in "Memory-efficient Transformers via Top-k Attention" (arXiv 2106.06899).
"""

from dataclasses import dataclass
from typing import ClassVar

import torch

from topt_vllm.replay.rule import Rows, Rule


@dataclass(frozen=True)
class TopK(Rule):
    """The k best keys of each query head.

    Attributes:
        k: Keys.
    """

    k: int

    renormalise: ClassVar[bool] = True

    def keep(self, rows: Rows) -> torch.Tensor:
        seen = rows.scores > -torch.inf
        if rows.scores.shape[-1] <= self.k:
            return seen
        cut = rows.scores.topk(self.k, dim=-1, sorted=False).values.amin(dim=-1, keepdim=True)
        return (rows.scores >= cut).logical_and_(seen)
