"""Runs one vLLM engine for ``topt-vllm bench engine``; started as a process of its own.

Reads a request as JSON from standard input: ``engine``, arguments of ``vllm.LLM``; ``batch``, ``context`` and
``tokens``; then either ``turns`` to time, or ``keeps``, shares of V rows to find thresholds for. Prints one line
``RESULT {...}``: with turns ``backend``, ``start_seconds``, ``prefill_seconds``, ``ms_per_step`` (one number a
turn) and ``totals``, what TOPTHETA counted in the turns (None without it); with shares ``thetas``, by layer and
share, and ``keys``, sums by layer.
"""

import json
import sys
import time
from typing import Any

from topt_vllm import large_pages
from topt_vllm.attention.common import choose_rows_per_state

_SEED = 1
# Steps, at most, whose queries thresholds are found for.
_STEPS = 8
_WARM_UP = 8  # tokens


def main() -> None:
    """Answers the request on standard input."""
    request = json.load(sys.stdin)
    if request["engine"].get("attention_backend") == "TOPTHETA":
        large_pages.ask()  # as a server's core has them; here it would be too late once vLLM is imported
    from vllm import LLM

    worker = "topt_vllm.benchmarks.engine_worker.BenchmarkedWorker"
    start = time.perf_counter()
    llm = LLM(worker_extension_cls=worker, **request["engine"])
    seconds = time.perf_counter() - start
    sizes = request["batch"], request["context"], request["tokens"]
    if "keeps" in request:
        thetas = find_thetas(llm, *sizes[1:], request["keeps"])
        result: dict[str, Any] = {"thetas": thetas, "keys": llm.collective_rpc("keys_seen")[0]}
    else:
        result = {"start_seconds": seconds, **measure(llm, *sizes, request["turns"])}
    print("RESULT " + json.dumps(result), flush=True)


def measure(llm: Any, batch: int, context: int, tokens: int, turns: int) -> dict[str, Any]:
    """Times answers of ``tokens`` tokens and of one, behind prompts that are cached: the rest is decode steps.

    Raises:
        RuntimeError: The prompts didn't stay in the cache.
    """
    prompts = random_prompts(llm, batch, context)
    prefill, _ = _answer(llm, prompts, 1)
    _answer(llm, prompts, min(tokens, _WARM_UP))
    before, times = _totals(llm), []
    for _ in range(turns):
        one, _ = _answer(llm, prompts, 1)
        many, cached = _answer(llm, prompts, tokens)
        # A block that is begun isn't shared, and the last token of a prompt is always computed.
        if cached < context - 2 * _block_size(llm):
            raise RuntimeError(
                f"only {cached} of {context} tokens of a prompt were cached, so prefill would be timed "
                "too; the engine's cache is too small"
            )
        times.append(1e3 * (many - one) / (tokens - 1))
    after = _totals(llm)
    return {
        "backend": "+".join(llm.collective_rpc("attention_backends")[0]),
        "prefill_seconds": prefill,
        "ms_per_step": times,
        "totals": None
        if before is None or after is None
        else {name: after[name] - before.get(name, 0.0) for name in after},
    }


def find_thetas(llm: Any, context: int, tokens: int, keeps: list[float]) -> dict[int, Any]:
    """Thresholds that read shares of the V rows of the first prompt's next steps."""
    llm.collective_rpc("watch_attention")
    steps = min(_STEPS, tokens - 1)
    _answer(llm, random_prompts(llm, 1, context), 1 + steps)
    # The rows behind the last V sum are read whatever their score.
    rows = choose_rows_per_state(_block_size(llm))
    behind = [(context + step - 1) % rows + 1 for step in range(1, tokens)]
    forced = round(sum(behind) / len(behind))
    return llm.collective_rpc("thetas_found", args=(context, steps, keeps, forced))[0]


def random_prompts(llm: Any, batch: int, context: int) -> list[list[int]]:
    """Token ids that every engine of a benchmark gets alike."""
    import torch

    generator = torch.Generator().manual_seed(_SEED)
    vocabulary = llm.llm_engine.model_config.get_vocab_size()
    return torch.randint(3, vocabulary, (batch, context), generator=generator).tolist()


def _answer(llm: Any, prompts: list[list[int]], tokens: int) -> tuple[float, int]:
    """Seconds that greedy answers to all prompts at once take, and the fewest cached tokens of a prompt."""
    from vllm import SamplingParams

    sampling = SamplingParams(temperature=0.0, max_tokens=tokens, ignore_eos=True, detokenize=False)
    given = [{"prompt_token_ids": ids} for ids in prompts]
    start = time.perf_counter()
    outputs = llm.generate(given, sampling, use_tqdm=False)
    seconds = time.perf_counter() - start
    return seconds, min(output.num_cached_tokens or 0 for output in outputs)


def _totals(llm: Any) -> dict[str, float] | None:
    return llm.collective_rpc("toptheta_totals")[0]


def _block_size(llm: Any) -> int:
    return llm.llm_engine.vllm_config.cache_config.block_size


if __name__ == "__main__":
    main()
