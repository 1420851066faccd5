"""TOPTHETA for a model without thresholds: the backend that vLLM picks unasked, with its rows counted.

Kernels, cache, block size, graphs and features are those of the backend that was picked, and so is its name, by
which vLLM recognises what it warms up or can't combine.
"""

import logging
from functools import cache
from typing import Any, ClassVar

from vllm.config import VllmConfig, get_layers_from_vllm_config
from vllm.model_executor.layers.attention import Attention
from vllm.v1.attention.backend import CommonAttentionMetadata

from topt_vllm.backend import compat
from topt_vllm.backend.binding import count_platform_layers
from topt_vllm.backend.layers import describe_rank
from topt_vllm.backend.rows import few_rows, row_lengths, without_context
from topt_vllm.backend.skipping import warn_if_nothing_is_skipped
from topt_vllm.backend.startup import resolve

# A backend or a metadata builder of vLLM, when this is mixed into one.
_Platform: Any = object

logger = logging.getLogger("vllm.topt_vllm")


class StockBackend(_Platform):
    """Mixed into the backend that vLLM picks, by :func:`stock_backend`.

    Attributes:
        picked: That backend.
    """

    picked: ClassVar[type]

    @classmethod
    def validate_configuration(cls, **options: Any) -> list[str]:
        """Every reason not to serve a layer; among them, that vLLM would pick another backend for it."""
        reasons: list[str] = super().validate_configuration(**options)
        if reasons:
            return reasons
        try:
            picked = compat.unasked_backend_of_layer(options)
        except ValueError as error:
            return [str(error)]
        if picked is not cls.picked:
            reasons.append(
                f"vLLM picks {picked.get_name()} for this layer and {cls.get_name()} for others, and TOPTHETA "
                "without thresholds can be one of them only. Leave --attention-backend out, or set "
                "toptheta.implementation to triton"
            )
        return reasons


class StockBuilder(_Platform):
    """Mixed into the metadata builder of the backend that vLLM picks: counts the rows that decode."""

    def __init__(
        self,
        kv_cache_spec: Any,
        layer_names: list[str],
        vllm_config: VllmConfig,
        device: Any,
        **options: Any,
    ) -> None:
        super().__init__(kv_cache_spec, layer_names, vllm_config, device, **options)
        resolved = resolve(vllm_config)
        logger.info(resolved.description)
        warn_if_nothing_is_skipped(resolved, vllm_config)
        tensor_parallel_size = vllm_config.parallel_config.tensor_parallel_size
        describe_rank(resolved, tensor_parallel_size)
        layers = get_layers_from_vllm_config(vllm_config, Attention, layer_names)
        # Named so that they are no attributes of the builder that this is mixed into.
        self._toptheta_counters = count_platform_layers(layers, resolved, tensor_parallel_size)
        speculative = vllm_config.speculative_config
        # Drafted tokens of speculative decoding are decode rows too.
        self._toptheta_query_rows = 1 + ((speculative and speculative.num_speculative_tokens) or 0)
        self._toptheta_capturing = False

    def build(
        self, common_prefix_len: int, common_attn_metadata: CommonAttentionMetadata, fast_build: bool = False
    ) -> Any:
        """Builds the platform's metadata, and counts the step unless a graph is captured with it."""
        metadata = super().build(common_prefix_len, common_attn_metadata, fast_build)
        if not self._toptheta_capturing:
            self._count(common_attn_metadata)
        if self.supports_update_block_table:
            metadata.toptheta_batch = common_attn_metadata
        return metadata

    def build_for_cudagraph_capture(self, common_attn_metadata: CommonAttentionMetadata) -> Any:
        """Builds the metadata of a graph as the platform does."""
        self._toptheta_capturing = True
        metadata = super().build_for_cudagraph_capture(common_attn_metadata)
        self._toptheta_capturing = False
        return metadata

    def update_block_table(self, metadata: Any, blk_table: Any, slot_mapping: Any) -> Any:
        """Takes over what the builder of another KV cache group built, in place of :meth:`build`."""
        self._count(metadata.toptheta_batch)
        return super().update_block_table(metadata, blk_table, slot_mapping)

    def _count(self, common: CommonAttentionMetadata) -> None:
        decoding = few_rows(common, self._toptheta_query_rows)
        if decoding is not None and not without_context(*decoding):
            starts, lengths = decoding
            self._toptheta_counters.count(int(starts[-1]), row_lengths(starts, lengths))


@cache
def stock_backend(picked: Any) -> Any:
    """TOPTHETA's class on a backend of vLLM: its builder counts, and vLLM finds it where TOPTHETA is registered."""
    module, name = compat.BACKEND_PATH.rsplit(".", 1)

    def get_builder_cls() -> type:
        return _counting(picked.get_builder_cls())

    facts = {"__module__": module, "picked": picked, "get_builder_cls": staticmethod(get_builder_cls)}
    return type(name, (StockBackend, picked), facts)


@cache
def _counting(builder: type) -> type:
    return type(f"Counting{builder.__name__}", (StockBuilder, builder), {})
