"""Builds a step's metadata on a GPU: copies fields and slices, and waits for nothing that the device knows."""

import logging
from typing import TYPE_CHECKING, Any, ClassVar

import torch
from vllm.config import get_layers_from_vllm_config
from vllm.model_executor.layers.attention import Attention
from vllm.v1.attention.backend import AttentionCGSupport, CommonAttentionMetadata

from topt_vllm.attention.common import DecodeBatch
from topt_vllm.backend.gpu.binding import bind_layers
from topt_vllm.backend.gpu.impl import GpuImpl
from topt_vllm.backend.gpu.metadata import GpuMetadata
from topt_vllm.backend.layers import describe_rank
from topt_vllm.backend.page import Tail
from topt_vllm.backend.rows import ExtrapolationNotice, rows_after, split
from topt_vllm.backend.startup import resolve

if TYPE_CHECKING:
    from vllm.config import VllmConfig

# A metadata builder of vLLM, when this is mixed into one.
_Platform: Any = object

logger = logging.getLogger("vllm.topt_vllm")


class GpuBuilder(_Platform):
    """Mixed into a metadata builder of vLLM: splits each batch, and binds the layers of its KV cache group."""

    # The platform's own builder class.
    platform_builder: ClassVar[Any]
    # The metadata holds the platform's; vLLM would replace the block table of the outer one only.
    supports_update_block_table: bool = False

    def __init__(
        self, kv_cache_spec: Any, layer_names: list[str], vllm_config: "VllmConfig", device: torch.device
    ) -> None:
        super().__init__(kv_cache_spec, layer_names, vllm_config, device)
        _refuse(kv_cache_spec)
        # A speculator's graph would call the platform's own update on our metadata.
        self.supports_draft_decode_metadata_update = False
        # Drafted tokens of speculative decoding are decode rows too.
        self._init_reorder_batch_threshold(1, supports_spec_as_decode=True)
        self._max_query_rows = self.reorder_batch_threshold or 1

        resolved = resolve(vllm_config)
        logger.info(resolved.description)
        tensor_parallel_size = vllm_config.parallel_config.tensor_parallel_size
        describe_rank(resolved, tensor_parallel_size)
        block_size = kv_cache_spec.block_size
        tail = Tail(kv_cache_spec.num_kv_heads, kv_cache_spec.head_size)
        logger.info("TOPTHETA: %s", tail.describe(kv_cache_spec, resolved.config.k_screen))
        layers = get_layers_from_vllm_config(vllm_config, Attention, layer_names)
        impls = {name: layer.impl for name, layer in layers.items() if isinstance(layer.impl, GpuImpl)}
        self._group, self._counters = bind_layers(impls, resolved, block_size, tensor_parallel_size, device)
        # A builder of its own, for some keep what a step needs in buffers of theirs, such as FlashAttention 3 its
        # schedule, and `prefill` and `whole` are other batches.
        self._platform: Any | None = None
        if any(impl.platform_reason for impl in impls.values()):
            self._platform = self.platform_builder(kv_cache_spec, layer_names, vllm_config, device)
        self._captured = False
        self._extrapolation = ExtrapolationNotice(resolved.calibrated_up_to)

    @classmethod
    def get_cudagraph_support(cls, vllm_config: "VllmConfig", kv_cache_spec: Any) -> AttentionCGSupport:
        """Uniform batches, or what the platform's builder can do where that is less.

        A decode batch is one launch over rows and sequences whatever their lengths, so a graph of it replays. Where
        a batch splits depends on the batch, so graphs of mixed batches would not.
        """
        platform = super().get_cudagraph_support(vllm_config, kv_cache_spec)
        return min(AttentionCGSupport.UNIFORM_BATCH, platform, key=lambda support: support.value)

    def build(
        self,
        common_prefix_len: int,
        common_attn_metadata: CommonAttentionMetadata,
        fast_build: bool = False,
    ) -> GpuMetadata:
        """Builds a step's metadata and counts what the host knows of it."""
        common = common_attn_metadata
        parts = self._split(common)
        whole = None if self._platform is None else self._platform.build(0, common, fast_build)
        metadata = self._build(common, parts, whole, fast_build)
        if self._group is not None:
            if self._captured:
                self._captured = False
                self._group.statistics.reset()
            self._group.statistics.publish()
        if num_decodes := parts[0]:
            lengths = common.seq_lens_cpu_upper_bound
            lengths = None if lengths is None else lengths[:num_decodes]
            self._counters.count(common.query_start_loc_cpu[: num_decodes + 1], lengths)
            if lengths is not None:
                self._extrapolation.see(lengths)
        return metadata

    def build_for_cudagraph_capture(self, common_attn_metadata: CommonAttentionMetadata) -> GpuMetadata:
        """Builds the metadata of a graph; the rows that are decoded while it is captured aren't counted."""
        self._captured = True
        common = common_attn_metadata
        # Short contexts, or capturing takes long; none that is empty, so that every output is written.
        common.seq_lens.fill_(common.max_query_len)
        whole = None
        if self._platform is not None:
            whole = self._platform.build_for_cudagraph_capture(common)
            common.seq_lens.fill_(common.max_query_len)  # Triton attention's builder writes lengths too
        return self._build(common, self._split(common), whole, fast_build=False)

    def _split(self, common: CommonAttentionMetadata) -> tuple[int, int, bool]:
        # A graph of uniform rows is replayed for ends of prompts too, so they have to be decode rows.
        return split(common, self._max_query_rows, ends_of_prompts_decode=True)

    def _build(
        self,
        common: CommonAttentionMetadata,
        parts: tuple[int, int, bool],
        whole: Any | None,
        fast_build: bool,
    ) -> GpuMetadata:
        num_decodes, num_rows, has_prefill = parts
        decode = prefill = None
        if num_decodes and self._group is not None:
            decode = DecodeBatch(
                common.query_start_loc[: num_decodes + 1],
                common.seq_lens[:num_decodes],
                common.block_table_tensor[:num_decodes],
                min(common.max_query_len, self._max_query_rows),
            )
            max_sequences = self.vllm_config.scheduler_config.max_num_seqs
            self._group.allocate(max_sequences, self._max_query_rows)
        if has_prefill and self._group is not None:
            prefill = super().build(0, rows_after(common, num_decodes, num_rows), fast_build)
        return GpuMetadata(common.num_actual_tokens, num_rows, decode, prefill, whole)


def _refuse(spec: Any) -> None:
    """Refuses caches of layers that θ(n) doesn't mean.

    Raises:
        NotImplementedError: Names what the layers do.
    """
    if getattr(spec, "attention_chunk_size", None) is not None:
        raise NotImplementedError("TOPTHETA doesn't support chunked local attention (attention_chunk_size)")
    if spec.head_size_v != spec.head_size:
        raise NotImplementedError(
            f"TOPTHETA needs heads of K and V of one size, not {spec.head_size} and {spec.head_size_v}"
        )
