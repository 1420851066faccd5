"""From curves to a budget that keeps its promise: an allocation, measured with all its layers sparse, and mended.

Losses of single layers only nearly add up. So the allocation for a target is run on held-back text, and the step on
the greedy path is moved by the ratio of what was measured to what was predicted, a few times at most.
"""

from collections.abc import Callable
from dataclasses import dataclass
from typing import Literal

from topt_vllm.calibration.allocation import Allocation

MAX_RUNS = 4


@dataclass(frozen=True)
class Target:
    """What a budget shall reach.

    Attributes:
        kind: ``loss``: rise of perplexity at most ``percent``; ``rows``: V rows read at most ``percent``, all
            layers counted.
        percent: Of dense attention's.
    """

    kind: Literal["loss", "rows"]
    percent: float

    @property
    def name(self) -> str:
        """The budget's name in the table, such as ``loss-1%``."""
        return f"{self.kind}-{self.percent:g}%"


@dataclass(frozen=True)
class Measured:
    """What a run with all layers sparse gave: rise of perplexity and V rows read, percent."""

    loss: float
    rows: float


@dataclass(frozen=True)
class Found:
    """A budget for a target.

    Attributes:
        allocation: Keys by layer.
        measured: Of it, on the text that it was mended on.
        met: Whether the target was met there.
        runs: Runs with all layers sparse.
    """

    allocation: Allocation
    measured: Measured
    met: bool
    runs: int


def search(path: list[Allocation], target: Target, measure: Callable[[Allocation], Measured]) -> Found:
    """The allocation of the path that reads least (``loss``) or loses least (``rows``) and meets the target.

    Args:
        path: By ascending rows, from :func:`~topt_vllm.calibration.allocation.allocations`.
        target: What to reach.
        measure: A run with all layers sparse.
    """
    predicted = [_predicted(allocation, target) for allocation in path]
    # Positions below `low` are known to miss the target of a loss, those from `high` on to meet it; for rows the
    # other way round.
    low, high = 0, len(path) - 1
    results: dict[int, Measured] = {}
    position = _position(predicted, target, 1.0, low, high)
    while len(results) < MAX_RUNS and position not in results:
        results[position] = measure(path[position])
        met = _value(results[position], target) <= target.percent
        if met == (target.kind == "loss"):
            high = min(high, position)
        else:
            low = max(low, position)
        ratio = _value(results[position], target) / predicted[position] if predicted[position] else 1.0
        position = _position(predicted, target, max(ratio, 1e-3), low, high)
        if position in results and high - low > 1:
            position = (low + high) // 2
    return _best(path, target, results)


def _best(path: list[Allocation], target: Target, results: dict[int, Measured]) -> Found:
    good = [p for p, result in results.items() if _value(result, target) <= target.percent]
    if good:
        best = min(good) if target.kind == "loss" else max(good)
    else:
        best = min(results, key=lambda p: _value(results[p], target))
    return Found(path[best], results[best], bool(good), len(results))


def _position(predicted: list[float], target: Target, ratio: float, low: int, high: int) -> int:
    """The step that should just meet the target, if what is measured is ``ratio`` times what is predicted."""
    fits = [p for p in range(low, high + 1) if predicted[p] * ratio <= target.percent]
    if target.kind == "loss":
        return min(fits, default=high)
    return max(fits, default=low)


def _predicted(allocation: Allocation, target: Target) -> float:
    return 100 * (allocation.loss if target.kind == "loss" else allocation.rows)


def _value(measured: Measured, target: Target) -> float:
    return measured.loss if target.kind == "loss" else measured.rows
