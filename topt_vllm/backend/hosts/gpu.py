"""What TOPTHETA is on GPUs, whichever of vLLM's backends it stands on."""

from typing import Any, ClassVar

import torch
from vllm.platforms import current_platform

from topt_vllm.attention.common import PagedCache
from topt_vllm.backend.backend import TopThetaBackend
from topt_vllm.backend.impl import TopThetaImpl
from topt_vllm.backend.states import PREFERRED_BLOCK_SIZE

# Those that the kernel is compiled and looked at for; the platform's may take fewer.
_HEAD_SIZES = range(32, 513, 8)


class GpuBackend(TopThetaBackend):
    """Mixed into an attention backend of vLLM for GPUs."""

    supported_dtypes: ClassVar[list[torch.dtype]] = [torch.bfloat16, torch.float16]

    @classmethod
    def get_preferred_block_size(cls, default_block_size: int) -> int:
        return max(PREFERRED_BLOCK_SIZE, super().get_preferred_block_size(default_block_size))

    @classmethod
    def explanations(cls, options: dict[str, Any]) -> dict[str, str]:
        capability = options["device_capability"].as_version_str()
        return super().explanations(options) | {
            "head_size not supported": f"{options['head_size']}; allowed: multiples of 8 from 32 to "
            f"{max(filter(cls.supports_head_size, _HEAD_SIZES))}",
            "dtype not supported": f"{options['dtype']}; allowed: --dtype bfloat16 or float16",
            "compute capability not supported": f"{capability}; allowed: NVIDIA 8.0 and later, AMD gfx94x",
        }

    @classmethod
    def supports_head_size(cls, head_size: int) -> bool:
        return head_size in _HEAD_SIZES and super().supports_head_size(head_size)

    @classmethod
    def supports_compute_capability(cls, capability: Any) -> bool:
        """Those that the kernel is compiled and looked at for: sm_80 and later, gfx94x."""
        if current_platform.is_rocm():
            return (capability.major, capability.minor) == (9, 4)
        return capability.major >= 8


class GpuImpl(TopThetaImpl):
    """Mixed into an attention implementation of vLLM for GPUs."""

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)
        # The operator takes queries as the model has them.
        self.supports_quant_query_input = False

    @classmethod
    def refused_options(cls) -> dict[str, str]:
        return super().refused_options() | {
            "kv_sharing_target_layer_name": "a KV cache shared between layers",
        }

    def fused_output_quant_supported(self, quant_key: Any) -> bool:
        """No: the operator writes what the model's dtype is."""
        return False

    def views(self, layer: Any, kv_cache: torch.Tensor) -> PagedCache:
        """A slot's K, then its V."""
        if kv_cache.dtype == torch.uint8:
            # vLLM's Triton attention stores the platform's e4m3, also for fp8_e5m2 (0.32, 0.33).
            kv_cache = kv_cache.view(current_platform.fp8_dtype())
            key, value = kv_cache.chunk(2, dim=-1)
            return PagedCache(key, value, key_scale=layer._k_scale, value_scale=layer._v_scale)
        return PagedCache(*kv_cache.chunk(2, dim=-1))
