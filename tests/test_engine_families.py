"""Engines on models whose layers differ in heads or kind, or have windows that no context outgrows: some skip rows.

scripts/serve_families.py compares the tokens of all families with stock's; docs/models.md has what came of it.
"""

import random
from pathlib import Path

import pytest
from model_families import FAMILIES, served_config
from scenario_runs import run, sparse_rows, toptheta
from table_factory import save_flat_table
from tiny_models import save_model

pytestmark = pytest.mark.engine

ENGINE = {"max_model_len": 1024, "max_num_batched_tokens": 512, "kv_cache_memory_bytes": 1 << 28}
DECODED = 7


@pytest.mark.slow
@pytest.mark.parametrize("name", ["gemma4, shared K and V", "phi-3", "granite hybrid"])
def test_layers_with_full_attention_skip_rows(tmp_path: Path, name: str):
    family, config = FAMILIES[name], served_config(name)
    # vLLM's CPU kernels of layers without attention take nothing else than bfloat16.
    engine = ENGINE | family.engine | ({"dtype": "bfloat16"} if family.free else {})
    model = save_model(tmp_path, config)
    backend = toptheta(thresholds=str(save_flat_table(config, tmp_path / "table.yaml", 1.0)))
    prompts = [random.Random(0).choices(range(256), k=length) for length in (300, 700)]
    asked = {"run": "batch", "prompts": prompts, "max_tokens": DECODED + 1}
    counted = run(model, backend, engine, {"sparse": asked})["sparse"]["toptheta"]
    windowed = config.num_hidden_layers - len(family.full) - len(family.free)
    assert counted.get("dense_rows:sliding_window", 0) == windowed * len(prompts) * DECODED
    assert sparse_rows(counted, allowed=["sliding_window"]) == len(family.full) * len(prompts) * DECODED
    assert counted["toptheta:v_rows_read_total"] < counted["toptheta:v_rows_total"]
