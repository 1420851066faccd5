"""Finds the parameter with which a rule reads a given share of the V rows.

The scores are those of the dense model on a text that isn't evaluated, for a sample of its rows, and are kept while
parameters are tried on them. What the rule reads on the evaluated text is measured there and may differ.
"""

from collections.abc import Mapping
from dataclasses import dataclass, replace
from typing import Any

import torch

from topt_vllm.evaluation.rules.families import Family
from topt_vllm.replay.model import Subject
from topt_vllm.replay.rule import Rows, Rule, rows_of
from topt_vllm.replay.scores import LayerCall, any_of_group, in_threads, true_per_row
from topt_vllm.replay.whole_pass import observed

SAMPLED_ROWS = 24
_STEPS = 16
_CLOSE = 0.01


@dataclass(frozen=True)
class Sample:
    """Scores of sampled rows of one text, by full-attention layer.

    Attributes:
        subject: The model.
        rows: By layer; what they share is the layer's keys, [Hkv, n, D].
    """

    subject: Subject
    rows: Mapping[int, Rows]

    def v_rows_read(self, rule: Rule, dense: frozenset[int]) -> float:
        """Share of V rows that the rule reads, all layers counted; layers in ``dense`` are read in full."""
        contexts = next(iter(self.rows.values())).contexts
        in_context = self.subject.v_rows(contexts)

        def count(rows: Rows) -> int:
            prepared = replace(rows, shared=rule.prepare(rows.shared))
            return int(true_per_row(any_of_group(rows.by_group(rule.keep(prepared)))).sum())

        sparse = {layer: rows for layer, rows in self.rows.items() if layer not in dense}
        read = sum(in_context) - sum(in_context[layer] for layer in sparse)
        counted = in_threads(count, list(sparse.values()), contexts.device)
        return (read + sum(counted)) / sum(in_context)


@dataclass(frozen=True)
class Tuned:
    """A rule for a target.

    Attributes:
        rule: The rule.
        parameter: Its parameter as its source has it.
        v_rows_read: What it reads of the sample.
    """

    rule: Rule
    parameter: float
    v_rows_read: float


def sample(model: Any, subject: Subject, tokens: list[int], wanted: list[torch.Tensor]) -> list[Sample]:
    """One dense pass over ``tokens``; a sample for each of ``wanted``: ascending indices of query rows, int64."""
    taken: list[dict[int, Rows]] = [{} for _ in wanted]

    def observe(call: LayerCall) -> None:
        key = call.key.contiguous()
        for into, rows in zip(taken, wanted, strict=True):
            into[call.layer] = rows_of(call, rows.to(call.query.device), key)

    observed(model, subject, tokens, observe)
    return [Sample(subject, rows) for rows in taken]


def spread_rows(first: int, last: int) -> torch.Tensor:
    """Query rows whose contexts lie evenly in [first, last]."""
    return torch.linspace(first - 1, last - 1, SAMPLED_ROWS).round().long()


def tune(family: Family, target: float, found: Sample, dense: frozenset[int]) -> Tuned:
    """Bisects for the target; the nearest end of the range where the rule can't reach it."""
    tried: dict[float, float] = {}

    def read(x: float) -> float:
        if x not in tried:
            tried[x] = found.v_rows_read(family.make(x).on_sample(), dense)
        return tried[x]

    low, high = family.few, family.many
    if read(low) < target < read(high):
        for _ in range(_STEPS):
            middle = (low + high) / 2
            if abs(read(middle) / target - 1) < _CLOSE:
                break
            low, high = (middle, high) if read(middle) < target else (low, middle)
    best = min(tried, key=lambda x: abs(tried[x] - target))
    return Tuned(family.make(best), family.shown(best), tried[best])
