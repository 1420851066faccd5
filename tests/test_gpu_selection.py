"""Which class TOPTHETA is on a platform, and what it refuses there with which words."""

import sys
from types import ModuleType, SimpleNamespace
from typing import Any

import pytest
import torch

pytest.importorskip("vllm")

from adapter_cases import CPU, HEAD_DIM, as_on_gpu, vllm_config
from vllm.platforms import current_platform
from vllm.platforms.interface import DeviceCapability
from vllm.utils.import_utils import resolve_obj_by_qualname
from vllm.v1.attention.backend import AttentionCGSupport
from vllm.v1.attention.backends import flash_attn, registry
from vllm.v1.attention.backends.registry import AttentionBackendEnum
from vllm.v1.attention.backends.triton_attn import TritonAttentionBackend, TritonAttentionMetadataBuilder
from vllm.v1.attention.selector import (
    AttentionSelectorConfig,
    _cached_get_attn_backend,
    get_attn_backend,
)
from vllm.v1.kv_cache_interface import FullAttentionSpec, KVCacheLayout

from topt_vllm.backend import compat
from topt_vllm.backend.hosts.flash import FlashTopThetaBackend
from topt_vllm.backend.hosts.triton import TritonTopThetaBackend

__all__ = ["vllm_config"]

BACKENDS = [FlashTopThetaBackend, TritonTopThetaBackend]


def selection(**changes: Any) -> dict[str, Any]:
    """What a platform asks a backend about a layer."""
    options = AttentionSelectorConfig(HEAD_DIM, torch.bfloat16, "auto", None)._asdict()
    return options | {"device_capability": DeviceCapability(9, 0)} | changes


REFUSED = [
    ({"dtype": torch.float32}, "dtype not supported (torch.float32; allowed: --dtype bfloat16 or float16"),
    ({"head_size": 24}, "head_size not supported (24; allowed: multiples of 8 from 32 to "),
    ({"head_size": 520}, "head_size not supported (520; allowed: multiples of 8 from 32 to "),
    ({"block_size": 24}, "block_size not supported (24;"),
    (
        {"kv_cache_dtype": "int8_per_token_head"},
        "kv_cache_dtype not supported (int8_per_token_head; allowed:",
    ),
    ({"kv_cache_dtype": "float16"}, "kv_cache_dtype float16 with a model in torch.bfloat16; allowed:"),
    ({"use_mla": True}, "MLA not supported"),
    ({"use_mm_prefix": True}, "partial multimodal token full attention not supported"),
    ({"use_per_head_quant_scales": True}, "per-head quant scales not supported"),
    ({"attn_type": "encoder_only"}, "attention type encoder_only not supported (only decoder layers;"),
    ({"attn_type": "encoder_decoder"}, "attention type encoder_decoder not supported"),
    ({"use_non_causal": True}, "non-causal attention not supported"),
    ({"use_batch_invariant": True}, "batch invariance not supported (unset VLLM_BATCH_INVARIANT)"),
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


def flash_attention(monkeypatch: pytest.MonkeyPatch, version: int) -> None:
    """Has vLLM find this version of it."""
    for name, answer in (
        ("is_flash_attn_varlen_func_available", lambda: True),
        ("flash_attn_supports_sinks", lambda: version > 2),
        ("is_fa_version_supported", lambda asked: asked <= version),
    ):
        monkeypatch.setattr(flash_attn, name, answer, raising=False)


@pytest.mark.parametrize("version", [2, 3, 4])
@pytest.mark.parametrize("backend", BACKENDS)
def test_sinks_and_large_heads_are_served_where_the_platform_s_prefill_can(
    vllm_config: Any, monkeypatch: pytest.MonkeyPatch, backend: type, version: int
):
    """Triton attention can do both; FlashAttention by its version and the GPU."""
    flash_attention(monkeypatch, version)
    on_flash = backend is FlashTopThetaBackend
    sinks = backend.validate_configuration(**selection(has_sink=True))
    large = backend.validate_configuration(**selection(head_size=512))
    assert bool(sinks) == (on_flash and version < 3)
    assert bool(large) == (on_flash and version < 4)
    if sinks:
        assert sinks == ["attention sinks not supported (FlashAttention takes them from version 3 on)"]
    if large:
        assert large == ["head_size not supported (512; allowed: multiples of 8 from 32 to 256)"]
    ampere = selection(has_sink=True, device_capability=DeviceCapability(8, 0))
    assert bool(backend.validate_configuration(**ampere)) == on_flash


@pytest.mark.parametrize(
    ("hybrid", "version", "settings", "refused"),
    [
        (True, 4, {}, True),
        (True, 4, {"compensation": "none"}, False),
        (True, 2, {}, False),
        (False, 4, {}, False),
    ],
)
def test_blocks_that_vllm_cannot_split_are_refused_with_the_remedy(
    vllm_config: Any,
    monkeypatch: pytest.MonkeyPatch,
    hybrid: bool,
    version: int,
    settings: dict[str, str],
    refused: bool,
):
    """Heads of 256 on Blackwell: vLLM's own message, when the cache is allocated, names what doesn't help here."""
    as_on_gpu(vllm_config, monkeypatch, implementation="triton", **settings)
    monkeypatch.setattr(type(vllm_config.model_config), "is_hybrid", hybrid)
    monkeypatch.setattr(flash_attn, "uses_fa4_hd256_kernel", lambda *sizes: True)
    monkeypatch.setattr(flash_attn, "get_flash_attn_version", lambda **options: version)
    reasons = FlashTopThetaBackend.validate_configuration(**selection())
    assert bool(reasons) == refused
    assert not refused or "flash_attn_version 2" in reasons[0]


@pytest.mark.parametrize(
    ("settings", "reason"),
    [
        ({"budget": 7}, "budgets"),
        ({"thresholds": "missing.yaml"}, "missing.yaml"),
        ({"k_screen": "int4+4"}, "no K screen 'int4+4'"),
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
    as_on_gpu(vllm_config, monkeypatch, **{"implementation": "triton"} | settings)
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
    assert chosen is (expected or CPU.backend)
    assert chosen.get_name() == "TOPTHETA"


def test_other_platforms_are_told_that_there_is_no_kernel(monkeypatch: pytest.MonkeyPatch):
    for name in ("is_cpu", "is_cuda_alike"):
        monkeypatch.setattr(type(current_platform), name, lambda self: False)
    with pytest.raises(ImportError, match="only for CPUs, CUDA and ROCm"):
        AttentionBackendEnum["TOPTHETA"].get_class()


@pytest.fixture
def on_platform(vllm_config: Any, monkeypatch: pytest.MonkeyPatch) -> Any:
    """Has vLLM run on one of its GPU platforms, with that one's own selection.

    Their modules ask the machine when they are imported, so it is made to answer.
    """
    gpu = SimpleNamespace(gcnArchName="gfx942")
    monkeypatch.setattr(torch.cuda, "get_device_properties", lambda device: gpu)
    # Of GPUs; and by its first name vLLM's library for CPUs would be a second one where another fits the CPU.
    for library in ("vllm._C", "vllm._C_stable_libtorch"):
        monkeypatch.setitem(sys.modules, library, ModuleType(library))

    def on_platform(name: str, capability: tuple[int, int]) -> Any:
        platform = resolve_obj_by_qualname(
            {"rocm": "vllm.platforms.rocm.RocmPlatform", "cuda": "vllm.platforms.cuda.CudaPlatformBase"}[name]
        )
        monkeypatch.setattr(
            platform, "get_device_capability", classmethod(lambda cls, *args: DeviceCapability(*capability))
        )
        answers = {"cpu": False, "cuda": name == "cuda", "rocm": name == "rocm", "cuda_alike": True}
        for question, answer in answers.items():
            monkeypatch.setattr(type(current_platform), f"is_{question}", lambda self, answer=answer: answer)
        monkeypatch.setattr(type(current_platform), "get_attn_backend_cls", platform.get_attn_backend_cls)
        return platform

    _cached_get_attn_backend.cache_clear()
    yield on_platform
    _cached_get_attn_backend.cache_clear()


@pytest.mark.parametrize("name", ["cuda", "rocm"])
def test_vllm_s_gpu_platforms_select_it(on_platform: Any, name: str):
    platform = on_platform(name, (9, 4))
    config = AttentionSelectorConfig(HEAD_DIM, torch.bfloat16, "auto", None)
    path = platform.get_attn_backend_cls(AttentionBackendEnum["TOPTHETA"], config)
    assert resolve_obj_by_qualname(path) is (
        TritonTopThetaBackend if name == "rocm" else FlashTopThetaBackend
    )
    with pytest.raises(ValueError, match="head_size not supported"):
        platform.get_attn_backend_cls(AttentionBackendEnum["TOPTHETA"], config._replace(head_size=20))


class FlashInferBuilder(TritonAttentionMetadataBuilder):
    """Graphs of single tokens only, as FlashInfer's without TRT-LLM kernels."""

    _cudagraph_support = AttentionCGSupport.UNIFORM_SINGLE_TOKEN_DECODE


class FlashInfer(TritonAttentionBackend):
    """Stands in for the package that vLLM's FlashInfer backend needs, with its static facts."""

    @staticmethod
    def get_name() -> str:
        return "FLASHINFER"

    @staticmethod
    def get_builder_cls() -> type:
        return FlashInferBuilder

    @staticmethod
    def get_supported_kernel_block_sizes(kv_cache_spec: Any = None) -> list[Any]:
        return [32, 64]

    @classmethod
    def supported_kv_cache_layouts(cls) -> tuple[KVCacheLayout, ...]:
        return (KVCacheLayout.LBHNC,)

    @classmethod
    def supports_sliding_window(cls) -> bool:
        return False


@pytest.fixture
def flashinfer(monkeypatch: pytest.MonkeyPatch) -> None:
    """vLLM finds FlashInfer."""
    path = f"{FlashInfer.__module__}.FlashInfer"
    monkeypatch.setitem(registry._ATTN_OVERRIDES, AttentionBackendEnum.FLASHINFER, path)


def asked(vllm_config: Any, backend: str | None, **options: Any) -> Any:
    """What vLLM's selection gives a layer with and without a backend named."""
    member = None if backend is None else AttentionBackendEnum[backend]
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(vllm_config.attention_config, "backend", member)
        cache_dtype = vllm_config.cache_config.cache_dtype
        return get_attn_backend(HEAD_DIM, torch.bfloat16, cache_dtype, **options)


UNASKED = [
    ("cuda", (8, 0), "auto", "FLASH_ATTN"),
    ("cuda", (8, 0), "fp8", "TRITON_ATTN"),
    ("cuda", (9, 0), "auto", "FLASH_ATTN"),
    ("cuda", (9, 0), "fp8", "FLASH_ATTN"),
    ("cuda", (10, 0), "auto", "FLASHINFER"),
    ("cuda", (10, 0), "fp8", "FLASHINFER"),
    ("rocm", (9, 4), "auto", "ROCM_ATTN"),
    ("rocm", (9, 4), "fp8", "ROCM_ATTN"),
]


@pytest.mark.parametrize(("platform", "capability", "cache_dtype", "expected"), UNASKED)
def test_without_thresholds_it_is_what_vllm_picks_unasked(
    vllm_config: Any,
    monkeypatch: pytest.MonkeyPatch,
    on_platform: Any,
    request: pytest.FixtureRequest,
    platform: str,
    capability: tuple[int, int],
    cache_dtype: str,
    expected: str | None,
):
    """FlashAttention 3 takes fp8 caches on Hopper; on Blackwell FlashInfer comes first. ROCm's pick is as it is."""
    on_platform(platform, capability)
    if platform == "rocm":  # they need more of Triton than vLLM's CPU build has
        for unbuilt in AttentionBackendEnum:
            if unbuilt.name in ("TURBOQUANT", "ULTRAQUANT"):  # 0.31 has the first only
                monkeypatch.setitem(registry._ATTN_OVERRIDES, unbuilt, "absent.Backend")
    if capability == (10, 0):
        request.getfixturevalue("flashinfer")
    as_on_gpu(vllm_config, monkeypatch, thresholds="none")
    monkeypatch.setattr(vllm_config.cache_config, "cache_dtype", cache_dtype)
    monkeypatch.setattr(
        flash_attn, "flash_attn_supports_kv_cache_dtype", lambda *args, **options: capability == (9, 0)
    )
    stock, chosen = (asked(vllm_config, name) for name in (None, "TOPTHETA"))
    assert expected in (stock.get_name(), None)
    assert chosen is not stock
    assert issubclass(chosen, stock)
    assert chosen.get_impl_cls() is stock.get_impl_cls()
    assert issubclass(chosen.get_builder_cls(), stock.get_builder_cls())
    support, stocks = (
        backend.get_builder_cls().get_cudagraph_support(vllm_config, None) for backend in (chosen, stock)
    )
    assert support == stocks
    for name in dir(stock):
        if name.startswith(("get_name", "get_supported", "support")):
            ours, theirs = getattr(chosen, name), getattr(stock, name)
            assert getattr(ours, "__func__", ours) is getattr(theirs, "__func__", theirs), name
    assert chosen.get_preferred_block_size(16) == stock.get_preferred_block_size(16)
    spec = FullAttentionSpec(block_size=32, num_kv_heads=2, head_size=HEAD_DIM, dtype=torch.bfloat16)
    assert chosen.customize_spec(spec) == stock.customize_spec(spec)
    assert resolve_obj_by_qualname(".".join(chosen.full_cls_name())) is chosen


@pytest.mark.parametrize("settings", [{}, {"thresholds": "none", "implementation": "triton"}], ids=str)
def test_thresholds_or_a_named_kernel_bring_the_operator(
    vllm_config: Any, monkeypatch: pytest.MonkeyPatch, on_platform: Any, settings: dict[str, str]
):
    on_platform("cuda", (9, 0))
    as_on_gpu(vllm_config, monkeypatch, **settings)
    assert asked(vllm_config, "TOPTHETA") is FlashTopThetaBackend


def test_layers_for_which_vllm_picks_different_backends_are_refused(
    vllm_config: Any, monkeypatch: pytest.MonkeyPatch, on_platform: Any, flashinfer: None
):
    on_platform("cuda", (10, 0))
    as_on_gpu(vllm_config, monkeypatch, thresholds="none")
    assert asked(vllm_config, "TOPTHETA").get_name() == "FLASHINFER"
    with pytest.raises(ValueError, match="sliding window not supported"):
        asked(vllm_config, "TOPTHETA", has_sliding_window=True)
    # A layer that FlashInfer could serve, where something else comes first.
    monkeypatch.setattr(compat, "unasked_backend_of_layer", lambda options: flash_attn.FlashAttentionBackend)
    _cached_get_attn_backend.cache_clear()
    with pytest.raises(ValueError, match="vLLM picks FLASH_ATTN for this layer and FLASHINFER for others"):
        asked(vllm_config, "TOPTHETA")


def test_mistakes_are_shown_as_without_thresholds(
    vllm_config: Any, monkeypatch: pytest.MonkeyPatch, on_platform: Any
):
    on_platform("cuda", (9, 0))
    as_on_gpu(vllm_config, monkeypatch, thresholds="none", unknown=1)
    with pytest.raises(ValueError, match=r"toptheta\.unknown"):
        asked(vllm_config, "TOPTHETA")
