"""TOPTHETA's static facts on CPUs; vLLM's CPU backend answers for everything that is not Top-Theta."""

from typing import Any, ClassVar

from vllm.v1.attention.backend import AttentionType
from vllm.v1.attention.backends.cpu_attn import CPUAttentionBackend

from topt_vllm.backend import compat
from topt_vllm.backend.builder import TopThetaMetadataBuilder
from topt_vllm.backend.impl import TopThetaImpl
from topt_vllm.backend.page import tail_of


class TopThetaBackend(CPUAttentionBackend):
    """Top-Theta decode on vLLM's CPU cache layout; prefill and cache writes are vLLM's own."""

    supported_kv_cache_dtypes: ClassVar[list] = ["auto", "bfloat16", "float16", *compat.CPU_FP8_DTYPES]

    @staticmethod
    def get_name() -> str:
        return compat.BACKEND_NAME

    @staticmethod
    def get_impl_cls() -> type[TopThetaImpl]:
        return TopThetaImpl

    @staticmethod
    def get_builder_cls() -> type[TopThetaMetadataBuilder]:
        return TopThetaMetadataBuilder

    @classmethod
    def get_supported_head_sizes(cls) -> list[int]:
        return [size for size in super().get_supported_head_sizes() if size <= 256]

    @classmethod
    def customize_spec(cls, spec: Any) -> Any:
        """Pages with room for the V sums and, where configured, the low-bit copy of K."""
        return tail_of(spec.num_kv_heads, spec.head_size, spec.block_size).extend(spec)

    @classmethod
    def supports_attn_type(cls, attn_type: str) -> bool:
        return attn_type == AttentionType.DECODER

    @classmethod
    def supports_non_causal(cls) -> bool:
        return False

    @classmethod
    def supports_kv_connector(cls) -> bool:
        return False
