"""One attention layer on TOPTHETA: refusals at construction, then one call per step."""

from dataclasses import dataclass
from typing import Any

import torch
from vllm.config import get_current_vllm_config
from vllm.platforms import current_platform
from vllm.v1.attention.backends.cpu_attn import CPUAttentionBackendImpl

from topt_vllm.adaptation import ThetaController
from topt_vllm.attention import api
from topt_vllm.attention.common import DecodeBatch, PagedCache, Policy, RowThetas, Thetas
from topt_vllm.attention.quantiles import score_quantiles
from topt_vllm.backend.metadata import TopThetaMetadata
from topt_vllm.backend.metrics import recorder
from topt_vllm.backend.page import Tail, configure
from topt_vllm.backend.quantised import Quantisation
from topt_vllm.config import ConfigError, TopThetaConfig
from topt_vllm.sift import SiftLayer


@dataclass
class TopThetaLayer:
    """What a layer needs to decode.

    Attributes:
        implementation: The kernel.
        policy: Selection and compensation.
        thetas: Thresholds of this rank's query heads; None for θ = −inf, or with ``sift``.
        dense_reason: Why every row is dense, for the counters; None when they aren't.
        block_size: Slots of a block, as the metadata builder counts them.
        statistics: Accumulators of :class:`~topt_vllm.attention.common.Stat`.
        kv_replicas: Tensor-parallel ranks that hold each of the layer's KV heads.
        tail: What the cache pages carry behind K and V.
        controller: Moves ``thetas`` so that heads keep what the budget promises; None for thresholds as calibrated.
        sift: Thresholds of requests, under ``policy: sift``.
        cache: Views of ``source``; made when it is first seen.
        source: vLLM's tensor of the layer's cache.
        quantisation: Of an fp8 cache; None for one in a dtype of its own.
    """

    implementation: api.Implementation
    policy: Policy
    thetas: Thetas | None
    dense_reason: str | None
    block_size: int
    tail: Tail
    statistics: torch.Tensor
    kv_replicas: float = 1.0
    controller: ThetaController | None = None
    sift: SiftLayer | None = None
    cache: PagedCache | None = None
    source: torch.Tensor | None = None
    quantisation: Quantisation | None = None

    @property
    def skips(self) -> bool:
        """Whether the layer may skip rows at all."""
        return self.thetas is not None or self.sift is not None

    def paged_cache(self, kv_cache: torch.Tensor) -> PagedCache:
        """Views of vLLM's CPU cache [B, Hkv, P, 2D]: first all of a block's K as [D, P], then its V as [P, D].

        Raises:
            RuntimeError: The cache isn't what the metadata builder was told.
        """
        if self.cache is None or self.source is not kv_cache:
            num_blocks, num_kv_heads, block_size, _ = kv_cache.shape
            if block_size != self.block_size:
                raise RuntimeError(
                    f"cache blocks have {block_size} slots, {self.block_size} expected; this is a bug"
                )
            head_dim, quantised = self.tail.head_dim, self.quantisation
            stored = kv_cache if quantised is None else kv_cache.view(quantised.dtype)
            key, value = stored.view(num_blocks, num_kv_heads, 2 * block_size, head_dim).chunk(2, dim=2)
            key = key.view(num_blocks, num_kv_heads, head_dim, block_size).transpose(2, 3)
            needs_sums = self.policy.compensation == "vmean" and self.skips
            needs_screen = self.tail.screen_bytes > 0 and self.skips
            self.source = kv_cache
            self.cache = PagedCache(
                key,
                value,
                self.tail.value_sums(kv_cache) if needs_sums else None,
                self.tail.key_screen(kv_cache) if needs_screen else None,
                quantised.key_scale if quantised else None,
                quantised.value_scale if quantised else None,
            )
        return self.cache


class TopThetaImpl(CPUAttentionBackendImpl):
    """Decode rows go to the Top-Theta operator, prefill rows to vLLM's kernel."""

    bound: TopThetaLayer | None = None

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)
        config = TopThetaConfig.from_additional_config(get_current_vllm_config().additional_config)
        configure(config, current_platform.device_type)
        if self.is_fp8_kv_cache and config.k_screen != "off":
            raise ConfigError(
                f"toptheta.k_screen is {config.k_screen!r} and the cache {self.kv_cache_dtype!r}: an 8-bit copy "
                "of K is as large as K itself then, so screening would read more, not less. Set k_screen to off, "
                "or --kv-cache-dtype to auto."
            )
        if self.alibi_slopes is not None:
            raise NotImplementedError("TOPTHETA doesn't support ALiBi (alibi_slopes); use CPU_ATTN")
        if self.sinks is not None:
            raise NotImplementedError("TOPTHETA doesn't support attention sinks (sinks); use CPU_ATTN")
        # A window is short already: vLLM's kernel serves such a layer, and the rows are counted as dense.
        self.platform_reason = "sliding_window" if self.sliding_window != -1 else None

    def forward(  # type: ignore[override]
        self,
        layer: Any,
        query: torch.Tensor,
        key: torch.Tensor,
        value: torch.Tensor,
        kv_cache: torch.Tensor,
        attn_metadata: TopThetaMetadata | None,
        output: torch.Tensor,
        output_scale: torch.Tensor | None = None,
        output_block_scale: torch.Tensor | None = None,
    ) -> torch.Tensor:
        """One step of one layer; shapes as vLLM's ``CPUAttentionBackendImpl.forward``."""
        if attn_metadata is None:  # vLLM's warm-up
            return output
        if self.bound is None:
            raise RuntimeError("TOPTHETA layer used before its metadata builder was made; this is a bug")
        scales = (output_scale, output_block_scale)
        rows = attn_metadata.num_decode_rows
        if self.platform_reason:
            keys = attn_metadata.decode_lengths.clamp(max=self.sliding_window)
            kv_heads = self.num_kv_heads / self.bound.kv_replicas
            recorder().count_platform_rows(self.platform_reason, keys, self.num_heads, kv_heads)
            return super().forward(layer, query, key, value, kv_cache, attn_metadata.whole, output, *scales)
        cache = self.bound.paged_cache(kv_cache)
        api.finish_blocks(self.bound.implementation, cache, attn_metadata.finished_blocks)
        if attn_metadata.prefill is not None:
            super().forward(
                layer, query[rows:], key, value, kv_cache, attn_metadata.prefill, output[rows:], *scales
            )
        if attn_metadata.decode is not None:
            self._decode(self.bound, query[:rows], cache, attn_metadata, attn_metadata.decode, output[:rows])
        return output

    def _decode(
        self,
        bound: TopThetaLayer,
        query: torch.Tensor,
        cache: PagedCache,
        metadata: TopThetaMetadata,
        batch: DecodeBatch,
        output: torch.Tensor,
    ) -> None:
        """The decode rows; whatever moves thresholds sees them afterwards."""
        _count_dense_rows(bound, metadata)
        thetas: Thetas | RowThetas | None = bound.thetas
        if bound.sift is not None and metadata.sift is not None:
            thetas = bound.sift.thetas(metadata.sift)
        reached = bound.controller.counters(len(query)) if bound.controller is not None else None
        logits = self.scale, self.logits_soft_cap
        api.decode(
            bound.implementation,
            query,
            cache,
            batch,
            thetas,
            bound.policy,
            *logits,
            output,
            bound.statistics,
            reached,
        )
        if bound.controller is not None and reached is not None:
            bound.controller.count(reached, metadata.decode_lengths)
        if bound.sift is not None and metadata.sift is not None and metadata.sift.recording:
            recording = metadata.sift.recording
            bound.sift.record(
                metadata.sift, score_quantiles(query, cache, batch, recording, bound.sift.tau, *logits)
            )


def _count_dense_rows(bound: TopThetaLayer, metadata: TopThetaMetadata) -> None:
    """Counts why rows of the step are dense, each once."""
    if not bound.skips:
        recorder().count_dense_rows(bound.dense_reason, metadata.num_decode_rows)
        return
    recorder().count_dense_rows("short_context", metadata.short_rows)
    recorder().count_dense_rows("sift_warmup", metadata.warm_rows)
