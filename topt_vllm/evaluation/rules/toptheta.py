"""Top-Theta: keys whose score reaches a calibrated threshold (arXiv 2502.08363).

Idea: θ is static per layer, query head and context length, so a key is judged by its own score alone.
Rule: s_j ≥ θ(n), or j is the newest token; group union; the softmax runs over all keys.
Compensation: the dropped probability times the mean of V (the paper's VMC), or none.
Parameter: a position among the table's budgets, those with a name where it has any, in the order of the rows that
they read. Between two budgets θ is interpolated, beyond the ends extrapolated from the last two, and with a single
budget each step lowers every θ by 1.
"""

import math
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import ClassVar

import torch

from topt_vllm.attention.common import Thetas
from topt_vllm.evaluation.rules.base import Rows, Rule
from topt_vllm.thresholds import Budget, LayerThresholds, ThresholdTable

# How far beyond the ends a target is looked for, in logits of the mean θ.
_REACH = 32.0
_LEAST_STEP = 1e-3


@dataclass(frozen=True)
class TopTheta(Rule):
    """Ours, with the mean of V in place of what is dropped.

    Attributes:
        thetas: Thresholds by layer index; a layer without any keeps everything.
    """

    thetas: Mapping[int, Thetas]

    union: ClassVar[bool] = True
    compensate: ClassVar[bool] = True

    def keep(self, rows: Rows) -> torch.Tensor:
        keys = torch.arange(rows.scores.shape[-1], device=rows.scores.device)
        if rows.layer not in self.thetas:
            return (keys < rows.contexts[:, None]).expand(rows.scores.shape)
        theta = theta_at(self.thetas[rows.layer].to(rows.scores.device), rows.contexts)
        # Unseen keys score −inf, as θ does below the first calibrated length.
        seen = rows.scores > -math.inf
        return (
            (rows.scores >= theta[..., None])
            .logical_and_(seen)
            .logical_or_(keys == rows.contexts[:, None] - 1)
        )


@dataclass(frozen=True)
class TopThetaNoMean(TopTheta):
    """The same thresholds; what is dropped is lost."""

    compensate: ClassVar[bool] = False


def theta_at(thetas: Thetas, contexts: torch.Tensor) -> torch.Tensor:
    """:meth:`Thetas.at` for many contexts at once: int64 [r] to float32 [H, r]."""
    lengths, n = thetas.lengths.float(), contexts.float()
    right = torch.searchsorted(lengths, n).clamp(1, max(len(lengths) - 1, 1)).clamp(max=len(lengths) - 1)
    left = (right - 1).clamp(min=0)
    span = (lengths[right] / lengths[left]).log2().clamp(min=1e-9)
    weight = ((n / lengths[left]).log2() / span).clamp(0, 1)
    theta = thetas.theta[:, left].lerp(thetas.theta[:, right], weight)
    beyond = thetas.law[:, :1] + thetas.law[:, 1:] * n.log()
    theta = torch.where(n > lengths[-1], beyond, theta)
    return theta.masked_fill(n < lengths[0], -math.inf)


def ladder(table: ThresholdTable) -> list[Budget]:
    """The budgets that positions count, from few rows to many."""
    named = [budget for budget in table.budgets if budget.k is None]
    measured = [(b.quality.v_rows_read, b) for b in named or table.budgets if b.quality is not None]
    if len(measured) < len(named or table.budgets):
        measured = [(-_mean(b.layers), b) for b in named or table.budgets]
    return [budget for _, budget in sorted(measured, key=lambda pair: pair[0])]


def between_budgets(table: ThresholdTable, position: float) -> dict[int, Thetas]:
    """Thresholds at a position among the table's budgets, of all layers that have any.

    Args:
        table: Gives the budgets; 0 is the first of its ladder, 1 the next.
        position: Any number; see the module for what lies outside.
    """
    budgets = ladder(table)
    last = len(budgets) - 1
    left = min(max(math.floor(position), 0), max(last - 1, 0))
    weight = position - left
    few, many = budgets[left], budgets[min(left + 1, last)]
    return {
        a.layer: _mixed(table.lengths, a, b, weight) for a, b in zip(few.layers, many.layers, strict=True)
    }


def _mixed(lengths: list[int], a: LayerThresholds, b: LayerThresholds, weight: float) -> Thetas:
    theta, law = torch.tensor(a.theta), torch.tensor(a.law)
    if a is b:
        theta, law = theta - weight, law - weight * torch.tensor([1.0, 0.0])
    else:
        theta, law = theta.lerp(torch.tensor(b.theta), weight), law.lerp(torch.tensor(b.law), weight)
    return Thetas(torch.tensor(lengths, dtype=torch.int32), theta, law)


def position_range(table: ThresholdTable) -> tuple[float, float]:
    """Positions between which a target is looked for: from few rows to many."""
    means = [_mean(budget.layers) for budget in ladder(table)]
    steps = (means[0] - means[1], means[-2] - means[-1]) if len(means) > 1 else (1.0, 1.0)
    first, last = (_REACH / max(step, _LEAST_STEP) for step in steps)
    return -first, len(means) - 1 + last


def _mean(layers: list[LayerThresholds]) -> float:
    numbers = [number for entry in layers for row in entry.theta for number in row]
    return sum(numbers) / len(numbers)


def maker(table: ThresholdTable, rule: type[TopTheta]) -> Callable[[float], TopTheta]:
    """From a position among the budgets to the rule."""
    return lambda position: rule(between_budgets(table, position))
