"""The model drafts for itself: sparse rows propose, dense rows verify, and the tokens are those of stock."""

from pathlib import Path
from typing import Any

import pytest
from engine_runs import assert_same_tokens
from matrix_scenarios import batch
from scenario_runs import SPARSE, STOCK, run, tokens_of

from topt_vllm.backend.compat import DRAFTER

pytestmark = pytest.mark.engine

DRAFTS = {"method": "custom_class", "model": DRAFTER, "num_speculative_tokens": 4}
# Blocks of 64 and chunks of a prompt; requests end at different places, and come near the longest context.
ENGINE = {"max_model_len": 1152, "max_num_batched_tokens": 256, "kv_cache_memory_bytes": 1 << 28}


def drafted_run(model: Path, text: Path, arguments: dict[str, Any], dtype: str) -> dict[str, Any]:
    ids = tokens_of(model, text)
    prompts = [ids[5000:5700], ids[5700:6763], ids[10:40], ids[3000:3600], ids[4000:4500]]
    scenarios = {
        "together": batch(*prompts, max_tokens=80),
        # Their prefix is in the cache, from dense rows. Several, for in bfloat16 a near tie soon ends an answer.
        "again": batch(
            *(prompts[0] + ids[start : start + 10] for start in range(5700, 5860, 20)), max_tokens=12
        ),
    }
    return run(model, arguments, ENGINE | {"dtype": dtype}, scenarios)


def assert_only_drafts_are_sparse(counted: dict[str, float], rows: float, unused: float) -> None:
    """Whatever the model itself decodes is dense; what is drafted behind a request's end is verified by nobody."""
    short = counted.pop("dense_rows:short_context", 0)
    dense = {name: found for name, found in counted.items() if name.startswith("dense_rows:") and found}
    assert set(dense) == {"dense_rows:verifies_drafts"}
    assert rows <= counted["toptheta:decode_rows_total"] - sum(dense.values()) <= rows + unused
    assert short < rows


# In bfloat16 the rows that verify take AMX where the CPU has it, for there are more query vectors than in any other
# engine of the suite.
@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_drafts_give_stock_s_tokens_and_most_are_accepted(smollm2: Path, unseen_play: Path, dtype: str):
    stock = drafted_run(smollm2, unseen_play, STOCK, dtype)
    ours = drafted_run(smollm2, unseen_play, SPARSE | {"speculative_config": DRAFTS}, dtype)
    for scenario in ("together", "again"):
        mine = ours[scenario]
        assert_same_tokens(mine["tokens"], stock[scenario], stock["dtype"])
        counted = mine["vllm"]
        drafted = counted["vllm:spec_decode_num_draft_tokens"]
        assert 0.6 * drafted < counted["vllm:spec_decode_num_accepted_tokens"] <= drafted
        assert_only_drafts_are_sparse(mine["toptheta"], 30 * drafted, 30 * 4 * len(mine["tokens"]))
