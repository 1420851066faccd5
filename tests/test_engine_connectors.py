"""V sums from another engine: one stores, a cold one in another process loads and goes on from there."""

import random
import shutil
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from scenario_runs import run, sparse_rows, toptheta
from table_factory import save_flat_table
from tiny_models import SMALL, save_model
from transformers import LlamaConfig

pytestmark = pytest.mark.engine

# As vLLM's CPU attention has it; the connector stores whole blocks.
BLOCK = 128
LENGTHS = (2 * BLOCK + 40, 3 * BLOCK + 30)
LAYERS = SMALL["num_hidden_layers"]
# Beyond every score, so that the mean of V stands in for all but the last rows.
SKIPS_ALL = 1000.0


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A tiny model with its table in its folder."""
    config = LlamaConfig(**SMALL | {"head_dim": 32, "architectures": ["LlamaForCausalLM"]})
    folder = save_model(tmp_path_factory.mktemp("tiny"), config)
    save_flat_table(config, folder / "toptheta.yaml", SKIPS_ALL)
    return folder


@pytest.fixture(scope="module")
def written(model: Path, tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, dict[str, Any]]:
    """What an engine stored, and its answers."""
    store = tmp_path_factory.mktemp("store")
    return store, answers(model, store)


def answers(model: Path, store: Path) -> dict[str, Any]:
    """Of an engine of its own, with a store."""
    # Few tokens, so that the mean of V is far from zero.
    letters = random.Random(0)
    prompts = [letters.choices(range(0, 250, 40), k=length) for length in LENGTHS]
    transfer = {
        "kv_connector": "ExampleConnector",
        "kv_role": "kv_both",
        "kv_connector_extra_config": {"shared_storage_path": str(store)},
    }
    engine = {
        "max_model_len": 1024,
        # The connector stores what the first step of a prompt has written.
        "max_num_batched_tokens": 1024,
        "kv_cache_memory_bytes": 1 << 26,
        "kv_transfer_config": transfer,
    }
    scenarios = {"batch": {"run": "batch", "prompts": prompts, "max_tokens": 8}}
    found: dict[str, Any] = run(model, toptheta(), engine, scenarios)["batch"]
    counted = found["toptheta"]
    assert sparse_rows(counted, allowed=[]) == LAYERS * len(prompts) * 7
    assert counted["toptheta:v_rows_read_total"] < 0.5 * counted["toptheta:v_rows_total"]
    return found


def sums_in(store: Path) -> list[Path]:
    return list(store.rglob("*value_sums.safetensors"))


def loaded_tokens(found: dict[str, Any]) -> float:
    hits: float = found["vllm"]["vllm:external_prefix_cache_hits"]
    return hits


def test_an_engine_goes_on_from_the_sums_of_another(model: Path, written: Any, tmp_path: Path):
    store, first = written
    assert loaded_tokens(first) == 0
    assert len(sums_in(store)) == LAYERS * len(LENGTHS)
    found = answers(model, shutil.copytree(store, tmp_path / "copy"))
    assert loaded_tokens(found) == sum(length // BLOCK * BLOCK for length in LENGTHS)
    assert found["tokens"] == first["tokens"]
    torch.testing.assert_close(torch.tensor(found["logits"]), torch.tensor(first["logits"]))


def test_sums_that_did_not_arrive_would_show(model: Path, written: Any, tmp_path: Path):
    """The same with zeros in their place: what the other test compares depends on them."""
    store, first = written
    lost = shutil.copytree(store, tmp_path / "lost")
    for path in sums_in(lost):
        save_file({name: torch.zeros_like(part) for name, part in load_file(path).items()}, path)
    found = answers(model, lost)
    assert loaded_tokens(found) == sum(length // BLOCK * BLOCK for length in LENGTHS)
    difference = torch.tensor(found["logits"]) - torch.tensor(first["logits"])
    assert difference.abs().amax() > 0.1
