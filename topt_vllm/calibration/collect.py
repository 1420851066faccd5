"""Passes over the calibration sequences: the scores that thresholds follow from, and what skipping by them does."""

from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import Any

import torch

from topt_vllm.attention.common import Thetas
from topt_vllm.calibration.head_errors import HeadErrors, head_errors, mean_errors, output_projection
from topt_vllm.calibration.key_statistics import key_sums
from topt_vllm.calibration.partial import Partial
from topt_vllm.calibration.plan import ERROR_ROWS, Plan
from topt_vllm.calibration.statistics import KthScoreMoments, RowSample, kth_scores, sample_rows
from topt_vllm.replay.capture import Observer
from topt_vllm.replay.scores import LayerCall
from topt_vllm.replay.whole_pass import observed


@dataclass(frozen=True)
class Collected:
    """Statistics by layer.

    Attributes:
        moments: Of scores, for ``plan.ks``.
        keys: What :func:`~topt_vllm.calibration.key_statistics.key_sums` gave, of all sequences together.
        passes: By index, the passes over ``plan.error_sequences`` that were made: their layers, late queries only.
    """

    moments: dict[int, KthScoreMoments]
    keys: dict[int, torch.Tensor]
    passes: dict[int, list[LayerCall]]


def collect(model: Any, plan: Plan, partial: Partial, progress: Callable[[int], object]) -> Collected:
    """Statistics of every layer.

    Args:
        model: A transformers causal language model.
        plan: The run.
        partial: Keeps each sequence's scores and sums.
        progress: Called with the number of layers done.
    """
    subject = plan.subject
    moments = {
        layer: KthScoreMoments(plan.ks, subject.identity.num_query_heads, plan.lengths)
        for layer in subject.full_layers
    }
    keys: dict[int, torch.Tensor] = {}
    passes: dict[int, list[LayerCall]] = {}
    before = plan.options.num_samples - len(plan.error_sequences)
    generator = torch.Generator().manual_seed(plan.options.seed)
    for index, sequence in enumerate(plan.sequences.calibration):
        sample = sample_rows(plan.lengths, generator)
        values = partial.load(f"sequence-{index:04}")
        if values is None:
            calls: list[LayerCall] = []
            keep = calls.append if index >= before and plan.options.budget == "auto" else None
            values = _sequence(model, plan, sequence, sample, lambda: progress(1), keep)
            if calls:
                passes[index - before] = calls
            partial.save(f"sequence-{index:04}", values)
        else:
            progress(len(values))
        for layer, (scores, sums) in values.items():
            moments[layer].add(sample, scores)
            keys[layer] = keys[layer] + sums if layer in keys else sums
    return Collected(moments, keys, passes)


def collect_errors(
    model: Any,
    plan: Plan,
    partial: Partial,
    thetas: dict[int, list[Thetas]],
    passes: dict[int, list[LayerCall]],
    progress: Callable[[int], object],
) -> dict[int, HeadErrors]:
    """What each head's skipping does, by layer, at every budget of ``plan.ks``.

    Args:
        model: A transformers causal language model.
        plan: The run.
        partial: Keeps each sequence's errors.
        thetas: By layer, a budget of ``plan.ks`` each.
        passes: Of :class:`Collected`; used up, for each holds K and V of the whole model.
        progress: Called with the number of layers done.
    """
    subject = plan.subject
    found: dict[int, list[HeadErrors]] = {layer: [] for layer in subject.full_layers}
    for index, sequence in enumerate(plan.error_sequences):
        stored = partial.load(f"errors-{index:04}")
        if stored is None:
            rows = late_rows(len(sequence), plan.options.seed + index, plan.lengths[0] - 1)
            stored = {}

            def observe(call: LayerCall, rows: torch.Tensor = rows, into: dict = stored) -> None:
                width = call.query.shape[0] * call.value.shape[2]
                weight = output_projection(model, call.layer, width)
                into[call.layer] = vars(head_errors(call, rows, thetas[call.layer], weight))
                progress(1)

            calls = passes.pop(index, [])
            if not calls:
                observed(model, subject, sequence, observe)
            with torch.inference_mode():
                while calls:
                    observe(calls.pop(0))
            partial.save(f"errors-{index:04}", stored)
        else:
            progress(len(stored))
        for layer, tensors in stored.items():
            found[layer].append(HeadErrors(**tensors))
    return {layer: mean_errors(parts) for layer, parts in found.items()}


def late_rows(length: int, seed: int, least: int = 0) -> torch.Tensor:
    """Query rows of the last quarter, for budgets are made for long contexts; none before ``least``."""
    first = max(_first_late_row(length), least)
    generator = torch.Generator().manual_seed(seed)
    return (torch.randperm(length - first, generator=generator)[:ERROR_ROWS] + first).sort().values


def _first_late_row(length: int) -> int:
    return length * 3 // 4


def _late(call: LayerCall) -> LayerCall:
    """What is left to look at late rows of a layer, which has been found to be plain causal."""
    first = _first_late_row(call.query.shape[1])
    query, key, value = call.query[:, first:].clone(), call.key.contiguous(), call.value.contiguous()
    # Views of a projection that gives all three would keep all three.
    return replace(call, query=query, key=key, value=value, first=first)


def _sequence(
    model: Any,
    plan: Plan,
    sequence: list[int],
    sample: RowSample,
    progress: Callable[[], object],
    keep: Observer | None,
) -> dict[int, list[torch.Tensor]]:
    """Of one sequence, by layer: its scores, float32 [K, H, R], and its sums; ``keep`` gets layers' late rows."""
    values: dict[int, list[torch.Tensor]] = {}

    def observe(call: LayerCall) -> None:
        if keep is not None:
            keep(_late(call))
        values[call.layer] = [kth_scores(call, sample.rows, plan.ks).cpu(), key_sums(call.query, call.key)]
        progress()

    observed(model, plan.subject, sequence, observe)
    return values
