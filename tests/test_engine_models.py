"""Adapters, drafts and models without decoding, through TOPTHETA: as stock at θ = −inf, sparse with a table."""

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from engine_runs import assert_same_tokens
from matrix_scenarios import batch
from safetensors.torch import save_file
from scenario_runs import DENSE, SPARSE, STOCK, run, sparse_rows, tokens_of
from tiny_models import byte_tokenizer
from transformers import BertConfig, BertModel, set_seed

pytestmark = pytest.mark.engine

SMALL = {"max_model_len": 1152, "max_num_batched_tokens": 256, "kv_cache_memory_bytes": 1 << 28}


def speculative_run(model: Path, text: Path, backend: dict[str, Any]) -> dict[str, Any]:
    """Drafts looked up in the prompt."""
    ids = tokens_of(model, text)
    drafts = {
        "method": "ngram",
        "num_speculative_tokens": 4,
        "prompt_lookup_max": 4,
        "prompt_lookup_min": 2,
    }
    scenarios = {"drafted": batch(ids[5000:5700], ids[5700:6700])}
    return run(model, backend, SMALL | {"speculative_config": drafts}, scenarios)


def test_ngram_drafts_are_accepted_as_by_stock(smollm2: Path, unseen_play: Path):
    stock, ours = (speculative_run(smollm2, unseen_play, backend) for backend in (STOCK, DENSE))
    assert_same_tokens(ours["drafted"]["tokens"], stock["drafted"], stock["dtype"])
    for kind in ("drafts", "draft_tokens", "accepted_tokens"):
        name = f"vllm:spec_decode_num_{kind}"
        assert ours["drafted"]["vllm"][name] == stock["drafted"]["vllm"][name] > 0


def test_ngram_drafts_are_sparse_rows(smollm2: Path, unseen_play: Path):
    outcome = speculative_run(smollm2, unseen_play, SPARSE)["drafted"]
    counted = outcome["toptheta"]
    drafted = outcome["vllm"]["vllm:spec_decode_num_draft_tokens"]
    layers = 30
    assert outcome["vllm"]["vllm:spec_decode_num_accepted_tokens"] > 0
    assert sparse_rows(counted, allowed=[]) >= layers * drafted > 0
    assert 0 < counted["toptheta:v_rows_read_total"] < 0.6 * counted["toptheta:v_rows_total"]


@pytest.fixture(scope="module")
def adapter(smollm2: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A LoRA adapter with random weights that moves queries, keys and values of every layer."""
    folder = tmp_path_factory.mktemp("adapter")
    rank, hidden = 8, 576
    rows = {"q_proj": 576, "k_proj": 192, "v_proj": 192}
    settings = {"peft_type": "LORA", "r": rank, "lora_alpha": rank, "target_modules": list(rows)}
    (folder / "adapter_config.json").write_text(json.dumps(settings))
    torch.manual_seed(0)
    weights = {}
    for layer in range(30):
        for name, size in rows.items():
            prefix = f"base_model.model.model.layers.{layer}.self_attn.{name}"
            weights[f"{prefix}.lora_A.weight"] = torch.randn(rank, hidden) / hidden**0.5
            weights[f"{prefix}.lora_B.weight"] = torch.randn(size, rank) / 10
    save_file(weights, folder / "adapter_model.safetensors")
    return folder


def lora_run(model: Path, text: Path, adapter: Path, backend: dict[str, Any]) -> dict[str, Any]:
    """The same prompts without and with the adapter."""
    ids = tokens_of(model, text)
    prompts = [ids[10:40], ids[5000:5700]]
    scenarios = {"plain": batch(*prompts), "adapted": batch(*prompts, lora=str(adapter))}
    return run(model, backend, SMALL | {"enable_lora": True, "max_lora_rank": 8}, scenarios)


@pytest.mark.parametrize("scenario", ["plain", "adapted"])
def test_lora_gives_stock_tokens(smollm2: Path, unseen_play: Path, adapter: Path, scenario: str):
    stock, ours = (lora_run(smollm2, unseen_play, adapter, backend) for backend in (STOCK, DENSE))
    assert_same_tokens(ours[scenario]["tokens"], stock[scenario], stock["dtype"])
    assert ours["adapted"]["tokens"] != ours["plain"]["tokens"]


def test_lora_stays_sparse(smollm2: Path, unseen_play: Path, adapter: Path):
    outcome = lora_run(smollm2, unseen_play, adapter, SPARSE)
    assert outcome["adapted"]["tokens"] != outcome["plain"]["tokens"]
    counted = outcome["adapted"]["toptheta"]
    assert sparse_rows(counted, allowed=["short_context"]) > 0
    assert 0 < counted["toptheta:v_rows_read_total"] < counted["toptheta:v_rows_total"]


def pooling_run(
    model: Path, prompts: list[list[int]], backend: dict[str, Any], length: int
) -> dict[str, Any]:
    """Vectors of prompts."""
    scenarios = {"vectors": {"run": "embeddings", "prompts": prompts}}
    return run(model, backend, SMALL | {"runner": "pooling", "max_model_len": length}, scenarios)["vectors"]


def test_embeddings_are_those_of_stock(smollm2: Path, unseen_play: Path):
    """Prompts are prefilled, which no table makes sparse."""
    ids = tokens_of(smollm2, unseen_play)
    # The first one's last chunk is a single token.
    prompts = [ids[3000 : 3001 + SMALL["max_num_batched_tokens"]], ids[10:40], ids[5000:5700], ids[5700:6700]]
    stock, ours = (pooling_run(smollm2, prompts, chosen, 1152) for chosen in (STOCK, SPARSE))
    assert stock["toptheta"] is None
    assert ours["toptheta"]["toptheta:decode_rows_total"] == 0
    torch.testing.assert_close(torch.tensor(ours["vectors"]), torch.tensor(stock["vectors"]))


@pytest.fixture(scope="module")
def bert(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """An encoder with random weights."""
    folder = tmp_path_factory.mktemp("bert")
    set_seed(0)
    config = BertConfig(
        hidden_size=64,
        intermediate_size=64,
        num_hidden_layers=2,
        num_attention_heads=2,
        vocab_size=257,
        max_position_embeddings=256,
    )
    BertModel(config).save_pretrained(folder)
    byte_tokenizer().save_pretrained(folder)
    return folder


def test_encoder_layers_stay_with_vllm(bert: Path):
    prompts = [[256, *range(50)], [256, *range(60, 200)]]
    stock, ours = (pooling_run(bert, prompts, backend, 256) for backend in (STOCK, DENSE))
    assert not (ours["toptheta"] or {}).get("toptheta:decode_rows_total")
    vectors = torch.tensor(ours["vectors"])
    torch.testing.assert_close(vectors, torch.tensor(stock["vectors"]))
    assert not torch.allclose(vectors[0], vectors[1])
