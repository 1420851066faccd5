"""Runs one vLLM engine on given prompts and prints the outcome; started as a process of its own.

Reads a :class:`~topt_vllm.verify.engine.Request` as JSON from standard input. Prints one line ``RESULT {...}``:
``tokens``, ``texts`` and ``logits`` (the two highest per step) of every prompt; ``dtype``; ``totals``, the worker's
counters (None without TOPTHETA); with a forced text ``decoded`` and ``prefilled``, its tokens' log-probabilities
by decoding them and by prefilling them.
"""

import json
import sys
from collections.abc import Callable
from typing import Any

from topt_vllm.verify.forcing import forcing_of


def main() -> None:
    """Answers the request on standard input."""
    from vllm import LLM

    request = json.load(sys.stdin)
    engine = request["engine"]
    forcing = forcing_of(engine) if request["forced"] else None
    engine |= forcing.engine if forcing else {}
    llm = LLM(worker_extension_cls="topt_vllm.engines.counters.WorkerCounters", **engine)
    result: dict[str, Any] = {"dtype": str(llm.llm_engine.model_config.dtype).removeprefix("torch.")}
    if request["prompts"]:
        result |= answers(llm, request["prompts"], request["max_tokens"])
    if forcing:
        result["decoded"] = decoded(llm, forcing.sampling, **request["forced"])
    result["totals"] = llm.collective_rpc("toptheta_totals")[0]
    if forcing:
        result["prefilled"] = prefilled(llm, **request["forced"])
    print("RESULT " + json.dumps(result), flush=True)


def answers(llm: Any, prompts: list[list[int]], max_tokens: int) -> dict[str, Any]:
    """Greedy answers to all prompts in one batch."""
    sampling = {"max_tokens": max_tokens, "logprobs": 2, "ignore_eos": True}
    outputs = _generate(llm, prompts, [sampling] * len(prompts))
    return describe([output.outputs[0] for output in outputs])


def describe(completions: list[Any]) -> dict[str, Any]:
    """What is compared of answers that were asked for with two log-probabilities a step."""
    return {
        "tokens": [list(completion.token_ids) for completion in completions],
        "texts": [completion.text for completion in completions],
        "logits": [
            [
                sorted((entry.logprob for entry in step.values()), reverse=True)[:2]
                for step in completion.logprobs
            ]
            for completion in completions
        ],
    }


def decoded(
    llm: Any, force: Callable[[list[int]], dict[str, Any]], tokens: list[int], first: int, rows: int
) -> list[float]:
    """Log-probability of each token from ``first`` on, by decoding it after those before it.

    Args:
        llm: The engine, made with what ``force`` needs.
        force: As ``sampling`` of :class:`~topt_vllm.verify.forcing.Forcing`.
        tokens: As of :class:`~topt_vllm.verify.engine.Forced`, like ``first`` and ``rows``.
        first: The first token that is decoded.
        rows: Tokens that one request decodes.

    Raises:
        RuntimeError: The engine decoded other tokens.
    """
    starts = range(first, len(tokens), rows)
    parts = [tokens[start : start + rows] for start in starts]
    alike = {"logprobs": 0, "ignore_eos": True, "detokenize": False}
    sampling = [{"max_tokens": len(part), **alike, **force(part)} for part in parts]
    outputs = _generate(llm, [tokens[:start] for start in starts], sampling)
    found: list[float] = []
    for part, output in zip(parts, outputs, strict=True):
        completion = output.outputs[0]
        if list(completion.token_ids) != part:
            raise RuntimeError("the engine decoded other tokens than those of the text")
        found += [step[token].logprob for step, token in zip(completion.logprobs, part, strict=True)]
    return found


def prefilled(llm: Any, tokens: list[int], first: int, rows: int) -> list[float]:
    """The same by prefilling the whole text, which vLLM's own kernel does."""
    sampling = {"max_tokens": 1, "prompt_logprobs": 0, "detokenize": False}
    steps = _generate(llm, [tokens], [sampling])[0].prompt_logprobs[first:]
    return [step[token].logprob for step, token in zip(steps, tokens[first:], strict=True)]


def _generate(llm: Any, prompts: list[list[int]], sampling: list[dict[str, Any]]) -> list[Any]:
    """vLLM's outputs to prompts in one batch, each with the most likely tokens and arguments of its own."""
    from vllm import SamplingParams

    given = [{"prompt_token_ids": ids} for ids in prompts]
    return llm.generate(given, [SamplingParams(temperature=0.0, **each) for each in sampling], use_tqdm=False)


if __name__ == "__main__":
    main()
