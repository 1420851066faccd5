"""What TOPTHETA is on CPUs alone: K screens, and other kernels on vLLM's CPU cache."""

from typing import Any

import pytest
import torch
from device import interpreter_only

pytest.importorskip("vllm")

from adapter_cases import (
    CPU,
    BatchSpec,
    Table,
    vllm_config,
)
from adapter_engine import make_rig
from vllm.v1.kv_cache_interface import KVCacheLayout

from topt_vllm.attention.common import Stat

pytestmark = pytest.mark.skipif(CPU.backend is None, reason="vLLM's build here has no CPU kernels")

__all__ = ["make_rig", "vllm_config"]


def test_a_screen_as_large_as_k_is_refused(make_rig: Any):
    with pytest.raises(ValueError, match=r"k_screen is 'int4\+4' and the cache 'fp8'"):
        make_rig(CPU, kv_cache_dtype="fp8", settings={"k_screen": "int4+4"})
    make_rig(CPU, kv_cache_dtype="fp8", settings={"k_screen": "int4", "implementation": "reference"})


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


def test_vllm_s_cpu_kernels_take_the_layout_that_packs_a_block_s_layers():
    """Its own backend offers the other one alone, with which no model with windows could keep sums."""
    assert CPU.backend.supported_kv_cache_layouts() == (KVCacheLayout.LBHNC, KVCacheLayout.BLHNC)
