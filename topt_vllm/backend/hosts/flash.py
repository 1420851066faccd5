"""TOPTHETA on vLLM's FlashAttention."""

from typing import Any, ClassVar

from vllm.config import VllmConfig, get_current_vllm_config_or_none
from vllm.v1.attention.backends.flash_attn import (
    FlashAttentionBackend,
    FlashAttentionImpl,
    FlashAttentionMetadataBuilder,
)

from topt_vllm.backend.builder import TopThetaBuilder
from topt_vllm.backend.hosts.gpu import GpuBackend, GpuImpl
from topt_vllm.backend.startup import resolve


class FlashTopThetaImpl(GpuImpl, FlashAttentionImpl):
    """Prefill on FlashAttention."""


class FlashTopThetaBuilder(TopThetaBuilder, FlashAttentionMetadataBuilder):
    """Prefill metadata of FlashAttention."""

    platform_builder = FlashAttentionMetadataBuilder


class FlashTopThetaBackend(GpuBackend, FlashAttentionBackend):
    """For caches of the model's dtype. With fp8 ones FlashAttention wants queries in fp8, the operator doesn't."""

    supported_kv_cache_dtypes: ClassVar[list] = ["auto", "float16", "bfloat16"]

    @classmethod
    def validate_configuration(cls, **options: Any) -> list[str]:
        """As on every host; and where vLLM would fail to split the cache once the model is loaded."""
        reasons: list[str] = super().validate_configuration(**options)
        vllm_config = get_current_vllm_config_or_none()
        if not reasons and vllm_config is not None and _splits_packed_blocks(vllm_config, cls):
            reasons.append(
                "FlashAttention 4 reads heads of 256 in blocks of 128 here, and vLLM can't split a hybrid model's "
                "blocks with V sums beside them. Add --attention-config.flash_attn_version 2"
            )
        return reasons

    @classmethod
    def explanations(cls, options: dict[str, Any]) -> dict[str, str]:
        return super().explanations(options) | {
            "attention sinks not supported": "FlashAttention takes them from version 3 on",
        }

    @staticmethod
    def get_impl_cls() -> type[FlashTopThetaImpl]:
        return FlashTopThetaImpl

    @staticmethod
    def get_builder_cls() -> type[FlashTopThetaBuilder]:
        return FlashTopThetaBuilder


def _splits_packed_blocks(vllm_config: VllmConfig, backend: type[FlashTopThetaBackend]) -> bool:
    """Whether kernels want blocks of one size, and the cache's are longer and lie between those of other layers.

    Attention's blocks are as large as a hybrid model's states of the other layers, and what lies beside the cache
    asks for a layout that vLLM splits no blocks in (0.31 to 0.33).
    """
    if vllm_config.model_config is None or not vllm_config.model_config.is_hybrid:
        return False
    if not all(isinstance(size, int) for size in backend.get_supported_kernel_block_sizes()):
        return False
    resolved = resolve(vllm_config)
    skips = resolved.thetas or resolved.config.sift is not None
    return bool(skips) and (resolved.config.compensation == "vmean" or bool(resolved.screens))
