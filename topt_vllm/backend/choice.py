"""Which class TOPTHETA is, chosen when vLLM looks the name up.

The platform's own backend with Top-Theta decode; on GPUs, for a model without thresholds, the backend that vLLM
picks unasked.
"""

from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from vllm.config import VllmConfig

_NAME = "TopThetaBackend"


def __getattr__(name: str) -> Any:
    if name != _NAME:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    from vllm.platforms import current_platform

    if current_platform.is_cpu():
        from topt_vllm.backend.hosts.cpu import CpuTopThetaBackend

        return CpuTopThetaBackend
    if not current_platform.is_cuda_alike():
        # vLLM shows this as the reason why the backend can't be had.
        raise ImportError(
            f"topt_vllm has no kernel for {current_platform.device_name}, only for CPUs, CUDA and ROCm"
        )
    from vllm.config import get_current_vllm_config_or_none

    vllm_config = get_current_vllm_config_or_none()
    if vllm_config is not None and _keeps_every_row(vllm_config):
        from topt_vllm.backend.compat import unasked_backend
        from topt_vllm.backend.hosts.stock import stock_backend

        return stock_backend(unasked_backend(vllm_config))
    if current_platform.is_cuda() and _cache_is_plain(vllm_config):
        from topt_vllm.backend.hosts.flash import FlashTopThetaBackend

        return FlashTopThetaBackend
    from topt_vllm.backend.hosts.triton import TritonTopThetaBackend

    return TritonTopThetaBackend


def _keeps_every_row(vllm_config: "VllmConfig") -> bool:
    """Whether the engine that is being built leaves every layer to the platform's own kernels."""
    from topt_vllm.backend.startup import resolve

    if vllm_config.model_config is None:
        return False
    try:
        return resolve(vllm_config).all_on_platform
    except (ValueError, RuntimeError):  # the class that is chosen now says why, when a layer is made
        return False


def _cache_is_plain(vllm_config: "VllmConfig | None") -> bool:
    """Whether that engine keeps K and V as FlashAttention takes them beside the operator's queries."""
    return vllm_config is None or vllm_config.cache_config.cache_dtype in ("auto", "float16", "bfloat16")
