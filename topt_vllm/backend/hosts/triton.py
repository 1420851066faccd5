"""TOPTHETA on vLLM's Triton attention."""

from typing import ClassVar

from vllm.v1.attention.backends.triton_attn import (
    TritonAttentionBackend,
    TritonAttentionImpl,
    TritonAttentionMetadataBuilder,
)

from topt_vllm.backend.builder import TopThetaBuilder
from topt_vllm.backend.hosts.gpu import GpuBackend, GpuImpl


class TritonTopThetaImpl(GpuImpl, TritonAttentionImpl):
    """Prefill on Triton attention."""


class TritonTopThetaBuilder(TopThetaBuilder, TritonAttentionMetadataBuilder):
    """Prefill metadata of Triton attention."""

    platform_builder = TritonAttentionMetadataBuilder


class TritonTopThetaBackend(GpuBackend, TritonAttentionBackend):
    """For ROCm, and for fp8 caches."""

    supported_kv_cache_dtypes: ClassVar[list] = ["auto", "float16", "bfloat16", "fp8", "fp8_e4m3", "fp8_e5m2"]

    @staticmethod
    def get_impl_cls() -> type[TritonTopThetaImpl]:
        return TritonTopThetaImpl

    @staticmethod
    def get_builder_cls() -> type[TritonTopThetaBuilder]:
        return TritonTopThetaBuilder
