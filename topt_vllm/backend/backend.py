"""TOPTHETA's static facts on GPUs, and every refusal before a model is loaded."""

from typing import Any, ClassVar

import torch
from vllm.config import get_current_vllm_config_or_none
from vllm.platforms import current_platform
from vllm.v1.attention.backend import AttentionType, MultipleOf
from vllm.v1.kv_cache_interface import KVCacheLayout

from topt_vllm.backend import compat
from topt_vllm.backend.gpu.kernel import on_device
from topt_vllm.backend.page import Tail
from topt_vllm.backend.startup import resolve

# A backend of vLLM, when this is mixed into one.
_Platform: Any = object

_HEAD_SIZES = range(32, 257, 8)
# V sums take one float32 per block and channel: at 16 slots a sixteenth of a bf16 cache, at 64 a sixty-fourth.
# Against that, the unfinished last block is attended densely.
_PREFERRED_BLOCK_SIZE = 64


class GpuBackend(_Platform):
    """Mixed into an attention backend of vLLM, which keeps prefill, cache writes and the cache's layout."""

    supported_dtypes: ClassVar[list[torch.dtype]] = [torch.bfloat16, torch.float16]
    # Since 0.33: models may write the cache themselves. Then nobody would keep the V sums.
    supports_kv_cache_update_bypass: bool = False

    @staticmethod
    def get_name() -> str:
        return compat.BACKEND_NAME

    @classmethod
    def customize_spec(cls, spec: Any) -> Any:
        """Pages with room for the V sums."""
        return Tail(spec.num_kv_heads, spec.head_size).extend(spec)

    @classmethod
    def supported_kv_cache_layouts(cls) -> tuple[KVCacheLayout, ...]:
        return compat.layouts_with_padding()

    @classmethod
    def get_preferred_block_size(cls, default_block_size: int) -> int:
        return max(_PREFERRED_BLOCK_SIZE, super().get_preferred_block_size(default_block_size))

    @classmethod
    def supports_block_size(cls, block_size: int | None) -> bool:
        """vLLM can't split padded pages into blocks of a kernel, so a fixed size must be met exactly."""
        return block_size is None or any(
            block_size % size.base == 0 if isinstance(size, MultipleOf) else block_size == size
            for size in cls.get_supported_kernel_block_sizes()
        )

    @classmethod
    def validate_configuration(cls, **options: Any) -> list[str]:
        """Every reason not to serve a layer; the platform asks when a layer is made, and shows them."""
        reasons = [_explain(reason, cls, options) for reason in super().validate_configuration(**options)]
        vllm_config = get_current_vllm_config_or_none()
        if not reasons and vllm_config is not None and vllm_config.model_config is not None:
            try:
                resolved = resolve(vllm_config)
                on_device(resolved.implementation, resolved.implementation_name)
            except (ValueError, RuntimeError) as error:
                reasons.append(str(error))
        return reasons

    @classmethod
    def supports_head_size(cls, head_size: int) -> bool:
        return head_size in _HEAD_SIZES and super().supports_head_size(head_size)

    @classmethod
    def supports_compute_capability(cls, capability: Any) -> bool:
        """Those that the kernel is compiled and looked at for: sm_80 and later, gfx94x."""
        if current_platform.is_rocm():
            return (capability.major, capability.minor) == (9, 4)
        return capability.major >= 8

    @classmethod
    def supports_attn_type(cls, attn_type: str) -> bool:
        return attn_type == AttentionType.DECODER

    @classmethod
    def supports_sink(cls) -> bool:
        return False

    @classmethod
    def supports_alibi_sqrt(cls) -> bool:
        return False

    @classmethod
    def supports_mm_prefix(cls) -> bool:
        return False

    @classmethod
    def supports_rswa(cls) -> bool:
        return False

    @classmethod
    def supports_non_causal(cls) -> bool:
        return False

    @classmethod
    def supports_per_head_quant_scales(cls) -> bool:
        return False

    @classmethod
    def supports_batch_invariance(cls) -> bool:
        """No: how a context is split depends on the batch."""
        return False

    @classmethod
    def supports_kv_connector(cls) -> bool:
        return False


def _explain(reason: str, backend: type[GpuBackend], options: dict[str, Any]) -> str:
    """vLLM's reason with what was given, what is allowed, and how to mend it."""
    details = {
        "head_size not supported": f"{options['head_size']}; allowed: multiples of 8 from 32 to 256",
        "dtype not supported": f"{options['dtype']}; allowed: --dtype bfloat16 or float16",
        "kv_cache_dtype not supported": f"{options['kv_cache_dtype']}; allowed: --kv-cache-dtype "
        + " or ".join(backend.supported_kv_cache_dtypes),
        "block_size not supported": f"{options['block_size']}; allowed: --block-size of "
        f"{backend.get_supported_kernel_block_sizes()}",
        "KV connector not supported": "blocks that arrive from elsewhere carry no V sums; "
        "remove --kv-transfer-config",
        "batch invariance not supported": "unset VLLM_BATCH_INVARIANT",
        "DCP not supported": "remove --decode-context-parallel-size",
        f"attention type {options['attn_type']} not supported": "only decoder layers; keep the others on another "
        "backend with --attention-config.backend_per_kind",
        "compute capability not supported": f"{options['device_capability'].as_version_str()}; allowed: NVIDIA 8.0 "
        "and later, AMD gfx94x",
    }
    return f"{reason} ({details[reason]})" if reason in details else reason
