"""Engines on a hybrid model, in a cache that is full of NaN: stock's tokens where all is kept, and skipping."""

import random
from pathlib import Path
from typing import Any

import pytest
from engine_runs import assert_same_tokens
from hybrid_model import FULL_LAYERS, config, save_hybrid
from scenario_runs import STOCK, Scenarios, run, sparse_rows, toptheta
from table_factory import save_flat_table

from topt_vllm.verify.near_ties import compare

pytestmark = pytest.mark.engine

# vLLM's: so large that a page of it holds a state of the other layers.
BLOCK = 384
MAX_TOKENS = 12
ENGINE = {
    # vLLM's CPU kernels of the other layers take nothing else.
    "dtype": "bfloat16",
    # As vLLM chooses where the CPU has AVX512-BF16: how large a block is depends on it.
    "mamba_ssm_cache_dtype": "float32",
    "max_model_len": 2048,
    "max_num_batched_tokens": 512,
    "enable_prefix_caching": True,
    # A dozen blocks.
    "kv_cache_memory_bytes": 5 << 20,
}
FEATURES = ["continuous_batching", "chunked_prefill", "prefix_caching", "preemption"]


def batch(*prompts: list[int], **options: Any) -> dict[str, Any]:
    return {"run": "batch", "prompts": prompts, "max_tokens": MAX_TOKENS, **options}


def scenarios() -> Scenarios:
    ids = random.Random(0).choices(range(256), k=6000)
    prefix = ids[: 2 * BLOCK + 100]
    # Each needs another block some tokens on, and there are none.
    tight = [ids[start : start + BLOCK - 4] for start in (3000, 3500, 4000)]
    return {
        "poison": {"run": "poison"},
        "cache_size": {"run": "cache_size"},
        "continuous_batching": batch(ids[:5], ids[10:700], ids[800:1900]),
        "chunked_prefill": {
            "run": "prefill_beside",
            "decoding": ids[2000:2100],
            "prefilled": ids[2200:3000],
            "max_tokens": MAX_TOKENS,
        },
        "prefix_first": batch(prefix, cold=True),
        "prefix_caching": batch(prefix + ids[5000:5030]),
        "prefix_cold": batch(prefix + ids[5000:5030], cold=True),
        "preemption": batch(*tight),
        "not_preempted": batch(tight[-1]),
    }


@pytest.fixture(scope="module")
def outcome(tmp_path_factory: pytest.TempPathFactory) -> Any:
    """What came of an engine that keeps every key, one that skips, or stock's."""
    folder = save_hybrid(tmp_path_factory.mktemp("hybrid"))
    thetas = {"keeps": -1e4, "skips": 0.5}
    tables: dict[str, Path] = {
        name: save_flat_table(config(), folder / f"{name}.yaml", theta) for name, theta in thetas.items()
    }

    def of(name: str) -> dict[str, Any]:
        backend = toptheta(thresholds=str(tables[name])) if name in tables else STOCK
        return run(folder, backend, ENGINE, scenarios())

    return of


@pytest.mark.parametrize("feature", FEATURES)
def test_a_table_that_keeps_all_gives_stock_tokens(outcome: Any, feature: str):
    """In blocks that were full of NaN, and that another kind of layer had before."""
    stock, ours = outcome("stock"), outcome("keeps")
    assert_same_tokens(ours[feature]["tokens"], stock[feature], stock["dtype"])
    counted = ours[feature]["toptheta"]
    assert sparse_rows(counted, allowed=["short_context"]) > 0
    assert counted["toptheta:v_rows_read_total"] == counted["toptheta:v_rows_total"]


def test_states_cost_their_share_of_the_cache(outcome: Any):
    stock, ours = outcome("stock")["cache_size"], outcome("keeps")["cache_size"]
    assert ours["slots"] == stock["slots"] == [BLOCK] * len(stock["slots"])
    assert stock["bytes"] < ours["bytes"] <= stock["bytes"] * (1 + 1 / 64)


@pytest.mark.parametrize("feature", FEATURES)
def test_a_table_skips(outcome: Any, feature: str):
    counted = outcome("skips")[feature]["toptheta"]
    rows = sparse_rows(counted, allowed=["short_context"])
    assert rows >= len(FULL_LAYERS) * (MAX_TOKENS - 1)
    assert 0.2 < counted["toptheta:v_rows_read_total"] / counted["toptheta:v_rows_total"] < 0.7


@pytest.mark.parametrize("engine", ["stock", "keeps", "skips"])
def test_what_was_cached_or_preempted_leaves_no_trace(outcome: Any, engine: str):
    found = outcome(engine)
    assert found["prefix_caching"]["vllm"]["vllm:prefix_cache_hits"] == 2 * BLOCK
    assert found["prefix_cold"]["vllm"]["vllm:prefix_cache_hits"] == 0
    assert found["preemption"]["vllm"]["vllm:num_preemptions"] > 0
    for first, second in (("prefix_caching", "prefix_cold"), ("preemption", "not_preempted")):
        mine, alone = found[first]["tokens"][-1:], found[second]
        assert not compare(mine, alone["tokens"], alone["logits"], found["dtype"]).wrong
