"""Top-Theta: keys whose score reaches a calibrated threshold (arXiv 2502.08363).

Idea: θ is static per layer, query head and context length, so a key is judged by its own score alone.
Rule: s_j ≥ θ(n), or j is the newest token; group union; the softmax runs over all keys.
Compensation: the dropped probability times the mean of V (the paper's VMC), or none.
Parameter: a position among the table's budgets, those with a name where it has any, in the order of the rows that
they read. Between two budgets θ is interpolated. Beyond the ends it is extrapolated from the last two budgets with
a k; with named ones, whose layers differ in what they change, or with a single one, each step lowers every θ by 1.
A named budget's dense layers are part of its allocation: towards it their θ falls without end.
"""

import math
from collections.abc import Callable
from dataclasses import dataclass
from typing import ClassVar

import torch

from topt_vllm.attention.common import Thetas
from topt_vllm.replay.top_theta import TopTheta
from topt_vllm.table.schema import Budget, LayerThresholds, ThresholdTable

# How far beyond the ends a target is looked for, in logits of the mean θ.
_REACH = 32.0
_LEAST_STEP = 1e-3
# Lowers a θ below any score, and stays finite: θ between lengths is a weighted mean, which −inf makes NaN.
_DENSE = 1e9


@dataclass(frozen=True)
class TopThetaNoMean(TopTheta):
    """The same thresholds; what is dropped is lost."""

    compensate: ClassVar[bool] = False


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
    found = {}
    for a, b in zip(few.layers, many.layers, strict=True):
        if few.k is None:
            inside = min(max(weight, 0.0), 1.0)
            dense = (a.layer in few.dense_layers, a.layer in many.dense_layers)
            lowered = weight - inside + _fall(weight, *dense)
        else:
            inside, lowered = (0.0, weight) if few is many else (weight, 0.0)
        found[a.layer] = _mixed(table.lengths, a, b, inside, lowered)
    return found


def _mixed(
    lengths: list[int], a: LayerThresholds, b: LayerThresholds, weight: float, lowered: float
) -> Thetas:
    theta = torch.tensor(a.theta).lerp(torch.tensor(b.theta), weight) - lowered
    law = torch.tensor(a.law).lerp(torch.tensor(b.law), weight) - lowered * torch.tensor([1.0, 0.0])
    return Thetas(torch.tensor(lengths, dtype=torch.int32), theta, law)


def _fall(weight: float, few: bool, many: bool) -> float:
    """By how much θ of a layer lies below what it is elsewhere, where one of two budgets keeps it dense.

    Args:
        weight: Position between them, 0 at the one of fewer rows.
        few: Whether the layer is dense in that one.
        many: Whether it is in the other.
    """
    if few and many:
        # Below the first budget dense layers, too, must give rows up.
        return _down(-weight) if weight < 0 else _DENSE
    if many:
        return _down(1.0 - weight)
    return _down(abs(weight)) if few and weight < 1 else 0.0


def _down(distance: float) -> float:
    """At a distance from where a layer is dense; continuous, and 0 from 1 on."""
    return min(max(-math.log(distance), 0.0), _DENSE) if distance > 0 else _DENSE


def position_range(table: ThresholdTable) -> tuple[float, float]:
    """Positions between which a target is looked for: from few rows to many."""
    budgets = ladder(table)
    means = [_mean(budget.layers) for budget in budgets]
    linear = len(means) > 1 and budgets[0].k is not None
    steps = (means[0] - means[1], means[-2] - means[-1]) if linear else (1.0, 1.0)
    first, last = (_REACH / max(step, _LEAST_STEP) for step in steps)
    return -first, len(means) - 1 + last


def _mean(layers: list[LayerThresholds]) -> float:
    numbers = [number for entry in layers for row in entry.theta for number in row]
    return sum(numbers) / len(numbers)


def maker(table: ThresholdTable, rule: type[TopTheta]) -> Callable[[float], TopTheta]:
    """From a position among the budgets to the rule."""
    return lambda position: rule(between_budgets(table, position))
