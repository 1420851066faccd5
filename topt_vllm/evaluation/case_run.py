"""Needles and tasks under every rule: dense prompts, behind which each rule decodes only questions and answers."""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from typing import Any

from topt_vllm.evaluation.cases import Case, answer, batches
from topt_vllm.evaluation.jobs import Job
from topt_vllm.evaluation.plan import Plan, Text
from topt_vllm.evaluation.records import quality
from topt_vllm.evaluation.task_records import scores
from topt_vllm.replay.attention import Counts
from topt_vllm.replay.dense_pass import DensePass
from topt_vllm.replay.predictions import Comparison, compared, joined
from topt_vllm.replay.whole_pass import dense_pass

NEEDLES = "needles"


@dataclass
class _Found:
    """What one job did to the cases."""

    parts: list[Comparison] = field(default_factory=list)
    counts: Counts = field(default_factory=Counts)
    answers: list[dict[str, Any]] = field(default_factory=list)

    def rate(self, name: str) -> float:
        """Share of the cases in which something is true."""
        return sum(found[name] for found in self.answers) / len(self.answers)

    def record(self, facts: dict[str, Any]) -> dict[str, Any]:
        """What is said about the job, and what it lost and read."""
        return facts | quality(facts["rule"], joined(self.parts), self.counts)


def evaluate_needles(
    model: Any, plan: Plan, text: Text, jobs: dict[int, list[Job]], bar: Any
) -> Iterator[dict[str, Any]]:
    """Records of the needles: for each rule and target one over the whole grid."""
    lengths = plan.options.needles
    for index, found in enumerate(_run(NEEDLES, model, plan, plan.needles, jobs, bar)):
        tuned = {length: jobs[length][index].facts for length in lengths}
        yield {
            "text": NEEDLES,
            "calibrated": text.calibrated,
            "context": lengths[-1],
            "parameter_by_length": {str(length): known["parameter"] for length, known in tuned.items()},
            **found.record(tuned[lengths[-1]]),
            "retrieval": found.rate("retrieved"),
            "retrieval_dense": found.rate("retrieved_dense"),
            "exact": found.rate("exact"),
            "exact_dense": found.rate("exact_dense"),
            "cells": [
                {"length": needle.length, "depth": needle.depth, **answer}
                for needle, answer in zip(plan.needles, found.answers, strict=True)
            ],
        }


def evaluate_tasks(
    model: Any, plan: Plan, text: Text, jobs: dict[int, list[Job]], bar: Any
) -> Iterator[dict[str, Any]]:
    """Records of the tasks: one for each of them, its lengths, and each rule and target."""
    for (task, length), cases in plan.tasks.items():
        results = _run(task, model, plan, cases, jobs, bar)
        for job, found in zip(jobs[length], results, strict=True):
            yield {
                "text": task,
                "calibrated": text.calibrated,
                "task": task,
                "context": length,
                **found.record(job.facts),
                **scores(found.answers),
                "answers": found.answers,
            }


def _run(
    name: str, model: Any, plan: Plan, cases: Sequence[Case], jobs: dict[int, list[Job]], bar: Any
) -> list[_Found]:
    """What each job did to the cases."""
    results = [_Found() for _ in jobs[cases[0].length]]
    prompt: DensePass | None = None
    prompted: list[int] = []
    for batch in batches(cases):
        first = batch[0]
        bar.set_description(f"{name}: {first.length} tokens")
        if prompt is None or first.prompt is not prompted:
            prompt = None  # its K and V go before the next one's are made
            prompt, prompted = dense_pass(model, plan.subject, first.prompt), first.prompt
        dense = answer(prompt, batch, None, None)
        contexts = first.contexts.repeat(len(batch))
        for found, job in zip(results, jobs[first.length], strict=True):
            counted = job.attention(plan, contexts)
            ours = answer(prompt, batch, counted, job.attention(plan, contexts))
            found.counts.add(counted.counts)
            for case, mine, whole in zip(batch, ours, dense, strict=True):
                found.parts.append(compared(whole.log_probabilities, mine.log_probabilities, case.right))
                found.answers.append(
                    {
                        f"{measure}{suffix}": value
                        for suffix, answered in (("", mine), ("_dense", whole))
                        for measure, value in (
                            ("retrieved", answered.retrieved),
                            ("exact", answered.exact(case)),
                            ("margin", round(answered.margin, 4)),
                        )
                    }
                )
            bar.update(len(batch))
    return results
