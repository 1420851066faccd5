"""The Triton kernels inside a real vLLM engine on the CPU, through Triton's interpreter."""

from pathlib import Path
from typing import Any

import engine_forks
import pytest
from device import interpreter_only
from engine_runs import assert_same_tokens
from test_engine import tokenizer

from topt_vllm.table.file import dump, load
from topt_vllm.verify import engine as engines

pytestmark = [pytest.mark.engine, interpreter_only]
MAX_TOKENS = 3
SHIPPED = Path(__file__).parent.parent / "configs" / "SmolLM2-135M-Instruct.yaml"


@pytest.fixture(scope="module")
def short_table(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The shipped thresholds, said to be those of contexts so short that the interpreter gets through them."""
    table = load(SHIPPED).model_copy(update={"lengths": [16, 32, 64, 128, 256]})
    path = tmp_path_factory.mktemp("tables") / "short.yaml"
    dump(table, path)
    return path


def run_engine(model: Path, prompts: list[list[int]], table: Path, implementation: str) -> dict[str, Any]:
    """Outcome of one engine; see engine_main.py."""
    settings = {"thresholds": str(table), "budget": 64, "implementation": implementation}
    engine = {
        "model": str(model),
        "dtype": "bfloat16",
        "max_model_len": 256,
        "block_size": 32,
        # The interpreter copies the memory that a tensor is part of onto itself at each launch.
        "kv_cache_memory_bytes": 32 << 20,
        "attention_backend": "TOPTHETA",
        "additional_config": {"toptheta": settings},
        "enforce_eager": True,
        "seed": 0,
        "logprobs_mode": "raw_logits",
    }
    return engine_forks.run(engines.Request(engine, prompts, MAX_TOKENS, separate_core=False), timeout=600)


def test_triton_gives_the_tokens_of_the_cpu_kernel(smollm2: Path, unseen_play: Path, short_table: Path):
    ids = tokenizer(smollm2)(unseen_play.read_text(), truncation=True, max_length=2000)["input_ids"]
    prompts = [ids[1000:1150], ids[1500:1570]]
    cpu = run_engine(smollm2, prompts, short_table, "cpu")
    triton = run_engine(smollm2, prompts, short_table, "triton")
    assert_same_tokens(triton["tokens"], cpu, cpu["dtype"])
    ours, theirs = triton["totals"], cpu["totals"]
    assert ours["toptheta:decode_rows_total"] == theirs["toptheta:decode_rows_total"] > 0
    assert ours["toptheta:v_rows_read_total"] < 0.7 * ours["toptheta:v_rows_total"]
    # The same rows but for rounding: of scores near θ, and of what the layers below passed on.
    assert ours["toptheta:v_rows_read_total"] == pytest.approx(theirs["toptheta:v_rows_read_total"], rel=0.01)
    assert ours["toptheta:dropped_mass_sum"] == pytest.approx(theirs["toptheta:dropped_mass_sum"], rel=0.02)
