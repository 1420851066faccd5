"""SiftAttention: thresholds that a sequence finds in its own first decoded rows (arXiv 2506.05300).

Idea: the τ-quantile of a head's attention follows a power law along a sequence, y = α·x^β.
Rule: the first WARMUP rows are dense; then a key is kept whose y reaches the law's value, or that is the newest.
``sift`` is the paper's: y is the probability, x the number of the decoded row, and what is dropped is lost.
``sift-context`` is what a server does under ``policy: sift`` (see :mod:`topt_vllm.sift`): y is exp(score), which a
kernel knows while it reads K, x the context length, the slope is shrunk, rows are shared within a group, and the
mean of V stands in for what is dropped.
Parameter: τ.
"""

from dataclasses import dataclass, field
from typing import Any, ClassVar

import torch

from topt_vllm.attention.quantiles import quantile
from topt_vllm.replay.rule import Rows, Rule
from topt_vllm.sift import STIFFNESS, fit

WARMUP = 32


@dataclass
class _Sequence:
    """What a sequence has shown so far: x and y of its warm-up, then the law."""

    first: int
    x: list[float] = field(default_factory=list)
    y: list[torch.Tensor] = field(default_factory=list)
    law: torch.Tensor | None = None


@dataclass(frozen=True)
class Quantile(Rule):
    """Each row's own quantile; what the laws aim at."""

    tau: float

    def keep(self, rows: Rows) -> torch.Tensor:
        parts = []
        for row, n in enumerate(rows.contexts.tolist()):
            scores = rows.scores[:, row]
            parts.append(scores >= quantile(scores, n, self.tau)[:, None])
        return torch.stack(parts, dim=1)


@dataclass(frozen=True)
class Sift(Rule):
    """The paper's rule.

    Attributes:
        tau: Share of the keys that a head skips.
    """

    tau: float

    stiffness: ClassVar[float] = 1e-9  # next to none; rows of one length tell no slope
    in_order: ClassVar[bool] = True

    def prepare(self, key: torch.Tensor) -> Any:
        """The layer's run, once its first row has come."""
        return []

    def on_sample(self) -> Rule:
        return Quantile(self.tau)

    def keep(self, rows: Rows) -> torch.Tensor:
        if not rows.shared:
            rows.shared.append(_Sequence(int(rows.contexts[0])))
        (sequence,) = rows.shared
        levels = self._levels(rows)
        kept = [self._keep_row(sequence, levels[:, row], n) for row, n in enumerate(rows.contexts.tolist())]
        return torch.stack(kept, dim=1)

    def _levels(self, rows: Rows) -> torch.Tensor:
        """ln y, float32 [H, r, m]."""
        return rows.scores - rows.log_denominator()

    def _place(self, sequence: _Sequence, n: int) -> int:
        """x of the row with context n."""
        return n - sequence.first + 1

    def _keep_row(self, sequence: _Sequence, level: torch.Tensor, n: int) -> torch.Tensor:
        """Of one row: float32 [H, m] to bool [H, m]."""
        x = torch.tensor(float(self._place(sequence, n))).log()
        kept = torch.zeros_like(level, dtype=torch.bool)
        if sequence.law is not None:
            kept[:, :n] = level[:, :n] >= (sequence.law[:, 0] + sequence.law[:, 1] * x)[:, None]
            kept[:, n - 1] = True
            return kept
        sequence.x.append(float(x))
        sequence.y.append(quantile(level, n, self.tau))
        if len(sequence.x) == WARMUP:
            sequence.law = fit(
                torch.tensor(sequence.x, device=level.device), torch.stack(sequence.y), self.stiffness
            )
        kept[:, :n] = True
        return kept


@dataclass(frozen=True)
class SiftContext(Sift):
    """On scores, with our union and compensation, fitted in the context length: ``policy: sift``."""

    union: ClassVar[bool] = True
    compensate: ClassVar[bool] = True
    stiffness: ClassVar[float] = STIFFNESS

    def _levels(self, rows: Rows) -> torch.Tensor:
        return rows.scores

    def _place(self, sequence: _Sequence, n: int) -> int:
        return n
