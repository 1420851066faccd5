"""Budgets that follow a target, and what every budget is worth: runs with sparse layers."""

import math
import sys
from collections.abc import Callable
from typing import Any

import torch
from tqdm import tqdm

from topt_vllm.calibration.allocation import Head, Path, Point, of_all_layers
from topt_vllm.calibration.head_errors import HeadErrors
from topt_vllm.calibration.maker import Maker
from topt_vllm.calibration.partial import Partial
from topt_vllm.calibration.plan import MEASURED_ROWS, Plan
from topt_vllm.calibration.quality import quality
from topt_vllm.calibration.search import Measured, search
from topt_vllm.calibration.sensitivity import SENSITIVITY_ROWS, sensitivity
from topt_vllm.replay.attention import RuleAttention
from topt_vllm.replay.capture import Observer
from topt_vllm.replay.replay import Replay
from topt_vllm.replay.top_theta import TopTheta
from topt_vllm.table.schema import Budget, Quality


def measured(
    model: Any, plan: Plan, budgets: list[Budget], progress: Callable[[], object], observe: Observer
) -> list[Budget]:
    """The budgets with their quality on the held-back sequence; ``observe`` sees its dense pass."""
    replay = _replay(model, plan, plan.sequences.held_back, MEASURED_ROWS, observe)
    found = []
    for budget in budgets:
        worth, _ = _measure(replay, plan, budget)
        found.append(budget.model_copy(update={"quality": worth}))
        progress()
    return found


def curves(
    model: Any, plan: Plan, maker: Maker, errors: dict[int, HeadErrors], partial: Partial, progress: Callable
) -> dict[Head, list[Point]]:
    """What every head loses and reads at each k, from its errors and its layer's sensitivity."""
    replay = _replay(model, plan, plan.sequences.calibration[-1], SENSITIVITY_ROWS)
    thetas = maker.thetas()
    found: dict[Head, list[Point]] = {}
    pairs = len(plan.allocated_layers) * plan.subject.identity.num_kv_heads
    for layer in plan.allocated_layers:
        factor = partial.load(f"sensitivity-{layer:04}")
        if factor is None:
            factor = sensitivity(replay, plan.subject, layer, plan.ks, thetas[layer], errors[layer])
            partial.save(f"sensitivity-{layer:04}", factor)
        energy, rows = errors[layer].energy, errors[layer].rows
        # Heads' own errors, scaled so that together they are the layer's, which knows of the group's union.
        losses = factor * energy * errors[layer].layer_energy / energy.sum(dim=0).clamp(min=1e-30)
        for head in range(len(energy)):
            found[layer, head] = [
                Point(k, loss, read / pairs)
                for k, loss, read in zip(plan.ks, losses[head].tolist(), rows[head].tolist(), strict=True)
            ]
        progress()
    return found


def targeted(
    model: Any, plan: Plan, maker: Maker, path: Path, progress: Callable[[], object]
) -> list[Budget]:
    """One budget for each target: search on the path, on the tuning sequences."""
    replays = [_replay(model, plan, tokens, MEASURED_ROWS) for tokens in plan.sequences.tuning]
    rounding = _rounding(replays, plan)
    fixed = plan.fixed_rows(torch.cat([replay.rows + 1 for replay in replays]))
    steps = of_all_layers(path.steps, fixed)
    known: dict[int, Measured] = {}

    def measure(place: int) -> Measured:
        budget = maker.allocated(path.ks(place), "tried")
        results = [_measure(replay, plan, budget) for replay in replays]
        losses = [worth.loss_pct for worth, _ in results]
        divergences = [
            100 * math.expm1(worth.kl - floor) for (worth, _), floor in zip(results, rounding, strict=True)
        ]
        progress()
        # The divergence is what the loss would be on the model's own text: the promise holds on both.
        return Measured(max(_mean(losses), _mean(divergences)), 100 * _mean([rows for _, rows in results]))

    budgets = []
    for target in plan.options.targets:
        found = search(steps, target, measure, known)
        if not found.met:
            reached = f"a loss of {found.measured.loss:.2f} % at {found.measured.rows:.1f} % of V rows"
            reached += ", and the server's default" if target == plan.options.targets[-1] else ""
            tqdm.write(
                f"{target.name} was not reached; its budget is the nearest, {reached}", file=sys.stderr
            )
        budgets.append(maker.allocated(path.ks(found.place), target.name))
    return budgets


def _rounding(replays: list[Replay], plan: Plan) -> list[float]:
    """Divergences with every row kept (nats): layers are computed another way than in the dense pass, which a
    narrow dtype makes as much as a small target.
    """
    everything = dict.fromkeys(plan.allocated_layers, TopTheta({}))
    runs = [replay.compare(RuleAttention(plan.subject, everything, replay.rows + 1)) for replay in replays]
    return [run.losses().kl for run in runs]


def _mean(numbers: list[float]) -> float:
    return sum(numbers) / len(numbers)


def _replay(model: Any, plan: Plan, tokens: list[int], rows: int, observe: Observer | None = None) -> Replay:
    """Rows below the first calibrated length are dense, so there is nothing to measure."""
    count = min(rows, len(tokens) - plan.lengths[0])
    return Replay(model, plan.subject, tokens, count, observe=observe)


def _measure(replay: Replay, plan: Plan, budget: Budget) -> tuple[Quality, float]:
    """Quality, and the exact share of V rows read."""
    thetas = budget.thetas(plan.lengths)
    rules = dict.fromkeys(thetas, TopTheta(thetas))
    attention = RuleAttention(plan.subject, rules, replay.rows + 1, budget.ks())
    losses = replay.compare(attention).losses()
    return (
        quality(attention, replay.length + 1, len(replay.rows), losses),
        attention.counts.shares()["v_rows_read"],
    )
