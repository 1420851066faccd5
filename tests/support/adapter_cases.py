"""Sizes, batches, hosts and threshold tables of the adapter's tests, and their engine configuration."""

from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
import torch
from device import DEVICE
from table_factory import make_key_statistics, make_table
from transformers import LlamaConfig
from vllm.config import set_current_vllm_config
from vllm.engine.arg_utils import EngineArgs
from vllm.platforms import current_platform
from vllm.plugins import load_general_plugins

from topt_vllm.backend.hosts.flash import FlashTopThetaBackend
from topt_vllm.backend.hosts.triton import TritonTopThetaBackend
from topt_vllm.table.file import dump
from topt_vllm.table.identity import ModelIdentity, identify
from topt_vllm.table.schema import LayerThresholds

# Blocks of no power of two, with three V sums each.
NUM_HEADS, NUM_KV_HEADS, HEAD_DIM, BLOCK_SIZE, STATE_ROWS, NUM_BLOCKS = 4, 2, 32, 96, 32, 124
SCALE = HEAD_DIM**-0.5
MAX_SEQUENCES, MAX_BLOCKS = 8, 5
# bf16 output, and values around 1: a few units of 2^-8.
CLOSE = {"atol": 2e-2, "rtol": 2e-2}
FP8 = current_platform.fp8_dtype()


@dataclass(frozen=True)
class Host:
    """A backend of vLLM that the adapter stands on.

    Attributes:
        name: As a test shows it.
        backend: TOPTHETA's class; None for the CPU's, which other builds of vLLM lack.
        device_type: What vLLM's configuration says.
        device: Of the tensors: the CPU's in Triton's interpreter.
    """

    name: str
    backend: Any
    device_type: str
    device: torch.device

    @property
    def on_gpus(self) -> bool:
        """Whether it is one of those on GPUs."""
        return self.device_type == "cuda"

    def __str__(self) -> str:
        return self.name


def _cpu_backend() -> Any:
    if not current_platform.is_cpu():
        return None
    from topt_vllm.backend.hosts.cpu import CpuTopThetaBackend

    return CpuTopThetaBackend


CPU = Host("cpu", _cpu_backend(), "cpu", torch.device("cpu"))
FLASH = Host("flash", FlashTopThetaBackend, "cuda", DEVICE)
TRITON = Host("triton", TritonTopThetaBackend, "cuda", DEVICE)
GPU_HOSTS = [FLASH, TRITON]

_CPU = pytest.param(
    CPU,
    marks=pytest.mark.skipif(CPU.backend is None, reason="vLLM's build here has no CPU kernels"),
    id="cpu",
)
# The first builds metadata only; in Triton's interpreter kernels take seconds.
EVERY_HOST = [_CPU, *(pytest.param(host, marks=pytest.mark.gpu, id=str(host)) for host in GPU_HOSTS)]
HOSTS = [
    _CPU,
    *(pytest.param(host, marks=[pytest.mark.gpu, pytest.mark.slow], id=str(host)) for host in GPU_HOSTS),
]


@dataclass(frozen=True)
class BatchSpec:
    """One step: context length (this step's tokens included) and query length of every request."""

    name: str
    seq_lens: list[int]
    query_lens: list[int]

    @property
    def earlier(self) -> list[int]:
        """Tokens of every request that earlier steps have written."""
        return [n - rows for n, rows in zip(self.seq_lens, self.query_lens, strict=True)]

    def __str__(self) -> str:
        return self.name


DECODE = BatchSpec("ragged_decode", [1, 96, 97, 300], [1, 1, 1, 1])
PROMPTS = BatchSpec("prefill_only", [130, 40], [130, 40])
MIXED = BatchSpec("mixed", [192, 351, 90], [1, 1, 90])
BATCHES = [
    BatchSpec("single_decode", [200], [1]),
    DECODE,
    PROMPTS,
    MIXED,
    BatchSpec("mixed_chunked_prefill", [400, 290], [1, 110]),
]
# What vLLM warms up with, and what ranks of data parallelism without a request step with.
NOBODYS = BatchSpec("nobodys", [1, 1], [1, 1])
CAPTURE = BatchSpec("capture", [1] * MAX_SEQUENCES, [1] * MAX_SEQUENCES)


@dataclass(frozen=True)
class Table:
    """A threshold table with one budget.

    Attributes:
        theta: θ at every length, of all query heads or of each; random scores are around 0 ± 1.
        shortest: First calibrated length: shorter contexts are dense.
        longest: Last one.
        dense_layers: Layers without thresholds.
        keys: Keys that a query head should keep, in all or of each.
        candidates: Share of keys that a K screen lets through, by layer; None where it wasn't measured.
    """

    theta: float | list[float] = 1.0
    shortest: int = 8
    longest: int = 1024
    dense_layers: tuple[int, ...] = ()
    keys: int | list[int] = 64
    candidates: list[float] | None = None

    def write(self, identity: ModelIdentity, path: Path) -> None:
        """Writes it as a table of the model."""
        theta = self.theta if isinstance(self.theta, list) else [self.theta] * NUM_HEADS
        keys = self.keys if isinstance(self.keys, list) else None
        layers = [
            LayerThresholds(layer=layer, law=[[t, 0.0] for t in theta], theta=[[t, t] for t in theta], k=keys)
            for layer in range(identity.num_layers)
        ]
        table = make_table(
            identity, lengths=[self.shortest, self.longest], dense_layers=self.dense_layers, ks=(64,)
        )
        budget = table.budgets[0]
        budget = budget.model_copy(
            update={
                "layers": layers,
                "quality": budget.quality.model_copy(update={"layer_candidates": self.candidates}),
                "k": None if keys else self.keys,
                "name": "by head" if keys else None,
            }
        )
        statistics = make_key_statistics(identity)
        dump(table.model_copy(update={"budgets": [budget], "key_statistics": statistics}), path, force=True)


@pytest.fixture(scope="module")
def vllm_config(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Any]:
    """An engine for a tiny model of three layers, and for up to eight sequences; the model's folder has a table."""
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
    Table(dense_layers=(0,)).write(identify(model, folder.name), folder / "toptheta.yaml")
    load_general_plugins()
    if current_platform.is_cpu():
        current_platform.import_kernels()
    config = EngineArgs(
        model=str(folder),
        skip_tokenizer_init=True,
        dtype="bfloat16",
        max_num_seqs=MAX_SEQUENCES,
        additional_config={"toptheta": {}},
    ).create_engine_config()
    with set_current_vllm_config(config):
        yield config


def as_on_gpu(vllm_config: Any, monkeypatch: pytest.MonkeyPatch, **settings: Any) -> None:
    """Has the engine run on a GPU with these settings of ``toptheta``."""
    monkeypatch.setattr(vllm_config.device_config, "device_type", "cuda")
    monkeypatch.setitem(vllm_config.additional_config, "toptheta", settings)
