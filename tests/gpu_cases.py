"""Sizes, batches, thresholds and the engine configuration of the GPU adapter's tests."""

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import pytest
import torch
from device import DEVICE
from table_factory import make_table
from transformers import LlamaConfig
from vllm.config import set_current_vllm_config
from vllm.engine.arg_utils import EngineArgs
from vllm.platforms import current_platform
from vllm.plugins import load_general_plugins

from topt_vllm.attention.common import Thetas
from topt_vllm.backend.gpu.flash_attn import FlashTopThetaBackend
from topt_vllm.backend.gpu.triton_attn import TritonTopThetaBackend
from topt_vllm.table.file import dump
from topt_vllm.table.identity import identify

NUM_HEADS, NUM_KV_HEADS, HEAD_DIM, BLOCK_SIZE, NUM_BLOCKS = 4, 2, 32, 16, 40
SCALE = HEAD_DIM**-0.5
MAX_SEQUENCES = 8
FP8 = current_platform.fp8_dtype()


@dataclass
class BatchSpec:
    """One step: context length (this step's tokens included) and query length of every request."""

    name: str
    seq_lens: list[int]
    query_lens: list[int]

    def __str__(self) -> str:
        return self.name


BACKENDS = [FlashTopThetaBackend, TritonTopThetaBackend]
DECODE = BatchSpec("ragged_decode", [1, 16, 17, 60], [1, 1, 1, 1])
BATCHES = [
    DECODE,
    BatchSpec("prefill_only", [33, 7], [33, 7]),
    BatchSpec("mixed", [32, 63, 20], [1, 1, 20]),
    BatchSpec("mixed_chunked_prefill", [50, 48], [1, 30]),
]
# Keeps about half of the keys: scores of random queries and keys are around 0 ± 1.
THETAS = Thetas(
    torch.tensor([8, 1024], dtype=torch.int32),
    torch.zeros(NUM_HEADS, 2),
    torch.zeros(NUM_HEADS, 2),
).to(DEVICE)
# bf16 output, and values around 1: a few units of 2^-8.
CLOSE = {"atol": 2e-2, "rtol": 2e-2}


def as_on_gpu(vllm_config: Any, monkeypatch: pytest.MonkeyPatch, **settings: Any) -> None:
    """Has the engine run on a GPU with these settings of ``toptheta``, by default with ``implementation: auto``."""
    monkeypatch.setattr(vllm_config.device_config, "device_type", "cuda")
    monkeypatch.setitem(vllm_config.additional_config, "toptheta", settings)


@pytest.fixture(scope="module")
def vllm_config(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Any]:
    """A tiny model with a table whose first layer is dense, for engines of up to eight sequences."""
    folder = tmp_path_factory.mktemp("tiny-llama")
    model = LlamaConfig(
        hidden_size=NUM_HEADS * HEAD_DIM,
        num_attention_heads=NUM_HEADS,
        num_key_value_heads=NUM_KV_HEADS,
        num_hidden_layers=3,
        intermediate_size=64,
        vocab_size=64,
        max_position_embeddings=4096,
        architectures=["LlamaForCausalLM"],
    )
    model.save_pretrained(folder)
    dump(make_table(identify(model, "tiny"), lengths=[32, 64]), folder / "toptheta.yaml")
    load_general_plugins()
    config = EngineArgs(
        model=str(folder),
        skip_tokenizer_init=True,
        dtype="bfloat16",
        max_num_seqs=MAX_SEQUENCES,
        additional_config={"toptheta": {"implementation": "triton"}},
    ).create_engine_config()
    with set_current_vllm_config(config):
        yield config
