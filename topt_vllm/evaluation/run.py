"""An evaluation run: rules tuned to their targets, then every text, needles, tasks and generated text under each.

Everything is decoded behind a dense prompt, as a server does; see :mod:`topt_vllm.replay.replay`.
"""

from collections.abc import Iterator
from dataclasses import dataclass, field
from typing import Any

import torch
from tqdm import tqdm

from topt_vllm.evaluation.case_run import evaluate_needles, evaluate_tasks
from topt_vllm.evaluation.generation import evaluate_generated
from topt_vllm.evaluation.jobs import Job, count_jobs, jobs_by_length
from topt_vllm.evaluation.plan import Plan, Text
from topt_vllm.evaluation.records import by_head, by_position, quality, spread
from topt_vllm.replay.attention import Counts, RuleAttention
from topt_vllm.replay.memory import explained
from topt_vllm.replay.model import load_causal_lm
from topt_vllm.replay.options import ReplayError
from topt_vllm.replay.predictions import Comparison, joined
from topt_vllm.replay.replay import Replay, replayed_rows
from topt_vllm.replay.whole_pass import dense_pass


@dataclass
class _Found:
    """What one job did to the sequences of a text at one length."""

    parts: list[Comparison] = field(default_factory=list)
    contexts: list[torch.Tensor] = field(default_factory=list)
    counts: Counts = field(default_factory=Counts)
    kept_over_k: dict[int, list[torch.Tensor]] = field(default_factory=dict)

    def add(self, compared: Comparison, contexts: torch.Tensor, attention: RuleAttention) -> None:
        self.parts.append(compared)
        self.contexts.append(contexts)
        self.counts.add(attention.counts)
        for layer, ratios in attention.kept_over_k.items():
            self.kept_over_k.setdefault(layer, []).extend(ratios)

    def record(self, rule: str) -> dict[str, Any]:
        whole, contexts = joined(self.parts), torch.cat(self.contexts)
        record = quality(rule, whole, self.counts)
        if self.kept_over_k:
            layers = [torch.cat(parts, dim=1) for parts in self.kept_over_k.values()]
            record["kept_over_k"] = spread(torch.cat([ratios.flatten() for ratios in layers]))
            record["heads_kept_over_k"] = by_head(layers)
        return {**record, "first_context": int(contexts.min()), "by_position": by_position(whole, contexts)}


def evaluate(plan: Plan) -> Iterator[dict[str, Any]]:
    """Runs the plan, shows its progress on stderr, and gives each record as soon as it is known.

    Raises:
        ReplayError: The weights can't be loaded, the model isn't one that can be evaluated, or memory runs out.
    """
    with explained(plan.max_seq_length, ReplayError):
        yield from _records(plan)


def _records(plan: Plan) -> Iterator[dict[str, Any]]:
    options = plan.options
    model = load_causal_lm(options.model, options.device, options.dtype, options.trust_remote_code)
    runs = len(plan.texts) * options.num_samples * len(plan.lengths) + len(plan.generated)
    runs += len(plan.needles) + sum(map(len, plan.tasks.values()))
    with tqdm(total=runs * count_jobs(plan), unit="run", smoothing=0.1) as bar:
        for index, text in enumerate(plan.texts):
            # Needles, tasks and generation take the first text and share its tuning pass.
            more: set[int] = set()
            if index == 0:
                more = {*options.needles, *(length for _, length in plan.tasks), *plan.generated}
            bar.set_description(f"{text.name}: tuning on {text.tuned_on}" if options.rows else text.name)
            jobs = jobs_by_length(model, plan, text, sorted({*plan.lengths, *more}))
            if plan.lengths:
                yield from _text(model, plan, text, jobs, bar)
            if index == 0:
                if plan.needles:
                    yield from evaluate_needles(model, plan, text, jobs, bar)
                yield from evaluate_tasks(model, plan, text, jobs, bar)
                yield from evaluate_generated(model, plan, text, jobs, bar)


def _text(
    model: Any, plan: Plan, text: Text, jobs: dict[int, list[Job]], bar: Any
) -> Iterator[dict[str, Any]]:
    found = {length: [_Found() for _ in jobs[length]] for length in plan.lengths}
    spans = tuple(replayed_rows(length, plan.count(length)) for length in plan.lengths)
    longest = max(plan.lengths)
    for number, tokens in enumerate(text.sequences, 1):
        bar.set_description(f"{text.name}: dense")
        dense = dense_pass(model, plan.subject, tokens[: longest - 1], spans)
        for length in plan.lengths:
            replay = Replay(model, plan.subject, tokens[:length], plan.count(length), dense)
            contexts = replay.rows + 1
            for job, into in zip(jobs[length], found[length], strict=True):
                bar.set_description(f"{text.name}, {length}: {job.facts['rule']}")
                attention = job.attention(plan, contexts)
                into.add(replay.compare(attention), contexts, attention)
                bar.update()
                if number == len(text.sequences):
                    yield {
                        "text": text.name,
                        "context": length,
                        "calibrated": text.calibrated,
                        **job.facts,
                        **into.record(job.facts["rule"]),
                        "decode_rows": plan.count(length),
                        "max_seq_length": longest,
                    }
        del dense, replay  # their K and V go before the next ones' are made
