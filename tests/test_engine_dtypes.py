"""Real vLLM engines in other dtypes than bfloat16, of the model or the cache: stock's tokens, and skipping.

fp8 caches are compared with a float32 model. The writer cuts digits off, so where two engines round K differently,
a code is the next one now and then. With bfloat16 that moves logits by more than their rounding, and between vLLM's
own kernels too.
"""

from dataclasses import asdict
from functools import cache
from pathlib import Path
from typing import Any

import engine_forks
import pytest
from engine_runs import assert_same_tokens, once

from topt_vllm.verify import engine as engines

pytestmark = pytest.mark.engine


@cache
def prompts(model: Path, text: Path) -> list[list[int]]:
    """Token ids of a short and of two longer prompts, beyond the shipped table's first length."""
    from transformers import AutoTokenizer

    ids = AutoTokenizer.from_pretrained(model)(text.read_text(), truncation=True, max_length=3000)[
        "input_ids"
    ]
    return [ids[10:40], ids[1000:1700], ids[1700:2300]]


def run_engine(
    model: Path, text: Path, dtype: str, cache_dtype: str, settings: dict[str, Any] | None
) -> dict[str, Any]:
    """Outcome of one engine (see engine_main.py); CPU_ATTN without settings."""
    arguments = {
        "model": str(model),
        "dtype": dtype,
        "kv_cache_dtype": cache_dtype,
        "max_model_len": 1024,
        "kv_cache_memory_bytes": 1 << 28,
        "logprobs_mode": "raw_logits",
        "attention_backend": "CPU_ATTN" if settings is None else "TOPTHETA",
        "additional_config": {} if settings is None else {"toptheta": settings},
        "enforce_eager": True,
        "seed": 0,
    }
    request = engines.Request(arguments, prompts(model, text), max_tokens=12, separate_core=False)
    return once(asdict(request), lambda: engine_forks.run(request, timeout=600))


@pytest.mark.parametrize(
    ("dtype", "cache_dtype"),
    # float32 with a cache of its own is what test_engine_matrix.py runs.
    [("float16", "auto"), ("float32", "fp8_e4m3"), ("float32", "fp8_e5m2")],
)
def test_theta_minus_infinity_gives_stock_tokens(
    smollm2: Path, unseen_play: Path, dtype: str, cache_dtype: str
):
    stock = run_engine(smollm2, unseen_play, dtype, cache_dtype, None)
    ours = run_engine(smollm2, unseen_play, dtype, cache_dtype, {"thresholds": "none"})
    assert ours["dtype"] == stock["dtype"] == dtype
    assert_same_tokens(ours["tokens"], stock, dtype)
    assert ours["totals"]["toptheta:v_rows_read_total"] == ours["totals"]["toptheta:v_rows_total"] > 0


def test_the_shipped_table_skips_rows_of_an_fp8_cache(smollm2: Path, unseen_play: Path):
    totals = run_engine(smollm2, unseen_play, "bfloat16", "fp8", {"budget": 64})["totals"]
    # Layers 0 and 2 of 30 are dense, and so is the short prompt.
    assert 0.05 < totals["toptheta:v_rows_read_total"] / totals["toptheta:v_rows_total"] < 0.5
    assert totals["toptheta:dropped_mass_sum"] > 0
