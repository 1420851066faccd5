"""Needles under every rule: dense prompts, behind which each rule decodes only question and answer."""

from collections.abc import Iterator
from dataclasses import dataclass, field
from typing import Any

from topt_vllm.evaluation.jobs import Job
from topt_vllm.evaluation.needles import answer
from topt_vllm.evaluation.options import OURS
from topt_vllm.evaluation.plan import Plan, Text
from topt_vllm.evaluation.records import key_reads, quality
from topt_vllm.replay.attention import Counts
from topt_vllm.replay.predictions import Comparison, compared, joined
from topt_vllm.replay.whole_pass import dense_pass

NEEDLES = "needles"


@dataclass
class _Grid:
    """What one job did to the needles."""

    parts: list[Comparison] = field(default_factory=list)
    counts: Counts = field(default_factory=Counts)
    cells: list[dict[str, Any]] = field(default_factory=list)

    def rate(self, name: str) -> float:
        """Share of the cells in which something is true."""
        return sum(cell[name] for cell in self.cells) / len(self.cells)


def evaluate_needles(
    model: Any, plan: Plan, text: Text, jobs: dict[int, list[Job]], bar: Any
) -> Iterator[dict[str, Any]]:
    """Records of the needles: for each rule and target one over the whole grid."""
    options = plan.options
    grids = [_Grid() for _ in jobs[options.needles[0]]]
    prompted: list[int] = []
    for needle in plan.needles:
        bar.set_description(f"{NEEDLES}: {needle.length} tokens, depth {needle.depth:g}")
        if needle.prompt is not prompted:
            prompt, prompted = dense_pass(model, plan.subject, needle.prompt), needle.prompt
        dense = answer(prompt, needle, None, None)
        for grid, job in zip(grids, jobs[needle.length], strict=True):
            counted = job.attention(plan, needle.contexts)
            ours = answer(prompt, needle, counted, job.attention(plan, needle.contexts))
            grid.parts.append(compared(dense.log_probabilities, ours.log_probabilities, needle.right))
            grid.counts.add(counted.counts)
            cell: dict[str, Any] = {"length": needle.length, "depth": needle.depth}
            for suffix, found in (("", ours), ("_dense", dense)):
                cell |= {
                    f"retrieved{suffix}": found.retrieved,
                    f"exact{suffix}": found.exact(needle),
                    f"margin{suffix}": round(found.margin, 4),
                }
            grid.cells.append(cell)
            bar.update()
    for index, grid in enumerate(grids):
        tuned = {length: jobs[length][index].facts for length in options.needles}
        facts = tuned[options.needles[-1]]
        yield {
            "text": NEEDLES,
            "context": options.needles[-1],
            "tuned_on": text.tuned_on,
            **facts,
            "parameter_by_length": {str(length): known["parameter"] for length, known in tuned.items()},
            **quality(joined(grid.parts), grid.counts),
            **(key_reads(grid.counts) if facts["rule"] in OURS else {}),
            "retrieval": grid.rate("retrieved"),
            "retrieval_dense": grid.rate("retrieved_dense"),
            "exact": grid.rate("exact"),
            "exact_dense": grid.rate("exact_dense"),
            "cells": grid.cells,
        }
