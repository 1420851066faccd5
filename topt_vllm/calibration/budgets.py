"""Budgets from statistics: constant numbers of keys, shares of dropped probability, allocations for a target."""

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

from topt_vllm.attention.common import Thetas
from topt_vllm.calibration.allocation import Allocation, Point, allocations
from topt_vllm.calibration.partial import Partial
from topt_vllm.calibration.plan import Plan
from topt_vllm.calibration.quality import ThresholdTally
from topt_vllm.calibration.replay import Replay
from topt_vllm.calibration.scan import SCAN_LENGTH, SCAN_ROWS, ladder, scan
from topt_vllm.calibration.search import Found, Measured, Target, search
from topt_vllm.calibration.statistics import KthScoreMoments
from topt_vllm.table_schema import thetas_of
from topt_vllm.thresholds import Budget, LayerThresholds, Quality

# Rows decoded to measure a budget: the last ones of a sequence.
MEASURED_ROWS = 1024


@dataclass(frozen=True)
class Maker:
    """Makes the budgets of a plan.

    Attributes:
        plan: The run.
        moments: Statistics by layer.
    """

    plan: Plan
    moments: dict[int, KthScoreMoments]

    def constant(self, k: int) -> Budget:
        """The same k in every layer that isn't dense."""
        layers = [self._layer(layer, self.plan.ks.index(k)) for layer in self.plan.subject.full_layers]
        return Budget(k=k, dense_layers=self.plan.subject.dense_layers, quality=None, layers=layers)

    def mass(self, percent: float) -> Budget:
        """Thresholds that drop about this share of the probability."""
        column = len(self.plan.ks) + self.plan.masses.index(percent)
        layers = [self._layer(layer, column) for layer in self.plan.subject.full_layers]
        return Budget(
            k=None,
            dense_layers=self.plan.subject.dense_layers,
            quality=None,
            layers=layers,
            name=f"mass-{percent:g}%",
        )

    def allocated(self, allocation: Allocation, name: str) -> Budget:
        """Each layer with its own k; those with the most keys where a layer is dense, which are not used."""
        layers = []
        for layer, k in allocation.ks.items():
            entry = self._layer(layer, self.plan.ks.index(k or self.plan.ks[-1]))
            layers.append(entry if k is None else entry.model_copy(update={"k": k}))
        dense = [layer for layer, k in allocation.ks.items() if k is None]
        return Budget(k=None, dense_layers=dense, quality=None, layers=layers, name=name)

    def scanned(self) -> dict[int, dict[int, Thetas]]:
        """Thresholds by layer and k for the scan."""
        return {
            layer: {
                k: thetas_of(self._layer(layer, self.plan.ks.index(k)), self.plan.subject.lengths)
                for k in ladder(self.plan.options.ks[-1])
            }
            for layer in self.plan.subject.full_layers
        }

    def _layer(self, layer: int, column: int) -> LayerThresholds:
        law, theta = self.moments[layer].fit(column, self.plan.options.sigma).rounded()
        return LayerThresholds(layer=layer, law=law, theta=theta)


def measured(model: Any, plan: Plan, budgets: list[Budget], progress: Callable[[], object]) -> list[Budget]:
    """The budgets with their quality on the held-back sequence."""
    replay = _replay(model, plan, plan.sequences.held_back, MEASURED_ROWS)
    found = []
    for budget in budgets:
        quality, _ = _measure(replay, plan, budget)
        found.append(budget.model_copy(update={"quality": quality}))
        progress()
    return found


def targeted(
    model: Any, plan: Plan, maker: Maker, partial: Partial, progress: Callable[[], object]
) -> list[Budget]:
    """One budget for each target: scan, allocation, search."""
    path = allocations(_curves(model, plan, maker, partial, progress))
    replay = _replay(model, plan, plan.sequences.tuning[0], MEASURED_ROWS)
    budgets = []
    for target in plan.options.targets:
        found = _search(replay, plan, maker, path, target)
        budgets.append(maker.allocated(found.allocation, target.name))
    return budgets


def _search(replay: Replay, plan: Plan, maker: Maker, path: list[Allocation], target: Target) -> Found:
    def measure(allocation: Allocation) -> Measured:
        quality, rows = _measure(replay, plan, maker.allocated(allocation, target.name))
        assert quality.loss_pct is not None
        return Measured(quality.loss_pct, 100 * rows)

    return search(path, target, measure)


def _curves(
    model: Any, plan: Plan, maker: Maker, partial: Partial, progress: Callable[[], object]
) -> dict[int, list[Point]]:
    """Measured on the last calibration sequence."""
    known: dict[int, list[Point]] = {}
    for layer in plan.subject.full_layers:
        stored = partial.load(f"curve-{layer:04}")
        if stored is not None:
            known[layer] = [Point(*point) for point in stored]
    replay = _replay(model, plan, plan.sequences.calibration[-1][:SCAN_LENGTH], SCAN_ROWS)
    too_much = 2 * max(
        [target.percent for target in plan.options.targets if target.kind == "loss"], default=50
    )

    def save(layer: int, points: list[Point]) -> None:
        partial.save(f"curve-{layer:04}", [(point.k, point.loss, point.rows) for point in points])

    return scan(replay, plan.subject, maker.scanned(), too_much / 100, progress, known, save)


def _replay(model: Any, plan: Plan, tokens: list[int], rows: int) -> Replay:
    """Rows below the first calibrated length are dense, so there is nothing to measure."""
    count = max(1, min(rows, len(tokens) - plan.subject.lengths[0]))
    return Replay(model, plan.subject, tokens, count)


def _measure(replay: Replay, plan: Plan, budget: Budget) -> tuple[Quality, float]:
    """Quality, and the exact share of V rows read."""
    thetas = {
        entry.layer: thetas_of(entry, plan.subject.lengths)
        for entry in budget.layers
        if entry.layer not in budget.dense_layers
    }
    tally = ThresholdTally(plan.subject.identity, budget.ks(), thetas, replay.rows, plan.subject.window)
    losses = replay.run(tally)
    return tally.quality(replay.length + 1, len(replay.rows), losses), tally.rows_read()
