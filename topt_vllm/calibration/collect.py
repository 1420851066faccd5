"""Passes over the calibration sequences: the scores that thresholds follow from, and what skipping by them does."""

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, ClassVar

import torch

from topt_vllm.attention.common import Thetas
from topt_vllm.calibration.head_errors import HeadErrors, head_errors, mean_errors, output_projection
from topt_vllm.calibration.options import CalibrationError
from topt_vllm.calibration.partial import Partial
from topt_vllm.calibration.plan import ERROR_ROWS, Plan
from topt_vllm.calibration.statistics import KthScoreMoments, RowSample, kth_scores, sample_rows
from topt_vllm.replay.capture import Observer, captured
from topt_vllm.replay.causal_lm import CausalLM
from topt_vllm.replay.rule import Rows, Rule
from topt_vllm.replay.scores import LayerCall


def collect(
    model: Any, plan: Plan, partial: Partial, progress: Callable[[int], object]
) -> dict[int, KthScoreMoments]:
    """Statistics of every layer, for ``plan.ks``.

    Args:
        model: A transformers causal language model.
        plan: The run.
        partial: Keeps each sequence's scores.
        progress: Called with the number of layers done.
    """
    subject = plan.subject
    moments = {
        layer: KthScoreMoments(len(plan.ks), subject.identity.num_query_heads, plan.lengths)
        for layer in subject.full_layers
    }
    generator = torch.Generator().manual_seed(plan.options.seed)
    for index, sequence in enumerate(plan.sequences.calibration):
        sample = sample_rows(plan.lengths, generator)
        values = partial.load(f"sequence-{index:04}")
        if values is None:
            values = _scores(model, plan, sequence, sample, lambda: progress(1))
            partial.save(f"sequence-{index:04}", values)
        else:
            progress(len(values))
        for layer, found in values.items():
            moments[layer].add(sample, found)
    return moments


def collect_errors(
    model: Any,
    plan: Plan,
    partial: Partial,
    thetas: dict[int, list[Thetas]],
    progress: Callable[[int], object],
) -> dict[int, HeadErrors]:
    """What each head's skipping does, by layer, at every budget of ``plan.ks``.

    Args:
        model: A transformers causal language model.
        plan: The run.
        partial: Keeps each sequence's errors.
        thetas: By layer, a budget of ``plan.ks`` each.
        progress: Called with the number of layers done.
    """
    subject = plan.subject
    found: dict[int, list[HeadErrors]] = {layer: [] for layer in subject.full_layers}
    for index, sequence in enumerate(plan.error_sequences):
        stored = partial.load(f"errors-{index:04}")
        if stored is None:
            rows = _late_rows(len(sequence), plan.options.seed + index)
            stored = {}

            def observe(call: LayerCall, rows: torch.Tensor = rows, into: dict = stored) -> None:
                width = call.query.shape[0] * call.value.shape[2]
                weight = output_projection(model, call.layer, width)
                into[call.layer] = vars(head_errors(call, rows, thetas[call.layer], weight))
                progress(1)

            _run(model, plan, sequence, observe)
            partial.save(f"errors-{index:04}", stored)
        else:
            progress(len(stored))
        for layer, tensors in stored.items():
            found[layer].append(HeadErrors(**tensors))
    return {layer: mean_errors(parts) for layer, parts in found.items()}


def _late_rows(length: int, seed: int) -> torch.Tensor:
    """Query rows of the last quarter: budgets are made for long contexts."""
    first = length * 3 // 4
    generator = torch.Generator().manual_seed(seed)
    return (torch.randperm(length - first, generator=generator)[:ERROR_ROWS] + first).sort().values


def _scores(
    model: Any, plan: Plan, sequence: list[int], sample: RowSample, progress: Callable[[], object]
) -> dict[int, torch.Tensor]:
    """Of one sequence, by layer: float32 [K, H, R]."""
    values: dict[int, torch.Tensor] = {}

    def observe(call: LayerCall) -> None:
        values[call.layer] = kth_scores(call, sample.rows, plan.ks).cpu()
        progress()

    _run(model, plan, sequence, observe)
    return values


def _run(model: Any, plan: Plan, sequence: list[int], observe: Observer) -> None:
    """One forward pass; every full-attention layer must have been seen, or thresholds would be missing."""
    seen: list[int] = []

    def counted(call: LayerCall) -> None:
        seen.append(call.layer)
        observe(call)

    options, subject = plan.options, plan.subject
    sparse = set(subject.full_layers) - set(plan.dense_layers) if options.topk_at_calibration else set()
    rules = dict.fromkeys(sparse, _TopKeys(options.ks[-1]))
    tokens = torch.tensor([sequence], device=model.device)
    with torch.inference_mode(), captured(model, subject.identity, counted, rules):
        CausalLM(model).hidden(tokens)
    if seen != subject.full_layers:
        raise CalibrationError(
            f"{options.model}: its configuration has the full-attention layers {subject.full_layers}, "
            f"but layers {seen} called the AttentionInterface; this architecture can't be calibrated"
        )


@dataclass(frozen=True)
class _TopKeys(Rule):
    """About what thresholds will do: each query head uses its ``k`` best keys, and the mean of V for the others."""

    k: int

    compensate: ClassVar[bool] = True

    def keep(self, rows: Rows) -> torch.Tensor:
        least = rows.scores.topk(min(self.k, rows.scores.shape[-1]), dim=-1).values[..., -1:]
        return (rows.scores >= least).logical_and_(rows.scores > -torch.inf)
