"""Real vLLM engines in other dtypes than bfloat16, of the model or the cache: stock's tokens, and skipping.

fp8 caches are compared with a float32 model. The writer cuts digits off, so where two engines round K differently,
a code is the next one now and then. With bfloat16 that moves logits by more than their rounding, and between vLLM's
own kernels too.
"""

from pathlib import Path
from typing import Any

import pytest
from cpu_features import needs_fp8_caches
from engine_runs import assert_same_tokens
from matrix_scenarios import batch
from scenario_runs import DENSE, STOCK, run, tokens_of, toptheta

pytestmark = pytest.mark.engine

ENGINE = {"max_model_len": 1024, "kv_cache_memory_bytes": 1 << 28}


def answered(
    model: Path, text: Path, dtype: str, cache_dtype: str, backend: dict[str, Any]
) -> dict[str, Any]:
    """What one engine answers to a short and to two longer prompts, beyond the shipped table's first length."""
    ids = tokens_of(model, text)
    together = batch(ids[10:40], ids[1000:1700], ids[1700:2300], max_tokens=12)
    engine = ENGINE | {"dtype": dtype, "kv_cache_dtype": cache_dtype}
    found = run(model, backend, engine, {"together": together})
    return found["together"] | {"dtype": found["dtype"]}


@pytest.mark.parametrize(
    ("dtype", "cache_dtype"),
    # float32 with a cache of its own is what test_engine_matrix.py runs.
    [
        ("float16", "auto"),
        pytest.param("float32", "fp8_e4m3", marks=needs_fp8_caches),
        pytest.param("float32", "fp8_e5m2", marks=needs_fp8_caches),
    ],
)
def test_theta_minus_infinity_gives_stock_tokens(
    smollm2: Path, unseen_play: Path, dtype: str, cache_dtype: str
):
    stock = answered(smollm2, unseen_play, dtype, cache_dtype, STOCK)
    ours = answered(smollm2, unseen_play, dtype, cache_dtype, DENSE)
    assert ours["dtype"] == stock["dtype"] == dtype
    assert_same_tokens(ours["tokens"], stock, dtype)
    assert ours["toptheta"]["toptheta:v_rows_read_total"] == ours["toptheta"]["toptheta:v_rows_total"] > 0


@needs_fp8_caches
def test_the_shipped_table_skips_rows_of_an_fp8_cache(smollm2: Path, unseen_play: Path):
    totals = answered(smollm2, unseen_play, "bfloat16", "fp8", toptheta(budget=64))["toptheta"]
    # Layers 0 and 2 of 30 are dense, and so is the short prompt.
    assert 0.05 < totals["toptheta:v_rows_read_total"] / totals["toptheta:v_rows_total"] < 0.5
    assert totals["toptheta:dropped_mass_sum"] > 0
