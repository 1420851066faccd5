"""Builds a step's metadata: which rows decode, which are prefill, and which blocks the step finishes."""

import logging
from typing import TYPE_CHECKING, Any

import torch
from vllm.config import get_layers_from_vllm_config
from vllm.model_executor.layers.attention import Attention
from vllm.v1.attention.backend import CommonAttentionMetadata
from vllm.v1.attention.backends.cpu_attn import CPUAttentionMetadataBuilder

from topt_vllm.attention.common import DecodeBatch
from topt_vllm.backend import requests
from topt_vllm.backend.impl import TopThetaImpl
from topt_vllm.backend.layers import bind_layer, describe_rank
from topt_vllm.backend.metadata import TopThetaMetadata
from topt_vllm.backend.page import tail_of
from topt_vllm.backend.rows import ExtrapolationNotice, row_lengths, rows_after, split
from topt_vllm.backend.startup import resolve
from topt_vllm.sift import SiftRequests, SiftStep

if TYPE_CHECKING:
    from vllm.config import VllmConfig

logger = logging.getLogger("vllm.topt_vllm")

# ISAs of vLLM's kernels whose cache layout is K [D, P], V [P, D] (0.32). AMX and NEON lay K out differently.
_READABLE_ISAS = ("vec", "vec16")


class TopThetaMetadataBuilder(CPUAttentionMetadataBuilder):
    """Splits each batch, and gives the layers of its KV cache group their thresholds when it is made."""

    def __init__(
        self, kv_cache_spec: Any, layer_names: list[str], vllm_config: "VllmConfig", device: torch.device
    ) -> None:
        super().__init__(kv_cache_spec, layer_names, vllm_config, device)
        self.isa: str
        if self.isa == "amx":
            self.isa = "vec"
            self._set_isa_to_layers(layer_names)
            logger.info("TOPTHETA: prefill uses vLLM's vector kernels instead of AMX, whose K layout differs")
        if self.isa not in _READABLE_ISAS:
            raise NotImplementedError(
                f"TOPTHETA reads the cache layouts {_READABLE_ISAS}, but vLLM uses {self.isa!r} on this CPU. "
                "Use --attention-backend CPU_ATTN here."
            )
        # Drafted tokens of speculative decoding are decode rows too.
        self._init_reorder_batch_threshold(1, supports_spec_as_decode=True)

        resolved = resolve(vllm_config)
        logger.info(resolved.description)
        tensor_parallel_size = vllm_config.parallel_config.tensor_parallel_size
        describe_rank(resolved, tensor_parallel_size)
        tail = tail_of(kv_cache_spec.num_kv_heads, kv_cache_spec.head_size, kv_cache_spec.block_size)
        logger.info("TOPTHETA: %s", tail.describe(kv_cache_spec, resolved.config.k_screen))
        # The last row of a prompt gives its vector, which no table was made for.
        self._pools = vllm_config.model_config.runner_type == "pooling"
        self._dense_up_to = resolved.dense_up_to
        self._extrapolation = ExtrapolationNotice(resolved.calibrated_up_to)
        self._sift = None if resolved.config.sift is None else SiftRequests(resolved.config.sift)
        if self._sift is not None:
            requests.watch(self._sift)
        layers = get_layers_from_vllm_config(vllm_config, Attention, layer_names)
        for name, layer in layers.items():
            if isinstance(layer.impl, TopThetaImpl):
                bind_layer(layer, name, resolved, self.block_size, tensor_parallel_size)
        self._any_layer_stays_dense = any(
            isinstance(layer.impl, TopThetaImpl) and layer.impl.platform_reason for layer in layers.values()
        )

    def build(  # type: ignore[override]
        self,
        common_prefix_len: int,
        common_attn_metadata: CommonAttentionMetadata,
        fast_build: bool = False,
    ) -> TopThetaMetadata:
        """Builds the step's metadata; a batch that is not causal is prefill as a whole."""
        common = common_attn_metadata
        threshold = self.reorder_batch_threshold or 1
        # Warm-up batches don't say what they are.
        decoding = not self._pools or common.is_prefilling is None
        num_decodes, num_decode_rows, has_prefill = split(common, threshold, ends_of_prompts_decode=decoding)
        decode = None
        if num_decodes:
            decode = DecodeBatch(
                common.query_start_loc[: num_decodes + 1],
                common.seq_lens[:num_decodes],
                common.block_table_tensor[:num_decodes],
                min(common.max_query_len, threshold),
            )
        prefill = None
        if has_prefill:
            prefill = super().build(0, rows_after(common, num_decodes, num_decode_rows), fast_build)
        whole = super().build(0, common, fast_build) if self._any_layer_stays_dense else None
        lengths = torch.empty(0, dtype=torch.int64)
        if decode is not None:
            lengths = row_lengths(decode.query_start_loc, decode.seq_lens)
            self._extrapolation.see(lengths)
        short = lengths <= self._dense_up_to
        sift = None if decode is None else self._sift_step(common, decode, lengths)
        return TopThetaMetadata(
            common.num_actual_tokens,
            num_decode_rows,
            decode,
            lengths,
            prefill,
            whole,
            int(short.sum()),
            0 if sift is None else int((sift.warm & ~short).sum()),
            sift,
            self._finished_blocks(common.slot_mapping[: common.num_actual_tokens]),
        )

    def _sift_step(
        self, common: CommonAttentionMetadata, decode: DecodeBatch, lengths: torch.Tensor
    ) -> SiftStep | None:
        if self._sift is None:
            return None
        names = requests.of_batch(common, len(decode.seq_lens))
        return self._sift.step(names, decode.query_start_loc, lengths)

    def _finished_blocks(self, slot_mapping: torch.Tensor) -> torch.Tensor:
        last = (slot_mapping >= 0) & (slot_mapping % self.block_size == self.block_size - 1)
        return slot_mapping[last] // self.block_size
