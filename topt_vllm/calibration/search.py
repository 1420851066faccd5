"""From the greedy path to a budget that keeps its promise: an allocation is measured as a whole, and mended.

Predicted losses only nearly add up. So the allocation for a target is run on text held for that, and the place on
the path is moved by the ratio of what was measured to what was predicted, a few times at most.
"""

from collections.abc import Callable
from dataclasses import dataclass
from typing import Literal

from topt_vllm.calibration.allocation import Step

MAX_RUNS = 4
# Part of the target that is aimed at after two misses; 0.78 of it after three. The ratio of measured to predicted
# drifts along a path, so that aims at the target itself come ever closer and stay beyond it.
_SAFE = 0.94


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
    """What a run with all heads sparse gave: rise of perplexity and V rows read, percent."""

    loss: float
    rows: float


@dataclass(frozen=True)
class Found:
    """A place on the path for a target.

    Attributes:
        place: Index into the path's steps.
        measured: What was measured there.
        met: Whether the target was met.
    """

    place: int
    measured: Measured
    met: bool


def search(
    steps: list[Step], target: Target, measure: Callable[[int], Measured], known: dict[int, Measured]
) -> Found:
    """The place that reads least (``loss``) or loses least (``rows``) and meets the target.

    Args:
        steps: A path's, from :func:`~topt_vllm.calibration.allocation.of_all_layers`.
        target: What to reach.
        measure: A run at a place.
        known: What runs have given so far, by place; grows.
    """
    predicted = [100 * (step.loss if target.kind == "loss" else step.rows) for step in steps]
    # Places below `low` are known to miss the target of a loss, those from `high` on to meet it; for rows the
    # other way round.
    low, high = 0, len(steps) - 1
    ratio = 1.0
    # What runs for other targets have found; the nearest, last, says most about the ratio.
    for place in sorted(known, key=lambda p: -abs(_value(known[p], target) - target.percent)):
        low, high = _narrowed(low, high, place, _met(known[place], target), target)
        ratio = _ratio(known[place], predicted[place], target)
    aim = target.percent
    for run in range(1, MAX_RUNS + 1):
        place = _place(predicted, target, aim, ratio, low, high)
        if place in known and high - low > 1:
            place = (low + high) // 2
        if place in known:
            break
        known[place] = measure(place)
        low, high = _narrowed(low, high, place, _met(known[place], target), target)
        ratio = _ratio(known[place], predicted[place], target)
        if _close(known[place], target):
            break
        met = any(_met(result, target) for result in known.values())
        aim = target.percent * (1 if met else _SAFE ** (run - 1) ** 2)
    return _best(target, known)


def _narrowed(low: int, high: int, place: int, met: bool, target: Target) -> tuple[int, int]:
    if met == (target.kind == "loss"):
        return low, min(high, place)
    return max(low, place), high


def _close(measured: Measured, target: Target) -> bool:
    """Met with less than a twentieth to spare: another run would cost more than it could gain."""
    return 0.95 * target.percent <= _value(measured, target) <= target.percent


def _best(target: Target, known: dict[int, Measured]) -> Found:
    good = [place for place, result in known.items() if _met(result, target)]
    if good:
        best = min(good) if target.kind == "loss" else max(good)
    else:
        best = min(known, key=lambda place: _value(known[place], target))
    return Found(best, known[best], bool(good))


def _place(predicted: list[float], target: Target, aim: float, ratio: float, low: int, high: int) -> int:
    """The place that should just reach ``aim``, if what is measured is ``ratio`` times what is predicted."""
    fits = [place for place in range(low, high + 1) if predicted[place] * ratio <= aim]
    if target.kind == "loss":
        return min(fits, default=high)
    return max(fits, default=low)


def _ratio(measured: Measured, predicted: float, target: Target) -> float:
    return max(_value(measured, target) / predicted, 1e-3) if predicted else 1.0


def _met(measured: Measured, target: Target) -> bool:
    return _value(measured, target) <= target.percent


def _value(measured: Measured, target: Target) -> float:
    return measured.loss if target.kind == "loss" else measured.rows
