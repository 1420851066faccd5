"""Engines on a tiny gpt-oss, with sinks in every layer: stock's tokens where all is kept, skipping by a table."""

import random
from pathlib import Path
from typing import Any

import pytest
import torch
from engine_runs import assert_same_tokens
from model_families import FAMILIES
from scenario_runs import DENSE, STOCK, run, sparse_rows, toptheta
from tiny_models import save_model, save_text
from transformers import AutoModelForCausalLM, GptOssConfig

from topt_vllm.cli.main import main

pytestmark = pytest.mark.engine

MAX_TOKENS, PROMPTS = 16, 3
ENGINE = {"max_model_len": 2048, "max_num_batched_tokens": 256, "kv_cache_memory_bytes": 1 << 26}


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """With a calibrated table, and heads of a size that vLLM's CPU kernels have."""
    folder = tmp_path_factory.mktemp("gpt-oss")
    sizes = FAMILIES["gpt-oss"].config.to_dict() | {
        "hidden_size": 64,
        "intermediate_size": 64,
        "head_dim": 64,
    }
    save_model(folder, GptOssConfig(**sizes | {"architectures": ["GptOssForCausalLM"]}))
    raise_sinks(folder)
    text = save_text(folder / "text.txt", 2600)
    asked = ["--num-samples", "1", "--max-seq-length", "1024", "--k", "32", "--dense-layers"]
    assert main(["calibrate", "--model", str(folder), "--dataset", str(text), "--device", "cpu", *asked]) == 0
    return folder


def raise_sinks(folder: Path) -> None:
    """Scores of 0 ± 1 over hundreds of keys, beside which sinks of 7 take about half of the probability."""
    model = AutoModelForCausalLM.from_pretrained(folder)
    with torch.no_grad():
        for layer in model.model.layers:
            layer.self_attn.q_proj.weight.div_(10)
            layer.self_attn.sinks.normal_(mean=7)
    model.save_pretrained(folder)


def answers(model: Path, backend: dict[str, Any]) -> dict[str, Any]:
    """To prompts that are prefilled in chunks beside others that decode."""
    ids = random.Random(0).choices([ord(letter) for letter in "abcdefgh "], k=2000)
    prompts = [ids[:40], ids[100:700], ids[800:1900]]
    assert len(prompts) == PROMPTS
    scenario = {"run": "batch", "prompts": prompts, "max_tokens": MAX_TOKENS}
    return run(model, backend, ENGINE, {"answers": scenario})


def test_stock_tokens_where_every_row_is_kept(model: Path):
    stock, ours = answers(model, STOCK), answers(model, DENSE)
    assert_same_tokens(ours["answers"]["tokens"], stock["answers"], stock["dtype"])
    counted = ours["answers"]["toptheta"]
    assert counted["toptheta:v_rows_read_total"] == counted["toptheta:v_rows_total"]


def test_a_calibrated_table_skips_rows_of_the_layers_without_a_window(model: Path):
    counted = answers(model, toptheta(budget=32))["answers"]["toptheta"]
    rows = sparse_rows(counted, allowed=["short_context", "sliding_window"])
    # Of one layer of two; the short prompt's context is below the table's first length.
    assert rows == (PROMPTS - 1) * (MAX_TOKENS - 1)
    assert counted["dense_rows:sliding_window"] == PROMPTS * (MAX_TOKENS - 1)
    assert 0.02 < counted["toptheta:v_rows_read_total"] / counted["toptheta:v_rows_total"] < 0.5
