"""One attention layer: refusals when it is made, its states after the cache write, then one call per step."""

from functools import partial
from typing import Any

import torch
from vllm.config import get_current_vllm_config
from vllm.v1.attention.backend import max_decode_query_len

from topt_vllm.attention import api
from topt_vllm.attention.common import DecodeArguments, DecodeBatch, LargestBatch, PagedCache
from topt_vllm.backend import compat, connectors
from topt_vllm.backend.group import on_buffers
from topt_vllm.backend.layer import TopThetaLayer
from topt_vllm.backend.metadata import TopThetaMetadata
from topt_vllm.backend.states import register

# An attention implementation of vLLM, when this is mixed into one.
_Platform: Any = object


class TopThetaImpl(_Platform):
    """Mixed into an attention implementation of vLLM: decode rows go to Top-Theta, prefill rows stay."""

    bound: TopThetaLayer | None = None
    # Why the platform's kernel decodes in this layer too; None where the operator does. Set as `bound` is.
    platform_reason: str | None = None
    # Whether it was made without its window, which no context outgrows.
    sees_all: bool = False
    # Whether it is of a draft model, or of a head that drafts.
    of_drafter: bool = False
    # Whether it was looked at for what it stores beside its cache.
    states_known: bool = False
    # What decodes in it, where that isn't the platform's kernel; known as `states_known` is.
    operator: api.Implementation | None = None
    # The same on its buffers, so that they are there when vLLM measures what memory is left for the cache.
    allocated: api.Implementation | None = None
    # vLLM's, [H], logits of the attention sinks of this rank's query heads; None without. A weight of the model
    # that may be loaded again at any time, so nobody keeps a copy.
    sinks: torch.Tensor | None
    logits_soft_cap: float
    num_heads: int
    num_kv_heads: int
    head_size: int
    # Every rank would need all of a context's V sums.
    supports_dcp: bool = False

    def __init__(
        self,
        num_heads: int,
        head_size: int,
        scale: float,
        num_kv_heads: int,
        alibi_slopes: list[float] | None = None,
        sliding_window: int | None = None,
        *args: Any,
        **kwargs: Any,
    ) -> None:
        self._vllm_config = get_current_vllm_config()
        self.of_drafter = compat.loads_drafter()
        if sliding_window is not None and sliding_window >= self._vllm_config.model_config.max_model_len:
            self.sees_all, sliding_window = True, None
        super().__init__(
            num_heads, head_size, scale, num_kv_heads, alibi_slopes, sliding_window, *args, **kwargs
        )
        for option, meaning in self.refused_options().items():
            if getattr(self, option, None) is not None:
                raise NotImplementedError(
                    f"TOPTHETA doesn't support {meaning} ({option}); use another --attention-backend"
                )

    @classmethod
    def refused_options(cls) -> dict[str, str]:
        """Attributes of vLLM's implementation that must not be set, and what they are."""
        return {"alibi_slopes": "ALiBi"}

    def views(self, layer: Any, kv_cache: torch.Tensor) -> PagedCache:
        """K, V and their scales in vLLM's cache [B, Hkv, P, 2D]."""
        raise NotImplementedError

    def process_weights_after_loading(self, act_dtype: torch.dtype) -> None:
        """As the platform does; and vLLM has not planned the cache yet, but made all layers of the model."""
        super().process_weights_after_loading(act_dtype)
        if self.bound is not None:
            # Loaded again, maybe with other scales of K and V.
            self.bound.cache = None
        if not self.states_known:
            register(self._vllm_config)

    def forward(
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
        """One step of one layer; shapes as the platform's ``forward``."""
        if output_scale is not None or output_block_scale is not None:
            raise NotImplementedError("TOPTHETA doesn't quantise its output (output_scale)")
        if attn_metadata is None:  # vLLM's profiling run
            self._allocate(query.device)
            return super().forward(layer, query, key, value, kv_cache, None, output)
        if self.platform_reason:
            return super().forward(layer, query, key, value, kv_cache, attn_metadata.whole, output)
        bound = self.bound
        if bound is None:
            raise RuntimeError("TOPTHETA layer used before its metadata builder was made; this is a bug")
        cache = bound.paged_cache(kv_cache, lambda kv_cache: self.views(layer, kv_cache))
        if bound.skips:
            connectors.wait_for(bound.states.by_name)
            # The platform has written the cache in an operation of its own, before attention.
            bound.group.kernel.finish(cache, attn_metadata.written)
            connectors.save(bound.states.by_name)
        rows, step = attn_metadata.num_decode_rows, attn_metadata.thresholds
        decode = partial(self._decode, bound, cache, step)
        if bound.group.warm_up is not None:
            kind, written = self._kind(bound, cache, step), attn_metadata.written
            bound.group.warm_up.run(
                kind, bound.group.kernel, decode, query, cache, written.block_table, output
            )
        if attn_metadata.prefill is not None:
            # The platform's kernels take K and V of decoder layers from the cache.
            super().forward(layer, query[rows:], key, value, kv_cache, attn_metadata.prefill, output[rows:])
        if attn_metadata.decode is not None:
            given = decode(query[:rows], attn_metadata.decode, output[:rows])
            bound.group.thresholds.after(bound.index, step, given)
        return output

    def _allocate(self, device: torch.device) -> None:
        """Allocates what the builder of this layer will ask for."""
        if self.allocated is not None or self.operator is None or not self.operator.capabilities.graphs:
            return
        config = self._vllm_config
        most = config.scheduler_config.max_num_seqs, max_decode_query_len(config)
        largest = LargestBatch(*most, self.num_heads, self.num_kv_heads, self.head_size, device)
        self.allocated = on_buffers(self.operator, largest)

    def _decode(
        self,
        bound: TopThetaLayer,
        cache: PagedCache,
        step: Any,
        query: torch.Tensor,
        batch: DecodeBatch,
        out: torch.Tensor,
    ) -> DecodeArguments:
        thresholds = bound.group.thresholds
        given = DecodeArguments(
            query,
            cache,
            batch,
            thresholds.of_rows(bound.index, step, len(query)),
            bound.selection,
            self.scale,
            self.logits_soft_cap,
            out,
            bound.statistics,
            thresholds.reached(bound.index, len(query)),
            self.sinks,
        )
        api.decode(bound.group.kernel, given)
        return given

    def _kind(self, bound: TopThetaLayer, cache: PagedCache, step: Any) -> tuple[bool, ...]:
        """What compiled kernels depend on that layers of a builder don't share."""
        # Triton asks whether 32 bits address a cache, and the one that vLLM measures memory with is small.
        small = cache.key.untyped_storage().nbytes() < 2**31
        # By step, for sift's rows of nobody and those that verify drafts are dense.
        by_step = step is not None
        return bound.skips, cache.key_screen is not None, self.sinks is not None, by_step, small
