"""TOPTHETA's static facts on every host, and every refusal before a model is loaded."""

from typing import Any

import torch
from vllm.config import get_current_vllm_config_or_none
from vllm.v1.attention.backend import AttentionType

from topt_vllm.backend import compat
from topt_vllm.backend.startup import resolve

# A backend of vLLM, when this is mixed into one.
_Platform: Any = object


class TopThetaBackend(_Platform):
    """Mixed into an attention backend of vLLM, which keeps prefill, cache writes and the cache's layout."""

    @staticmethod
    def get_name() -> str:
        return compat.BACKEND_NAME

    @classmethod
    def validate_configuration(cls, **options: Any) -> list[str]:
        """Every reason not to serve a layer; the platform asks when a layer is made, and shows them."""
        explanations = cls.explanations(options)
        reasons = [
            f"{reason} ({explanations[reason]})" if reason in explanations else reason
            for reason in super().validate_configuration(**options)
        ]
        vllm_config = get_current_vllm_config_or_none()
        if not reasons and vllm_config is not None and vllm_config.model_config is not None:
            try:
                resolve(vllm_config)
            except (ValueError, RuntimeError) as error:
                reasons.append(str(error))
        return reasons

    @classmethod
    def supports_combination(
        cls, head_size: int, dtype: torch.dtype, kv_cache_dtype: str | None, *rest: Any
    ) -> str | None:
        """As the platform says, and no cache of another 16-bit dtype: vLLM (0.32) converts nothing for it."""
        if kv_cache_dtype in ("bfloat16", "float16") and getattr(torch, kv_cache_dtype) != dtype:
            return f"kv_cache_dtype {kv_cache_dtype} with a model in {dtype}; allowed: --kv-cache-dtype auto or fp8"
        reason: str | None = super().supports_combination(head_size, dtype, kv_cache_dtype, *rest)
        return reason

    @classmethod
    def explanations(cls, options: dict[str, Any]) -> dict[str, str]:
        """What was given, what is allowed and how to mend it, by vLLM's reason."""
        return {
            "kv_cache_dtype not supported": f"{options['kv_cache_dtype']}; allowed: --kv-cache-dtype "
            + " or ".join(cls.supported_kv_cache_dtypes),
            "block_size not supported": f"{options['block_size']}; allowed: --block-size of "
            f"{cls.get_supported_kernel_block_sizes()}",
            "batch invariance not supported": "unset VLLM_BATCH_INVARIANT",
            "partial multimodal token full attention not supported": "tokens of an image attend to those behind "
            "them; with --language-model-only the model serves text, causally",
            "DCP not supported": "remove --decode-context-parallel-size",
            f"attention type {options['attn_type']} not supported": "only decoder layers; keep the others on "
            "another backend with --attention-config.backend_per_kind",
        }

    @classmethod
    def supports_attn_type(cls, attn_type: str) -> bool:
        return attn_type == AttentionType.DECODER

    @classmethod
    def supports_alibi_sqrt(cls) -> bool:
        return False

    # Each is what one or another of vLLM's backends can do. Batch invariance: how a context is split depends on
    # the batch.
    supports_mm_prefix = supports_rswa = supports_non_causal = supports_alibi_sqrt
    supports_per_head_quant_scales = supports_batch_invariance = supports_alibi_sqrt
