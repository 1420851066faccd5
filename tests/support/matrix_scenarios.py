"""What an engine does in the feature tests, and on which prompts: one engine does all of it, in turn."""

from pathlib import Path
from typing import Any

from scenario_runs import Scenarios, run, tokens_of

BLOCK = 128
CHUNK = 256
MAX_TOKENS = 16
# Of SmolLM2's cache; one of them is vLLM's own.
BLOCKS = 44
SHARED = 32 * BLOCK
ENGINE = {
    "max_model_len": 36 * BLOCK,
    "max_num_batched_tokens": CHUNK,
    "kv_cache_memory_bytes": 1 << 30,
    "enable_prefix_caching": True,
    "structured_outputs_config": {"backend": "xgrammar", "disable_any_whitespace": True},
}
SCHEMA = {
    "type": "object",
    "properties": {
        "hero": {"enum": ["Romeo", "Hamlet", "Mercutio"]},
        "act": {"type": "integer", "minimum": 1, "maximum": 5},
    },
    "required": ["hero", "act"],
    "additionalProperties": False,
}


def ragged(ids: list[int]) -> list[list[int]]:
    """Prompts of mixed lengths."""
    return [ids[:1], ids[10:40], ids[5000:5700], ids[5700:6700]]


def batch(*prompts: list[int], **options: Any) -> dict[str, Any]:
    """The scenario of requests that arrive together."""
    return {"run": "batch", "prompts": prompts, "max_tokens": MAX_TOKENS, **options}


def first_features(ids: list[int], shared: int) -> Scenarios:
    """What both models run; of the prefix, ``shared`` tokens are cached."""
    prefix = ids[:shared]
    return {
        "continuous_batching": batch(*ragged(ids)),
        "chunked_prefill": {
            "run": "prefill_beside",
            "decoding": ids[5700:6700] + ids[100:120],
            "prefilled": ids[6900:7900],
            "max_tokens": MAX_TOKENS,
        },
        "prefix_first": batch(prefix + ids[4100:4130], cold=True),
        "prefix_caching": batch(prefix + ids[4200:4230]),
        "prefix_cold": batch(prefix + ids[4200:4230], cold=True),
    }


def features_behind_the_prefix(ids: list[int]) -> Scenarios:
    """Features that decode behind the cached prefix, which spares them its prefill."""
    prefix = ids[:SHARED]
    behind = [prefix + ids[start : start + 40] for start in (4300, 4400, 4500)]
    # Each of these needs another block four tokens on, and one is left for all of them.
    tight = [prefix + ids[start : start + 2 * BLOCK - 4] for start in range(5000, 7500, 500)]
    return {
        "abort": {
            "run": "aborted",
            "prompts": behind,
            "max_tokens": MAX_TOKENS,
            "arriving": ids[7300:7900],
        },
        "not_aborted": batch(*behind[1:]),
        "parallel_sampling": batch(behind[0], n=3, temperature=0.8, seed=7),
        # vLLM resubmits each beam as a prompt, so only the first token of a block is a decode row.
        "beam_search": {"run": "beams", "prompt": ids[: SHARED - 3], "width": 2, "max_tokens": 6},
        "structured_output": {"run": "structured", "prompt": behind[1], "schema": SCHEMA, "max_tokens": 24},
        "preemption": batch(*tight),
        "not_preempted": batch(tight[-1]),
    }


def smollm2_run(model: Path, text: Path, backend: dict[str, Any]) -> dict[str, Any]:
    """All features on SmolLM2."""
    ids = tokens_of(model, text)
    scenarios = first_features(ids, SHARED) | features_behind_the_prefix(ids)
    return run(model, backend, ENGINE | {"num_gpu_blocks_override": BLOCKS}, scenarios)


def gemma3_run(model: Path, text: Path, backend: dict[str, Any]) -> dict[str, Any]:
    """The first features on Gemma 3, most of whose layers have a window of 512 tokens."""
    return run(model, backend, ENGINE, first_features(tokens_of(model, text), 8 * BLOCK))
