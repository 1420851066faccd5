"""TOPTHETA on vLLM's FlashAttention."""

from typing import Any, ClassVar

from vllm.v1.attention.backends.flash_attn import (
    FlashAttentionBackend,
    FlashAttentionImpl,
    FlashAttentionMetadataBuilder,
)

from topt_vllm.backend.builder import TopThetaBuilder
from topt_vllm.backend.hosts.gpu import GpuBackend, GpuImpl


class FlashTopThetaImpl(GpuImpl, FlashAttentionImpl):
    """Prefill on FlashAttention."""


class FlashTopThetaBuilder(TopThetaBuilder, FlashAttentionMetadataBuilder):
    """Prefill metadata of FlashAttention."""

    platform_builder = FlashAttentionMetadataBuilder


class FlashTopThetaBackend(GpuBackend, FlashAttentionBackend):
    """For caches of the model's dtype. With fp8 ones FlashAttention wants queries in fp8, the operator doesn't."""

    supported_kv_cache_dtypes: ClassVar[list] = ["auto", "float16", "bfloat16"]

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
