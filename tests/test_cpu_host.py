"""What TOPTHETA is on CPUs alone: fp8 caches, other kernels on vLLM's CPU cache, and the cores that it gets."""

import os
from types import SimpleNamespace
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
from topt_vllm.backend import compat

pytestmark = pytest.mark.skipif(CPU.backend is None, reason="vLLM's build here has no CPU kernels")

__all__ = ["make_rig", "vllm_config"]


def test_an_fp8_cache_is_refused_where_vllm_has_no_kernel_for_it(monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr(torch.cpu, "_is_avx512_supported", lambda: False)
    monkeypatch.setattr(torch.cpu, "_is_amx_tile_supported", lambda: False)
    asked = (128, False, False, False, False, None)
    assert CPU.backend.supports_combination(64, torch.bfloat16, "auto", *asked) is None
    reason = CPU.backend.supports_combination(64, torch.bfloat16, "fp8", *asked)
    assert "requires x86 with AVX-512 or AMX; leave --kv-cache-dtype out" in reason


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


@pytest.mark.parametrize(
    ("environment", "changes", "idle"),
    [
        ({}, {}, (1, 4)),
        ({}, {"connector": "some"}, (2, 4)),
        ({}, {"world_size": 2, "connector": "some"}, None),
        ({}, {"executor": "uni"}, None),
        ({"VLLM_CPU_OMP_THREADS_BIND": "auto"}, {}, (1, 4)),
        ({"VLLM_CPU_OMP_THREADS_BIND": "0-3"}, {}, None),
        ({"VLLM_CPU_OMP_THREADS_BIND": "nobind"}, {}, None),
        ({"VLLM_CPU_NUM_OF_RESERVED_CPU": "0"}, {}, None),
    ],
    ids=str,
)
def test_cores_that_vllm_leaves_idle_are_known(
    monkeypatch: pytest.MonkeyPatch, environment: dict[str, str], changes: dict[str, Any], idle: Any
):
    for name in ("VLLM_CPU_OMP_THREADS_BIND", "VLLM_CPU_NUM_OF_RESERVED_CPU"):
        monkeypatch.delenv(name, raising=False)
    for name, value in environment.items():
        monkeypatch.setenv(name, value)
    # Eight logical CPUs of four cores.
    monkeypatch.setattr(os, "sched_getaffinity", lambda process: range(8))
    monkeypatch.setattr(compat.psutil, "cpu_count", lambda logical: 8 if logical else 4)
    config = SimpleNamespace(
        parallel_config=SimpleNamespace(
            distributed_executor_backend=changes.get("executor", "mp"),
            world_size=changes.get("world_size", 1),
        ),
        kv_transfer_config=changes.get("connector"),
    )
    assert compat.cores_left_idle(config) == idle


@pytest.mark.parametrize(("idle", "noted"), [((1, 2), True), ((1, 8), True), ((1, 64), False), (None, False)])
def test_start_up_says_so_once_where_it_matters(monkeypatch: pytest.MonkeyPatch, idle: Any, noted: bool):
    from topt_vllm.backend.hosts import cpu_platform

    said: list[str] = []
    monkeypatch.setattr(cpu_platform.logger, "info", lambda text, *values: said.append(text % values))
    cpu_platform.note_idle_cores.cache_clear()
    for _ in range(2):
        cpu_platform.note_idle_cores(idle)
    assert len(said) == noted
    for line in said:
        assert f"of {idle[1]} cores vLLM leaves {idle[0]}" in line
        assert "VLLM_CPU_NUM_OF_RESERVED_CPU=0" in line
