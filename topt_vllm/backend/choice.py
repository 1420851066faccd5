"""Which class TOPTHETA is, chosen when vLLM looks the name up: the platform's own backend with Top-Theta decode."""

from typing import Any

_NAME = "TopThetaBackend"


def __getattr__(name: str) -> Any:
    if name != _NAME:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    from vllm.platforms import current_platform

    if current_platform.is_cpu():
        from topt_vllm.backend.backend import TopThetaBackend

        return TopThetaBackend
    if not current_platform.is_cuda_alike():
        # vLLM shows this as the reason why the backend can't be had.
        raise ImportError(
            f"topt_vllm has no kernel for {current_platform.device_name}, only for CPUs, CUDA and ROCm"
        )
    if current_platform.is_cuda() and _cache_is_plain():
        from topt_vllm.backend.gpu.flash_attn import FlashTopThetaBackend

        return FlashTopThetaBackend
    from topt_vllm.backend.gpu.triton_attn import TritonTopThetaBackend

    return TritonTopThetaBackend


def _cache_is_plain() -> bool:
    """Whether the engine that is being built keeps K and V as FlashAttention takes them beside its queries."""
    from vllm.config import get_current_vllm_config_or_none

    vllm_config = get_current_vllm_config_or_none()
    return vllm_config is None or vllm_config.cache_config.cache_dtype in ("auto", "float16", "bfloat16")
