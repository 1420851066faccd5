"""Which class TOPTHETA is on a platform, and what it refuses there with which words."""

import sys
from types import ModuleType, SimpleNamespace
from typing import Any

import pytest
import torch

pytest.importorskip("vllm")

from gpu_cases import BACKENDS, HEAD_DIM, vllm_config
from vllm.platforms import current_platform
from vllm.platforms.interface import DeviceCapability
from vllm.utils.import_utils import resolve_obj_by_qualname
from vllm.v1.attention.backends.registry import AttentionBackendEnum
from vllm.v1.attention.selector import AttentionSelectorConfig

from topt_vllm.backend.backend import TopThetaBackend
from topt_vllm.backend.gpu.flash_attn import FlashTopThetaBackend
from topt_vllm.backend.gpu.triton_attn import TritonTopThetaBackend

__all__ = ["vllm_config"]


def selection(**changes: Any) -> dict[str, Any]:
    """What a platform asks a backend about a layer."""
    options = AttentionSelectorConfig(HEAD_DIM, torch.bfloat16, "auto", None)._asdict()
    return options | {"device_capability": DeviceCapability(9, 0)} | changes


REFUSED = [
    ({"dtype": torch.float32}, "dtype not supported (torch.float32; allowed: --dtype bfloat16 or float16"),
    ({"head_size": 24}, "head_size not supported (24; allowed: multiples of 8 from 32 to 256)"),
    ({"head_size": 512}, "head_size not supported (512;"),
    ({"block_size": 24}, "block_size not supported (24;"),
    (
        {"kv_cache_dtype": "int8_per_token_head"},
        "kv_cache_dtype not supported (int8_per_token_head; allowed:",
    ),
    ({"use_mla": True}, "MLA not supported"),
    ({"has_sink": True}, "attention sinks not supported"),
    ({"use_mm_prefix": True}, "partial multimodal token full attention not supported"),
    ({"use_per_head_quant_scales": True}, "per-head quant scales not supported"),
    ({"attn_type": "encoder_only"}, "attention type encoder_only not supported (only decoder layers;"),
    ({"attn_type": "encoder_decoder"}, "attention type encoder_decoder not supported"),
    ({"use_non_causal": True}, "non-causal attention not supported"),
    ({"use_batch_invariant": True}, "batch invariance not supported (unset VLLM_BATCH_INVARIANT)"),
    (
        {"use_kv_connector": True},
        "KV connector not supported (blocks that arrive from elsewhere carry no V sums",
    ),
    ({"use_dcp": True}, "DCP not supported"),
    ({"use_pcp": True}, "PCP not supported"),
    ({"use_rswa": True}, "R-SWA not supported"),
    ({"use_sparse": True}, "sparse not supported"),
    ({"device_capability": DeviceCapability(7, 5)}, "compute capability not supported (7.5;"),
]


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize(("changes", "reason"), REFUSED, ids=lambda value: str(value)[:40])
def test_what_is_not_supported_is_refused_with_its_reason(
    vllm_config: Any, backend: type, changes: dict[str, Any], reason: str
):
    reasons = backend.validate_configuration(**selection(**changes))
    assert any(given.startswith(reason) for given in reasons), reasons


@pytest.mark.parametrize("backend", BACKENDS)
def test_what_is_supported_is_not_refused(vllm_config: Any, backend: type):
    for option in ({}, {"has_sliding_window": True}, {"block_size": 16}, {"head_size": 80}):
        assert backend.validate_configuration(**selection(**option)) == [], option
    fp8 = backend.validate_configuration(**selection(kv_cache_dtype="fp8"))
    assert bool(fp8) == (backend is FlashTopThetaBackend)


@pytest.mark.parametrize(
    ("settings", "reason"),
    [
        ({"k": 7}, "budgets"),
        ({"thresholds": "missing.yaml"}, "missing.yaml"),
        ({"k_screen": "int8"}, "no K screen"),
        (
            {"implementation": "reference"},
            "can't run inside vLLM's CUDA graphs; allowed on GPUs: auto | triton",
        ),
        ({"unknown": 1}, "toptheta.unknown"),
    ],
    ids=lambda value: str(value)[:40],
)
def test_settings_that_cannot_work_are_refused_before_the_model_is_loaded(
    vllm_config: Any, monkeypatch: pytest.MonkeyPatch, settings: dict[str, Any], reason: str
):
    settings = {"implementation": "triton"} | settings
    monkeypatch.setitem(vllm_config.additional_config, "toptheta", settings)
    (shown,) = TritonTopThetaBackend.validate_configuration(**selection())
    assert reason in shown


def test_other_amd_gpus_are_refused(vllm_config: Any, monkeypatch: pytest.MonkeyPatch):
    """The kernel is compiled for gfx94x."""
    monkeypatch.setattr(type(current_platform), "is_rocm", lambda self: True)
    refused = [
        bool(
            TritonTopThetaBackend.validate_configuration(
                **selection(device_capability=DeviceCapability(*gfx))
            )
        )
        for gfx in ((9, 0), (9, 4), (9, 5), (11, 0))
    ]
    assert refused == [True, False, True, True]


@pytest.mark.parametrize(
    ("platform", "cache_dtype", "expected"),
    [
        ("cuda", "auto", FlashTopThetaBackend),
        ("cuda", "bfloat16", FlashTopThetaBackend),
        ("cuda", "fp8", TritonTopThetaBackend),
        ("cuda", "fp8_e5m2", TritonTopThetaBackend),
        ("rocm", "auto", TritonTopThetaBackend),
        ("cpu", "auto", None),
    ],
)
def test_the_class_is_the_platform_s_own(
    vllm_config: Any, monkeypatch: pytest.MonkeyPatch, platform: str, cache_dtype: str, expected: type | None
):
    for name in ("cpu", "cuda", "rocm"):
        monkeypatch.setattr(type(current_platform), f"is_{name}", lambda self, name=name: name == platform)
    monkeypatch.setattr(type(current_platform), "is_cuda_alike", lambda self: platform in ("cuda", "rocm"))
    monkeypatch.setattr(vllm_config.cache_config, "cache_dtype", cache_dtype)
    chosen = AttentionBackendEnum["TOPTHETA"].get_class()
    assert chosen is (expected or TopThetaBackend)
    assert chosen.get_name() == "TOPTHETA"


def test_other_platforms_are_told_that_there_is_no_kernel(monkeypatch: pytest.MonkeyPatch):
    for name in ("is_cpu", "is_cuda_alike"):
        monkeypatch.setattr(type(current_platform), name, lambda self: False)
    with pytest.raises(ImportError, match="only for CPUs, CUDA and ROCm"):
        AttentionBackendEnum["TOPTHETA"].get_class()


@pytest.mark.parametrize("rocm", [False, True], ids=["cuda", "rocm"])
def test_vllm_s_gpu_platforms_select_it(vllm_config: Any, monkeypatch: pytest.MonkeyPatch, rocm: bool):
    """Their own selection. Their modules ask the machine when they are imported, so it is made to answer."""
    gpu = SimpleNamespace(gcnArchName="gfx942")
    monkeypatch.setattr(torch.cuda, "get_device_properties", lambda device: gpu)
    monkeypatch.setitem(sys.modules, "vllm._C_stable_libtorch", ModuleType("vllm._C_stable_libtorch"))
    name = "rocm.RocmPlatform" if rocm else "cuda.CudaPlatformBase"
    platform = resolve_obj_by_qualname(f"vllm.platforms.{name}")
    monkeypatch.setattr(platform, "get_device_capability", classmethod(lambda cls: DeviceCapability(9, 4)))
    for question, answer in (("cpu", False), ("cuda", not rocm), ("cuda_alike", True)):
        monkeypatch.setattr(type(current_platform), f"is_{question}", lambda self, answer=answer: answer)
    config = AttentionSelectorConfig(HEAD_DIM, torch.bfloat16, "auto", None)
    path = platform.get_attn_backend_cls(AttentionBackendEnum["TOPTHETA"], config)
    assert resolve_obj_by_qualname(path) is (TritonTopThetaBackend if rocm else FlashTopThetaBackend)
    with pytest.raises(ValueError, match="head_size not supported"):
        platform.get_attn_backend_cls(AttentionBackendEnum["TOPTHETA"], config._replace(head_size=20))
