"""Long generation: what a rule makes of dense attention's text, and dense attention of the rule's.

All texts are sampled at temperature 1 with the same noise at the same position, so that they part only where a
rule's probabilities do.
"""

import math
from collections.abc import Iterator
from functools import partial
from typing import Any

import torch
from tqdm import tqdm

from topt_vllm.evaluation.jobs import Job
from topt_vllm.evaluation.plan import Plan, Text
from topt_vllm.evaluation.records import by_position, known, quality, standard_error
from topt_vllm.replay.dense_pass import DensePass
from topt_vllm.replay.generation import generate
from topt_vllm.replay.predictions import Predictions
from topt_vllm.replay.whole_pass import dense_pass

GENERATED = "generated"
_progress = partial(tqdm, desc="tokens", unit="token", leave=False)


def evaluate_generated(
    model: Any, plan: Plan, text: Text, jobs: dict[int, list[Job]], bar: Any
) -> Iterator[dict[str, Any]]:
    """Records of generated text: for each length, rule and target one."""
    count = plan.options.generate
    for length in plan.generated:
        tokens = text.sequences[0][: length - count]
        contexts = torch.arange(length - count, length)
        prompt = dense_pass(model, plan.subject, tokens[:-1])
        write = partial(generate, prompt, tokens[-1], count, sampled)
        bar.set_description(f"{GENERATED}, {length}: dense")
        own = write(steps=_progress)
        inputs, predictions = _rated(prompt, tokens[-1], own)
        for job in jobs[length]:
            bar.set_description(f"{GENERATED}, {length}: {job.facts['rule']}")
            given, free = job.attention(plan, contexts), job.attention(plan, contexts)
            with torch.inference_mode():
                compared = predictions.compare(prompt.decode(inputs, prompt.length, given))
            written = write(attention=free, steps=_progress)
            _, its = _rated(prompt, tokens[-1], written)
            bar.update()
            yield {
                "text": GENERATED,
                "calibrated": text.calibrated,
                "context": length,
                **job.facts,
                **quality(job.facts["rule"], compared, given.counts),
                "first_context": length - count,
                "by_position": by_position(compared, contexts),
                "free_perplexity": round(math.exp(its.dense_nll), 6),
                "free_perplexity_dense": round(math.exp(predictions.dense_nll), 6),
                "free_loss_pct_se": known(_error(its.dense_losses, predictions.dense_losses)),
                "free_v_rows_read": round(free.counts.shares()["v_rows_read"], 6),
                "tokens_until_difference": _alike(own, written),
            }
        del prompt, write, predictions  # their K and V go before the next ones' are made


def sampled(step: int, log_probabilities: torch.Tensor) -> int:
    """A token drawn from log probabilities [vocabulary], with Gumbel noise that the step alone decides."""
    source = torch.Generator().manual_seed(step)
    noise = -torch.empty(len(log_probabilities)).exponential_(generator=source).log()
    return int((log_probabilities + noise.to(log_probabilities.device)).argmax())


def _rated(prompt: DensePass, token: int, written: list[int]) -> tuple[torch.Tensor, Predictions]:
    """A text as dense attention has it: rows behind the prompt's last token, int64 [1, R], and predictions."""
    tokens = torch.tensor([token, *written], device=prompt.model.device)
    inputs = tokens[None, :-1]
    with torch.inference_mode():
        hidden = prompt.decode(inputs, prompt.length)
        return inputs, Predictions(prompt.model, inputs, tokens[1:], hidden)


def _error(its: torch.Tensor, own: torch.Tensor) -> float:
    """Standard error of the ratio of two texts' perplexities, percent, as if the texts were independent."""
    return 100 * math.exp(its.mean() - own.mean()) * math.hypot(standard_error(its), standard_error(own))


def _alike(own: list[int], written: list[int]) -> int:
    """Tokens before the first that differs."""
    return next((i for i, (a, b) in enumerate(zip(own, written, strict=True)) if a != b), len(own))
