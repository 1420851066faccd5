"""An evaluation run: rules tuned to their targets, then every text under every rule, then needles."""

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

from tqdm import tqdm

from topt_vllm.calibration.model import load_causal_lm
from topt_vllm.evaluation.attention import Counts
from topt_vllm.evaluation.needles import answer, compared, hide
from topt_vllm.evaluation.options import OURS
from topt_vllm.evaluation.perplexity import check_head, compare, hidden_states, joined
from topt_vllm.evaluation.plan import Plan, Text
from topt_vllm.evaluation.records import by_position, quality
from topt_vllm.evaluation.rules.base import Rule
from topt_vllm.evaluation.rules.families import families
from topt_vllm.evaluation.rules.toptheta import TopTheta, TopThetaNoMean
from topt_vllm.evaluation.tuning import Sample, sample, spread_rows, tune

NEEDLES = "needles"


@dataclass(frozen=True)
class Job:
    """One rule at one target.

    Attributes:
        facts: What its records say about it, in their words.
        rules: The rule of each layer that isn't dense.
    """

    facts: dict[str, Any]
    rules: dict[int, Rule]


def evaluate(plan: Plan) -> Iterator[dict[str, Any]]:
    """Runs the plan, shows its progress on stderr, and gives each record as soon as it is known.

    Raises:
        CalibrationError: The weights can't be loaded, or the model isn't one that can be evaluated.
    """
    options = plan.options
    model = load_causal_lm(plan.loading)
    check_head(model, plan.texts[0].sequences[0])
    jobs_per_text = len(options.rules) * len(options.rows) + len(options.ks) * len(
        set(options.rules) & set(OURS)
    )
    passes = len(plan.texts) * (1 + options.num_samples * (1 + jobs_per_text))
    passes += len(options.needles) * len(options.depths) + (1 if options.needles else 0)
    with tqdm(total=passes, unit="pass", smoothing=0.1) as bar:
        for text in plan.texts:
            yield from _text(model, plan, text, bar)
        if options.needles:
            yield from _needles(model, plan, bar)


def _text(model: Any, plan: Plan, text: Text, bar: Any) -> Iterator[dict[str, Any]]:
    longest, first = plan.subject.max_seq_length, plan.first
    bar.set_description(f"tuning on {text.tuned_on}")
    (found,) = sample(model, plan.subject, text.tuning, [spread_rows(first, longest)])
    bar.update()
    jobs = _jobs(plan, found, longest)
    del found
    bar.set_description(f"{text.name}: dense")
    dense = []
    for tokens in text.sequences:
        dense.append(hidden_states(model, plan.subject, tokens, {}, first)[0])
        bar.update()
    for job in jobs:
        bar.set_description(f"{text.name}: {job.facts['rule']}")
        parts, total = [], Counts()
        for tokens, states in zip(text.sequences, dense, strict=True):
            ours, counts = hidden_states(model, plan.subject, tokens, job.rules, first)
            parts.append(compare(model, tokens, states, ours, first))
            total.add(counts)
            bar.update()
        whole = joined(parts)
        yield {
            "text": text.name,
            "tuned_on": text.tuned_on,
            **job.facts,
            **quality(whole, total),
            "first_context": first,
            "max_seq_length": longest,
            "by_position": by_position(whole),
        }


def _jobs(plan: Plan, found: Sample, longest: int) -> list[Job]:
    """Every rule at every target, and every budget of the table that was asked for."""
    options = plan.options
    jobs: list[Job] = []
    for k in options.ks:
        budget = plan.table.budget(k)
        for name, make in (("toptheta", TopTheta), ("toptheta-nomean", TopThetaNoMean)):
            if name in options.rules:
                facts = _facts(name, None, k, budget.dense_layers, None, None)
                jobs.append(_job(plan, facts, make(plan.table.thetas(budget))))
    for target in options.rows:
        dense = plan.dense[target]
        for family in families(options.rules, plan.table, longest):
            tuned = tune(family, target, found, dense)
            facts = _facts(family.name, target, None, sorted(dense), tuned.parameter, tuned.v_rows_read)
            jobs.append(_job(plan, facts, tuned.rule))
    return jobs


def _facts(
    rule: str,
    target: float | None,
    k: int | str | None,
    dense_layers: list[int],
    parameter: float | None,
    tuned: float | None,
) -> dict[str, Any]:
    return {
        "rule": rule,
        "rows_target": target,
        "k": k,
        "dense_layers": list(dense_layers),
        "parameter": parameter,
        "v_rows_tuned": tuned,
    }


def _job(plan: Plan, facts: dict[str, Any], rule: Rule) -> Job:
    sparse = set(plan.subject.full_layers) - set(facts["dense_layers"])
    return Job(facts, {layer: rule for layer in sorted(sparse)})


def _needles(model: Any, plan: Plan, bar: Any) -> Iterator[dict[str, Any]]:
    """Records of the needles: for each rule and target one over the whole grid.

    Parameters are tuned for each length by itself, on rows of about that context.
    """
    options, subject, text = plan.options, plan.subject, plan.texts[0]
    bar.set_description(f"{NEEDLES}: tuning on {text.tuned_on}")
    wanted = [spread_rows(max(plan.first, length * 9 // 10), length) for length in options.needles]
    samples = sample(model, subject, text.tuning, wanted)
    bar.update()
    jobs = {
        length: _jobs(plan, found, length) for length, found in zip(options.needles, samples, strict=True)
    }
    del samples
    grids: list[_Grid] = [_Grid() for _ in jobs[options.needles[0]]]
    for needle in hide(plan.tokenizer, text.sequences[0], options.needles, options.depths):
        bar.set_description(f"{NEEDLES}: {needle.length} tokens, depth {needle.depth:g}")
        answers = answer(
            model, subject, needle, [{}, *(job.rules for job in jobs[needle.length])], plan.first
        )
        dense, _ = next(answers)
        for grid, (ours, counts) in zip(grids, answers, strict=True):
            grid.parts.append(compared(needle, dense, ours))
            grid.counts.add(counts)
            grid.cells.append(
                {
                    "length": needle.length,
                    "depth": needle.depth,
                    "retrieved": ours.retrieved,
                    "retrieved_dense": dense.retrieved,
                    "exact": ours.exact(needle),
                    "exact_dense": dense.exact(needle),
                }
            )
        bar.update()
    for index, grid in enumerate(grids):
        tuned = {length: jobs[length][index].facts for length in options.needles}
        facts = tuned[options.needles[-1]]
        yield {
            "text": NEEDLES,
            "tuned_on": text.tuned_on,
            **facts,
            "parameter_by_length": {str(length): known["parameter"] for length, known in tuned.items()},
            **quality(joined(grid.parts), grid.counts),
            "retrieval": grid.rate("retrieved"),
            "retrieval_dense": grid.rate("retrieved_dense"),
            "exact": grid.rate("exact"),
            "exact_dense": grid.rate("exact_dense"),
            "cells": grid.cells,
        }


class _Grid:
    """What one rule did to the needles."""

    def __init__(self) -> None:
        self.parts: list[Any] = []
        self.counts = Counts()
        self.cells: list[dict[str, Any]] = []

    def rate(self, name: str) -> float:
        """Share of the cells in which something is true."""
        return sum(cell[name] for cell in self.cells) / len(self.cells)
