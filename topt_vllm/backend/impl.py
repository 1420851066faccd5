"""One attention layer on a GPU: refusals when it is made, V sums after the cache write, then one call per step."""

from typing import Any

import torch

from topt_vllm.attention import api
from topt_vllm.attention.common import DecodeBatch
from topt_vllm.backend.gpu.layer import GpuLayer
from topt_vllm.backend.gpu.metadata import GpuMetadata

# An attention implementation of vLLM, when this is mixed into one.
_Platform: Any = object


class GpuImpl(_Platform):
    """Mixed into an attention implementation of vLLM: decode rows go to Top-Theta, prefill rows stay."""

    bound: GpuLayer | None = None
    # Why the platform's kernel decodes in this layer too; None where the operator does. Set as `bound` is.
    platform_reason: str | None = None
    sliding_window: tuple[int, int]
    logits_soft_cap: float
    # Every rank would need all of a context's V sums.
    supports_dcp: bool = False

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)
        refused = {
            "alibi_slopes": "ALiBi",
            "sinks": "attention sinks",
            "kv_sharing_target_layer_name": "a KV cache shared between layers",
        }
        for option, meaning in refused.items():
            if getattr(self, option, None) is not None:
                raise NotImplementedError(
                    f"TOPTHETA doesn't support {meaning} ({option}); use another --attention-backend"
                )
        # The operator takes queries as the model has them.
        self.supports_quant_query_input = False

    def fused_output_quant_supported(self, quant_key: Any) -> bool:
        """No: the operator writes what the model's dtype is."""
        return False

    def fused_rope_kvcache_supported(self) -> bool:
        """No: the cache is to be written through :meth:`do_kv_cache_update`, which keeps the V sums."""
        return False

    def do_kv_cache_update(
        self,
        layer: Any,
        key: torch.Tensor,
        value: torch.Tensor,
        kv_cache: torch.Tensor,
        slot_mapping: torch.Tensor,
    ) -> None:
        """Writes K and V as the platform does, then the V sums of the blocks that this finishes."""
        super().do_kv_cache_update(layer, key, value, kv_cache, slot_mapping)
        bound = self.bound
        if bound is not None and bound.keeps_sums:
            bound.group.implementation.update_sums(bound.paged_cache(layer, kv_cache), slot_mapping)

    def forward(
        self,
        layer: Any,
        query: torch.Tensor,
        key: torch.Tensor,
        value: torch.Tensor,
        kv_cache: torch.Tensor,
        attn_metadata: GpuMetadata | None,
        output: torch.Tensor,
        output_scale: torch.Tensor | None = None,
        output_block_scale: torch.Tensor | None = None,
    ) -> torch.Tensor:
        """One step of one layer; shapes as the platform's ``forward``."""
        if output_scale is not None or output_block_scale is not None:
            raise NotImplementedError("TOPTHETA doesn't quantise its output (output_scale)")
        if attn_metadata is None:  # vLLM's profiling run
            return super().forward(layer, query, key, value, kv_cache, None, output)
        if self.platform_reason:
            return super().forward(layer, query, key, value, kv_cache, attn_metadata.whole, output)
        bound = self.bound
        if bound is None:
            raise RuntimeError("TOPTHETA layer used before its metadata builder was made; this is a bug")
        rows = attn_metadata.num_decode_rows
        if attn_metadata.prefill is not None:
            # The platform's kernels take K and V of decoder layers from the cache.
            super().forward(layer, query[rows:], key, value, kv_cache, attn_metadata.prefill, output[rows:])
        if attn_metadata.decode is not None:
            cache = bound.paged_cache(layer, kv_cache)

            def decode(query: torch.Tensor, batch: DecodeBatch, out: torch.Tensor) -> None:
                api.decode(
                    bound.group.kernel,
                    query,
                    cache,
                    batch,
                    bound.thetas,
                    bound.policy,
                    self.scale,
                    self.logits_soft_cap,
                    out,
                    bound.statistics,
                )

            bound.group.warm_up.run(decode, query, cache, attn_metadata.decode.block_table, output)
            decode(query[:rows], attn_metadata.decode, output[:rows])
        return output
