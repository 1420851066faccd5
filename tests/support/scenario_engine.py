"""Leads one vLLM engine through scenarios and prints what came of each; forked by scenario_runs.py.

Reads ``{"environment": {...}, "engine": {...}, "scenarios": {name: {"run": function, ...}}}`` as JSON; engine:
arguments of ``vllm.LLM``; a scenario: the name and arguments of a function below.
Prints ``RESULT {...}``: ``dtype``, and by name what the function returned with what was counted meanwhile:
``toptheta``, the workers' counters (None without TOPTHETA), and ``vllm``, the engine's own.
"""

import json
import os
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import psutil
import torch

from topt_vllm.verify.engine_main import describe

Counts = dict[str, float]


def main() -> None:
    """Answers the request on standard input."""
    request = json.load(sys.stdin)
    os.environ |= request["environment"]
    from vllm import LLM

    counters = "topt_vllm.engines.counters.WorkerCounters"
    llm = LLM(worker_extension_cls=counters, disable_log_stats=False, seed=0, **request["engine"])
    result: dict[str, Any] = {"dtype": str(llm.llm_engine.model_config.dtype).removeprefix("torch.")}
    for name, arguments in request["scenarios"].items():
        scenario: Callable[..., dict[str, Any]] = globals()[arguments.pop("run")]
        before, before_vllm = toptheta(llm), vllm(llm)
        outcome = scenario(llm, **arguments)
        counted = {"toptheta": since(before, toptheta(llm)), "vllm": since(before_vllm, vllm(llm))}
        result[name] = counted | outcome
    print("RESULT " + json.dumps(result), flush=True)


def toptheta(llm: Any) -> Counts | None:
    """The plugin's counters, summed over the workers."""
    ranks = llm.collective_rpc("toptheta_totals")
    if None in ranks:
        return None
    return {
        name: sum(rank.get(name, 0.0) for rank in ranks) for name in {key for rank in ranks for key in rank}
    }


def vllm(llm: Any) -> Counts:
    """The engine's own counters."""
    return {metric.name: metric.value for metric in llm.get_metrics() if type(metric).__name__ == "Counter"}


def since(before: Counts | None, now: Counts | None) -> Counts | None:
    """What was added."""
    if now is None:
        return None
    return {name: value - (before or {}).get(name, 0.0) for name, value in now.items()}


def sampling(max_tokens: int, **options: Any) -> Any:
    """Greedy, unless the options say otherwise."""
    from vllm import SamplingParams

    settings = {"temperature": 0.0, "max_tokens": max_tokens, "logprobs": 2, "ignore_eos": True}
    return SamplingParams(**settings | options)


def batch(
    llm: Any,
    prompts: list[list[int]],
    max_tokens: int,
    lora: str | None = None,
    cold: bool = False,
    **options: Any,
) -> dict[str, Any]:
    """Answers to prompts that arrive together; ``cold`` forgets cached prefixes before."""
    from vllm.lora.request import LoRARequest

    if cold and not llm.reset_prefix_cache():
        raise RuntimeError("the prefix cache was not reset")
    outputs = llm.generate(
        [{"prompt_token_ids": ids} for ids in prompts],
        sampling(max_tokens, **options),
        use_tqdm=False,
        lora_request=LoRARequest("adapter", 1, lora) if lora else None,
    )
    return describe([completion for output in outputs for completion in output.outputs])


def prefill_beside(llm: Any, decoding: list[int], prefilled: list[int], max_tokens: int) -> dict[str, Any]:
    """A request decodes while another is prefilled in chunks; ``mixed`` is what was counted meanwhile."""
    requests = Requests(llm)
    requests.add(decoding, max_tokens)
    requests.step_until(lambda: requests.decoded(0) >= 2)
    start, rows = toptheta(llm), requests.decoded(0)
    requests.add(prefilled, max_tokens)
    requests.step_until(lambda: requests.decoded(1) >= 1)
    mixed = {"steps": requests.decoded(0) - rows, "toptheta": since(start, toptheta(llm))}
    requests.step_until(lambda: not llm.llm_engine.has_unfinished_requests())
    return requests.answers() | {"mixed": mixed}


def aborted(llm: Any, prompts: list[list[int]], max_tokens: int, arriving: list[int]) -> dict[str, Any]:
    """The first request is aborted after some tokens, and one that arrives then in the middle of its prefill."""
    requests = Requests(llm)
    for prompt in prompts:
        requests.add(prompt, max_tokens)
    requests.step_until(lambda: requests.decoded(0) >= 3)
    requests.add(arriving, max_tokens)
    llm.llm_engine.step()
    for number in (0, len(prompts)):
        requests.abort(number)
    requests.step_until(lambda: not llm.llm_engine.has_unfinished_requests())
    return requests.answers() | {"finished": requests.finished()}


def beams(llm: Any, prompt: list[int], width: int, max_tokens: int) -> dict[str, Any]:
    """Beam search."""
    from vllm.sampling_params import BeamSearchParams

    params = BeamSearchParams(beam_width=width, max_tokens=max_tokens, ignore_eos=True)
    found = llm.beam_search([{"prompt_token_ids": prompt}], params)[0].sequences
    return {"tokens": [beam.tokens[len(prompt) :] for beam in found]}


def structured(llm: Any, prompt: list[int], schema: dict[str, Any], max_tokens: int) -> dict[str, Any]:
    """An answer that a JSON schema constrains."""
    from vllm.sampling_params import StructuredOutputsParams

    constraint = StructuredOutputsParams(json=schema)
    return batch(llm, [prompt], max_tokens, structured_outputs=constraint, ignore_eos=False)


def embeddings(llm: Any, prompts: list[list[int]]) -> dict[str, Any]:
    """Vectors of a pooling model."""
    outputs = llm.embed([{"prompt_token_ids": ids} for ids in prompts], use_tqdm=False)
    return {"vectors": [output.outputs.embedding for output in outputs]}


def poison(llm: Any) -> dict[str, Any]:
    """Fills the cache's memory with bytes that are NaN as 16 and 32-bit numbers; nothing may have been cached."""
    for storage in cache_memory(llm):
        torch.empty(0, dtype=torch.uint8).set_(storage).fill_(0xFF)
    return {}


def cache_size(llm: Any) -> dict[str, Any]:
    """Slots of a block, by cache group, and bytes of a block of all groups together."""
    config = llm.llm_engine.engine_core.engine_core.scheduler.kv_cache_config
    size = sum(storage.nbytes() for storage in cache_memory(llm))
    slots = [group.kv_cache_spec.block_size for group in config.kv_cache_groups]
    return {"slots": slots, "bytes": size / config.num_blocks}


def cache_memory(llm: Any) -> list[Any]:
    """The storages of all cache layers; the engine's core must be in this process."""
    layers = llm.llm_engine.vllm_config.compilation_config.static_forward_context.values()
    caches = [cache for layer in layers for cache in flat(getattr(layer, "kv_cache", None))]
    return list(
        {storage.data_ptr(): storage for storage in map(torch.Tensor.untyped_storage, caches)}.values()
    )


def large_pages(llm: Any) -> dict[str, Any]:
    """Share of its largest piece of memory, the cache, that each worker has in large pages; by worker."""
    return {"shares": [share_of_large_pages(worker.pid) for worker in psutil.Process().children()]}


def share_of_large_pages(process: int) -> float:
    """Of the largest piece of memory that a process has."""
    sizes: list[tuple[int, int]] = []
    for line in Path(f"/proc/{process}/smaps").read_text().splitlines():
        name, *values = line.split()
        if name == "Rss:":
            resident = int(values[0])
        elif name == "AnonHugePages:":
            sizes.append((resident, int(values[0])))
    resident, large = max(sizes)
    return large / resident


def flat(cache: Any) -> list[Any]:
    """The tensors of an attention layer's cache, or of a state-space layer's."""
    return (
        [part for each in cache for part in flat(each)]
        if isinstance(cache, list | tuple)
        else ([cache] if isinstance(cache, torch.Tensor) and cache.numel() else [])
    )


class Requests:
    """Requests that arrive at steps of one's choice; numbered in the order of arrival."""

    def __init__(self, llm: Any) -> None:
        self._engine = llm.llm_engine
        self._names: list[str] = []
        self._outputs: dict[str, Any] = {}

    def add(self, prompt: list[int], max_tokens: int) -> None:
        """A request arrives."""
        name = f"{id(self)}-{len(self._names)}"
        self._names.append(name)
        self._engine.add_request(name, {"prompt_token_ids": prompt}, sampling(max_tokens))

    def abort(self, number: int) -> None:
        """A client leaves."""
        self._engine.abort_request([self._names[number]])

    def step_until(self, reached: Callable[[], bool]) -> None:
        """Lets the engine work."""
        while not reached():
            for output in self._engine.step():
                self._outputs[output.request_id] = output

    def decoded(self, number: int) -> int:
        """Tokens that a request has got."""
        output = self._outputs.get(self._names[number])
        return len(output.outputs[0].token_ids) if output else 0

    def finished(self) -> list[bool]:
        """Which requests came to their end."""
        return [name in self._outputs and self._outputs[name].finished for name in self._names]

    def answers(self) -> dict[str, Any]:
        """Of the requests that came to their end."""
        ends = zip(self._names, self.finished(), strict=True)
        return describe([self._outputs[name].outputs[0] for name, finished in ends if finished])
