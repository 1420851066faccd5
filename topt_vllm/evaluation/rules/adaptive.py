"""Top-Theta whose thresholds follow the traffic, as a server's do under ``adapt: true``.

Idea: an offset per query head moves θ until the head keeps as many keys as its budget promises.
Rule: Top-Theta's at θ(n) + d; rows come in steps of a few, and d changes between steps (see ``adaptation.py``).
Compensation: Top-Theta's.
Parameter: none; it starts from a budget of the table, anew in each sequence.
"""

from collections.abc import Mapping
from dataclasses import dataclass, replace
from typing import Any, ClassVar

import torch

from topt_vllm.adaptation import ThetaController
from topt_vllm.replay.rule import Rows
from topt_vllm.replay.top_theta import TopTheta

# Rows of a step: a server that decodes so many requests together.
STEP_ROWS = 8


@dataclass(frozen=True)
class TopThetaAdapt(TopTheta):
    """Top-Theta with the server's controller.

    Attributes:
        keys: Keys that each query head should keep, by layer.
    """

    keys: Mapping[int, list[int]]

    in_order: ClassVar[bool] = True

    def prepare(self, key: torch.Tensor) -> Any:
        """The controller of the layer's run, once its first rows have come."""
        return []

    def keep(self, rows: Rows) -> torch.Tensor:
        if not rows.shared:
            thetas = self.thetas[rows.layer].to(rows.scores.device)
            rows.shared.append(ThetaController(thetas, self.keys[rows.layer], int(thetas.lengths[0]) - 1))
        (controller,) = rows.shared
        parts = []
        for first in range(0, len(rows.contexts), STEP_ROWS):
            part = slice(first, first + STEP_ROWS)
            step = replace(rows, scores=rows.scores[:, part], contexts=rows.contexts[part])
            theta = controller.thetas.at_each(step.contexts)[..., None]
            reached = (step.scores >= theta) & (theta > -torch.inf)
            parts.append(TopTheta({rows.layer: controller.thetas}).keep(step))
            controller.count(reached.sum(dim=2).T, step.contexts)
        return torch.cat(parts, dim=1)
