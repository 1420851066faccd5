"""What TOPTHETA is on CPUs alone: K screens, and other kernels on vLLM's CPU cache."""

import logging
from typing import Any

import pytest
import torch
from device import interpreter_only

pytest.importorskip("vllm")

from adapter_cases import (
    BLOCK_SIZE,
    CPU,
    HEAD_DIM,
    NUM_KV_HEADS,
    STATE_ROWS,
    BatchSpec,
    Table,
    vllm_config,
)
from adapter_engine import make_rig
from vllm.v1.kv_cache_interface import KVCacheLayout

from topt_vllm.attention.common import Stat

pytestmark = pytest.mark.skipif(CPU.backend is None, reason="vLLM's build here has no CPU kernels")

__all__ = ["make_rig", "vllm_config"]


def test_a_screen_of_an_fp8_cache_is_refused(make_rig: Any):
    with pytest.raises(ValueError, match="k_screen is 'int8' and the cache 'fp8'"):
        make_rig(CPU, kv_cache_dtype="fp8", settings={"k_screen": "int8"})


@pytest.mark.slow
@interpreter_only
def test_the_triton_kernel_reads_the_cpu_cache(make_rig: Any):
    """It takes strides, so under Triton's interpreter it can take the place of the CPU kernel."""
    outputs = []
    for name in ("cpu", "triton"):
        torch.manual_seed(6)
        rig = make_rig(CPU, Table(theta=0.0), settings={"implementation": name})
        batch = BatchSpec("mixed", [300, 140, 20], [1, 1, 20])
        rig.write_contexts(batch)
        outputs.append(rig.step(batch).output.float())
        assert 0.3 < rig.statistics()[Stat.V_ROWS_READ] / rig.statistics()[Stat.V_ROWS] < 0.95
    torch.testing.assert_close(outputs[1], outputs[0], atol=2e-2, rtol=2e-2)


def test_a_key_screen_lies_beside_the_cache_and_keeps_the_same_rows(make_rig: Any):
    """The same steps with and without the 8-bit copy: same counts, and K of dropped keys is not read."""
    outcomes = []
    for screen in ("off", "int8"):
        torch.manual_seed(5)
        rig = make_rig(CPU, Table(theta=2.0), settings={"k_screen": screen})
        batch = BatchSpec("decode", [420, 300], [1, 1])
        rig.write_contexts(batch)
        outcomes.append((rig.step(batch).output.float(), rig.statistics()))
        assert (
            (rig.states().key_screen is None) == (rig.bound().cache.key_screen is None) == (screen == "off")
        )
    (plain, counted), (screened, counted_screened) = outcomes
    exact = [Stat.ROWS, Stat.ELEMENTS, Stat.KEPT_ELEMENTS, Stat.V_ROWS, Stat.V_ROWS_READ]
    assert counted[exact].tolist() == counted_screened[exact].tolist()
    assert counted_screened[Stat.K_ROWS_READ] < counted[Stat.K_ROWS_READ] == counted[Stat.V_ROWS]
    torch.testing.assert_close(screened, plain, atol=2e-2, rtol=2e-2)


def test_a_key_screen_does_without_value_sums(make_rig: Any):
    rig = make_rig(CPU, Table(theta=2.0), settings={"k_screen": "int8", "compensation": "none"})
    assert rig.states().value_sums is None
    batch = BatchSpec("decode", [420, 300], [1, 1])
    rig.write_contexts(batch)
    rig.step(batch)
    assert rig.bound().cache.value_sums is None
    assert rig.statistics()[Stat.K_ROWS_READ] < rig.statistics()[Stat.V_ROWS]


def test_what_a_screen_costs_is_in_vllm_s_budget_and_in_the_log(
    make_rig: Any, caplog: pytest.LogCaptureFixture, monkeypatch: pytest.MonkeyPatch
):
    monkeypatch.setattr(logging.getLogger("vllm"), "propagate", True)
    content = NUM_KV_HEADS * BLOCK_SIZE * 2 * HEAD_DIM * 2
    sums = NUM_KV_HEADS * BLOCK_SIZE // STATE_ROWS * HEAD_DIM * 4
    blocks = {}
    for screen in ("off", "int8"):
        with caplog.at_level(logging.INFO):
            rig = make_rig(CPU, settings={"k_screen": screen})
        blocks[screen] = block = rig.plan.kv_cache_tensors[0].size // rig.plan.num_blocks
        shares = f"V sums {sums / block:.1%}"
        if screen == "int8":
            codes = rig.states().key_screen.codes()
            assert codes.shape[:2] == (rig.plan.num_blocks, NUM_KV_HEADS)
            assert codes.dtype == torch.uint8
            assert (
                codes[0].numel() <= block - content - sums < codes[0].numel() + NUM_KV_HEADS * BLOCK_SIZE * 2
            )
            shares += f", copies of K {(block - content - sums) / block:.1%}"
        assert f"TOPTHETA: of the layers' cache: {shares}\n" in caplog.text
    assert blocks["off"] == content + sums
    assert 1.2 * content < blocks["int8"] - sums < 1.35 * content


def test_vllm_s_cpu_kernels_take_the_layout_that_packs_a_block_s_layers():
    """Its own backend offers the other one alone, with which no model with windows could keep sums."""
    assert CPU.backend.supported_kv_cache_layouts() == (KVCacheLayout.LBHNC, KVCacheLayout.BLHNC)
