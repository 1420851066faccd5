"""Real vLLM engines with the Triton kernels, against the platform's own backend, on a tiny model that is made here.

On a GPU with CUDA graphs, as a server runs; elsewhere on the CPU, without graphs and in Triton's interpreter.
"""

import random
from dataclasses import asdict
from pathlib import Path
from typing import Any

import engine_forks
import pytest
from device import ON_GPU, gpu_only
from engine_runs import once
from table_factory import make_table
from tiny_models import SMALL, save_model
from transformers import LlamaConfig

from topt_vllm.table.file import dump
from topt_vllm.table.identity import identify
from topt_vllm.verify import engine as engines
from topt_vllm.verify import verdicts

pytestmark = [pytest.mark.gpu, pytest.mark.engine]

# The initial weights are such that scores are around 0 ± 2.5: neither all keys alike nor one for all.
SIZES = {"hidden_size": 128, "head_dim": 32, "initializer_range": 0.007}
PROMPT_LENGTHS = [1, 33, 100, 190]
MAX_TOKENS = 32 if ON_GPU else 4
# Of a layer: the one-token prompt is decoded too, and the last token is never fed back. A GPU's warm-up adds some.
DECODED_ROWS = len(PROMPT_LENGTHS) * (MAX_TOKENS - 1) + 1
NO_TABLE = {"thresholds": "none", "implementation": "triton"}


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Three layers with heads of a size that GPUs take."""
    config = LlamaConfig(**SMALL | SIZES, architectures=["LlamaForCausalLM"])
    return save_model(tmp_path_factory.mktemp("tiny"), config)


def run(model: Path, settings: dict[str, Any] | None) -> dict[str, Any]:
    """Outcome of an engine with these settings of TOPTHETA, or with what vLLM picks unasked; see engine_main.py."""
    arguments: dict[str, Any] = {
        "model": str(model),
        # Finer than the near ties below, so that rounding in three layers makes no difference that isn't one.
        "dtype": "float16",
        "max_model_len": 256,
        "block_size": 32,
        "max_num_seqs": 4,
        # Little, for the interpreter copies the memory that a tensor is part of at each launch.
        "kv_cache_memory_bytes": 8 << 20,
        # vLLM then only asks whether this share is free; other tests use the GPU too.
        "gpu_memory_utilization": 0.01,
        "enforce_eager": not ON_GPU,
        "logprobs_mode": "raw_logits",
        "seed": 0,
    }
    if settings is not None:
        arguments |= {"attention_backend": "TOPTHETA", "additional_config": {"toptheta": settings}}
    letters = random.Random(0)
    prompts = [[letters.randrange(97, 123) for _ in range(length)] for length in PROMPT_LENGTHS]
    request = engines.Request(arguments, prompts, MAX_TOKENS, separate_core=False)
    # A GPU's engines start as users' do.
    start = engines.run if ON_GPU else engine_forks.run
    return once(asdict(request), lambda: start(request, timeout=900))


def test_theta_minus_infinity_gives_the_platform_s_tokens(model: Path):
    """Up to its two best logits within two steps of bfloat16, and decoded by the operator in every layer."""
    stock, ours = run(model, None), run(model, NO_TABLE)
    verdicts.tokens(ours, stock | {"dtype": "bfloat16"})
    assert ours["totals"]["toptheta:decode_rows_total"] >= 3 * DECODED_ROWS


def test_rows_below_the_thresholds_of_a_table_are_skipped_and_counted(model: Path, tmp_path: Path):
    """Its first layer is dense, and so are contexts shorter than 32 tokens, as those of one prompt are."""
    config = LlamaConfig.from_pretrained(model)
    table = tmp_path / "table.yaml"
    dump(make_table(identify(config, "tiny"), lengths=[32, 256]), table)
    settings = {"thresholds": str(table)} | ({} if ON_GPU else {"implementation": "triton"})
    totals = run(model, settings)["totals"]
    assert totals["toptheta:decode_rows_total"] >= 3 * DECODED_ROWS
    dense = totals["dense_rows:dense_layer"]
    assert dense >= DECODED_ROWS
    assert totals.get("platform_rows:dense_layer", 0) == (dense if ON_GPU else 0)
    assert totals["dense_rows:short_context"] > 0
    assert 0.3 < totals["toptheta:v_rows_read_total"] / totals["toptheta:v_rows_total"] < 0.98
    assert 0 < totals["toptheta:dropped_mass_sum"] < totals["toptheta:dropped_mass_count"]


@gpu_only
def test_without_thresholds_the_platform_s_own_kernels_run(model: Path):
    """On GPUs ``auto`` leaves such models to what vLLM picks, so nothing at all may differ."""
    stock, ours = run(model, None), run(model, {"thresholds": "none"})
    assert ours["tokens"] == stock["tokens"]
    assert ours["logits"] == stock["logits"]
    totals = ours["totals"]
    assert totals["platform_rows:no_thresholds"] == totals["toptheta:decode_rows_total"] > 0
    assert totals["toptheta:v_rows_read_total"] == totals["toptheta:v_rows_total"] > 0
