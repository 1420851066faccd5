"""Builds a step's metadata: copies fields and slices, and waits for nothing that the device knows."""

import logging
from typing import Any, ClassVar

import torch
from vllm.config import VllmConfig, get_layers_from_vllm_config
from vllm.model_executor.layers.attention import Attention
from vllm.v1.attention.backend import AttentionCGSupport, CommonAttentionMetadata

from topt_vllm.attention.common import DecodeBatch
from topt_vllm.backend import compat
from topt_vllm.backend.binding import bind_layers
from topt_vllm.backend.counters import HostCounters
from topt_vllm.backend.impl import TopThetaImpl
from topt_vllm.backend.layers import describe_rank
from topt_vllm.backend.metadata import TopThetaMetadata
from topt_vllm.backend.rows import ExtrapolationNotice, row_lengths, rows_after, split, without_context
from topt_vllm.backend.skipping import warn_if_nothing_is_skipped
from topt_vllm.backend.startup import resolve
from topt_vllm.backend.states import describe, states_of

# A metadata builder of vLLM, when this is mixed into one.
_Platform: Any = object

logger = logging.getLogger("vllm.topt_vllm")


class TopThetaBuilder(_Platform):
    """Mixed into a metadata builder of vLLM: splits each batch, and binds the layers of its KV cache group."""

    # The platform's own builder class.
    platform_builder: ClassVar[Any]
    # Whether steps are replayed from CUDA graphs, which know uniform rows only, not what they are.
    replays_graphs: ClassVar[bool] = True
    # The metadata holds the platform's; vLLM would replace the block table of the outer one only.
    supports_update_block_table: bool = False

    def __init__(
        self, kv_cache_spec: Any, layer_names: list[str], vllm_config: VllmConfig, device: torch.device
    ) -> None:
        super().__init__(kv_cache_spec, layer_names, vllm_config, device)
        _refuse(kv_cache_spec)
        # Drafted tokens of speculative decoding are decode rows too.
        self._init_reorder_batch_threshold(1, supports_spec_as_decode=True)
        self._max_query_rows = self.reorder_batch_threshold or 1
        self._max_sequences = vllm_config.scheduler_config.max_num_seqs
        # The last row of a prompt gives its vector, which no table was made for.
        self._pools = vllm_config.model_config.runner_type == "pooling"

        resolved = resolve(vllm_config)
        describe_rank(resolved, compat.of_served_model(vllm_config).parallel_config.tensor_parallel_size)
        attention = get_layers_from_vllm_config(vllm_config, Attention, layer_names)
        layers = {name: layer for name, layer in attention.items() if isinstance(layer.impl, TopThetaImpl)}
        max_rows = self._max_sequences * self._max_query_rows
        self._bound = bind_layers(layers, resolved, kv_cache_spec.block_size, max_rows, vllm_config, device)
        warn_if_nothing_is_skipped(resolved, vllm_config)
        if self._bound.group is not None:
            logger.info(resolved.description)
            states = [states_of(name, layer, vllm_config) for name, layer in layers.items()]
            if cost := describe(kv_cache_spec, states):
                logger.info("TOPTHETA: %s", cost)
        # A builder of its own, for some keep what a step needs in buffers of theirs, such as FlashAttention 3 its
        # schedule, and `prefill` and `whole` are other batches.
        self._platform: Any = None
        if any(layer.impl.platform_reason for layer in layers.values()):
            self._platform = self.platform_builder(kv_cache_spec, layer_names, vllm_config, device)
        # A graph of several drafts has the platform's update in it, where the platform attends in all layers.
        self.supports_draft_decode_metadata_update = (
            self._platform is not None
            and self._bound.group is None
            and self._platform.supports_draft_decode_metadata_update
        )
        self._implementation = resolved.implementation
        self._dense_up_to = resolved.dense_up_to
        self._extrapolation = ExtrapolationNotice(resolved.calibrated_up_to)

    @classmethod
    def get_cudagraph_support(cls, vllm_config: VllmConfig, kv_cache_spec: Any) -> AttentionCGSupport:
        """Uniform batches, or what the platform's builder can do where that is less.

        A decode batch is one launch over rows and sequences whatever their lengths, so a graph of it replays. Where
        a batch splits depends on the batch, so graphs of mixed batches would not. Under ``policy: sift`` layers
        look at their rows while requests warm up, which no graph does.
        """
        if resolve(vllm_config).config.sift is not None:
            return AttentionCGSupport.NEVER
        platform = super().get_cudagraph_support(vllm_config, kv_cache_spec)
        return min(AttentionCGSupport.UNIFORM_BATCH, platform, key=lambda support: support.value)

    def build(
        self,
        common_prefix_len: int,
        common_attn_metadata: CommonAttentionMetadata,
        fast_build: bool = False,
    ) -> TopThetaMetadata:
        """Builds the metadata of a step of the model, whose thresholds move before it."""
        return self._build_step(common_attn_metadata, fast_build, self._bound.model, of_model=True)

    def build_for_drafting(
        self, common_attn_metadata: CommonAttentionMetadata, draft_index: int
    ) -> TopThetaMetadata:
        """Builds the metadata of a step of the draft model, whose layers alone run in it, or of its own drafts."""
        return self._build_step(common_attn_metadata, True, self._bound.drafts, of_model=False)

    def build_for_cudagraph_capture(self, common_attn_metadata: CommonAttentionMetadata) -> TopThetaMetadata:
        """Builds the metadata of a graph; the rows that are decoded while it is captured aren't counted.

        vLLM's second model runner also replays graphs with it while it serves, for steps of a data-parallel rank
        that has no request (0.31 to 0.33).
        """
        if self._bound.group is not None:
            self._bound.group.counters.hold()
        common = common_attn_metadata
        # Short contexts, or capturing takes long; none that is empty, so that every output is written.
        common.seq_lens.fill_(common.max_query_len)
        whole = None
        if self._platform is not None:
            whole = self._platform.build_for_cudagraph_capture(common)
            common.seq_lens.fill_(common.max_query_len)  # Triton attention's builder writes lengths too
        return self._metadata(common, self._split(common), whole, fast_build=False)

    def update_draft_decode_metadata(self, metadata: TopThetaMetadata) -> None:
        """Brings the metadata of a draft model's step to the next one, within a graph."""
        self._platform.update_draft_decode_metadata(metadata.whole)

    def _build_step(
        self, common: CommonAttentionMetadata, fast_build: bool, counters: HostCounters, of_model: bool
    ) -> TopThetaMetadata:
        parts = self._split(common)
        whole = None if self._platform is None else self._platform.build(0, common, fast_build)
        metadata = self._metadata(common, parts, whole, fast_build)
        group = self._bound.group
        if group is not None:
            if group.counters.release():
                group.thresholds.forget()
            group.counters.publish()
        num_decodes = parts[0]
        if not num_decodes:
            return metadata
        starts = common.query_start_loc_cpu[: num_decodes + 1]
        seq_lens = self._host_lengths(common)
        nobodys = seq_lens is not None and self._are_nobodys(starts, seq_lens[:num_decodes])
        lengths = None if seq_lens is None or nobodys else row_lengths(starts, seq_lens[:num_decodes])
        warming = 0
        # A speculator of vLLM's second model runner has a builder of its own for its layers' part of a group.
        if group is not None and of_model and self._bound.sparse:
            metadata.thresholds = group.thresholds.before(common, starts, lengths)
            warming = group.thresholds.rows_before_known(metadata.thresholds, self._dense_up_to)
        elif group is not None and not of_model:
            metadata.thresholds = group.thresholds.of_drafts()
        if nobodys:
            if group is not None:
                group.counters.hold()
            return metadata
        counters.count(int(starts[-1]), lengths, warming)
        if lengths is not None:
            self._extrapolation.see(lengths)
        return metadata

    def _split(self, common: CommonAttentionMetadata) -> tuple[int, int, bool]:
        # A graph of uniform rows is replayed for ends of prompts too, so they have to be decode rows. Warm-up
        # batches don't say what they are.
        decode = self.replays_graphs or not self._pools or common.is_prefilling is None
        return split(common, self._max_query_rows, ends_of_prompts_decode=decode)

    def _are_nobodys(self, starts: torch.Tensor, seq_lens: torch.Tensor) -> bool:
        """Whether decode rows belong to no request. On CPUs vLLM builds no metadata for such."""
        return self.replays_graphs and without_context(starts, seq_lens)

    def _host_lengths(self, common: CommonAttentionMetadata) -> torch.Tensor | None:
        """int32 [S] on the host, context length of each request (tokens), where known."""
        return common.seq_lens_cpu_upper_bound

    def _metadata(
        self,
        common: CommonAttentionMetadata,
        parts: tuple[int, int, bool],
        whole: Any | None,
        fast_build: bool,
    ) -> TopThetaMetadata:
        num_decodes, num_rows, has_prefill = parts
        group = self._bound.group
        written = DecodeBatch(
            common.query_start_loc, common.seq_lens, common.block_table_tensor, common.max_query_len
        )
        decode = prefill = None
        if group is not None:
            group.allocate(self._max_sequences, self._max_query_rows)
        if num_decodes and group is not None:
            decode = DecodeBatch(
                common.query_start_loc[: num_decodes + 1],
                common.seq_lens[:num_decodes],
                common.block_table_tensor[:num_decodes],
                min(common.max_query_len, self._max_query_rows),
            )
        if has_prefill and group is not None:
            prefill = super().build(0, rows_after(common, num_decodes, num_rows), fast_build)
        return TopThetaMetadata(common.num_actual_tokens, num_rows, written, decode, prefill, whole)


def _refuse(spec: Any) -> None:
    """Refuses caches of layers that θ(n) doesn't mean.

    Raises:
        NotImplementedError: Names what the layers do.
    """
    if getattr(spec, "attention_chunk_size", None) is not None:
        raise NotImplementedError("TOPTHETA doesn't support chunked local attention (attention_chunk_size)")
    if getattr(spec, "non_causal", False):
        raise NotImplementedError("TOPTHETA doesn't support attention that is not causal (non_causal)")
    if spec.head_size_v != spec.head_size:
        raise NotImplementedError(
            f"TOPTHETA needs heads of K and V of one size, not {spec.head_size} and {spec.head_size_v}; "
            "use another --attention-backend"
        )
