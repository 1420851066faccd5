"""Top-Theta as a rule: keys whose score reaches a calibrated threshold (arXiv 2502.08363).

It is the operator's with its default policy: group union, one recent token, no sinks, no minimum length. The
unfinished block that the server keeps dense is left out, for its size is the server's.
"""

from collections.abc import Mapping
from dataclasses import dataclass
from typing import ClassVar

import torch

from topt_vllm.attention.common import Thetas
from topt_vllm.replay.rule import Rows, Rule, visible
from topt_vllm.replay.scores import reaching


@dataclass(frozen=True)
class TopTheta(Rule):
    """Keys that reach θ; the mean of V stands in for what is dropped.

    Attributes:
        thetas: Thresholds by layer index; a layer without any keeps everything.
    """

    thetas: Mapping[int, Thetas]

    union: ClassVar[bool] = True
    compensate: ClassVar[bool] = True

    def theta(self, rows: Rows) -> torch.Tensor:
        """θ of the rows, float32 [H, r]."""
        return self.thetas[rows.layer].to(rows.scores.device).at_each(rows.contexts)

    def keep(self, rows: Rows) -> torch.Tensor:
        if rows.layer not in self.thetas:
            return visible(rows).expand(rows.scores.shape)
        # Finite: a key that isn't seen scores −inf and must not reach a θ of −inf.
        kept = reaching(rows.scores, self.theta(rows).clamp(min=torch.finfo(rows.scores.dtype).min))
        kept[:, torch.arange(len(rows.contexts), device=kept.device), rows.contexts - 1] = True
        return kept
