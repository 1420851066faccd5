"""What one GPU layer needs to decode."""

import weakref
from dataclasses import dataclass
from typing import Any

import torch

from topt_vllm.attention.common import PagedCache, Policy, Thetas
from topt_vllm.backend import compat
from topt_vllm.backend.gpu.group import LayerGroup
from topt_vllm.backend.page import Tail


@dataclass
class GpuLayer:
    """Thresholds, counters and cache of one layer.

    Attributes:
        group: What the layers of a metadata builder share, the operator among it.
        policy: Selection and compensation.
        thetas: Thresholds of this rank's query heads, on the device; None for θ = −inf.
        block_size: Slots of a block, as the metadata builder counts them.
        statistics: Accumulators on the device, float64 [slots, 7].
        tail: What the cache pages carry behind K and V.
        cache: Views of vLLM's cache; made when it is first seen.
    """

    group: LayerGroup
    policy: Policy
    thetas: Thetas | None
    block_size: int
    statistics: torch.Tensor
    tail: Tail
    cache: PagedCache | None = None
    _source: weakref.ref[torch.Tensor] | None = None

    @property
    def keeps_sums(self) -> bool:
        """Whether decoding needs V sums."""
        return self.policy.compensation == "vmean" and self.thetas is not None

    def paged_cache(self, layer: Any, kv_cache: torch.Tensor) -> PagedCache:
        """Views of vLLM's cache [B, Hkv, P, 2D], in whatever order its layout has: a slot's K, then its V.

        They go when vLLM drops the cache: it makes a small one to measure memory with before the real one.

        Raises:
            RuntimeError: The cache isn't what the metadata builder was told.
        """
        if self.cache is None or self._source is None or self._source() is not kv_cache:
            self.cache = self._views(layer, kv_cache)
            self._source = weakref.ref(kv_cache, self._drop)
        return self.cache

    def _drop(self, _: weakref.ref[torch.Tensor]) -> None:
        self.cache = None

    def _views(self, layer: Any, kv_cache: torch.Tensor) -> PagedCache:
        if kv_cache.shape[2] != self.block_size:
            raise RuntimeError(
                f"cache blocks have {kv_cache.shape[2]} slots, {self.block_size} expected; this is a bug"
            )
        quantised = kv_cache.dtype == torch.uint8
        # A view remembers the tensor that it was taken of, which would keep vLLM's alive.
        stored = kv_cache.detach()
        if quantised:
            stored = stored.view(compat.stored_fp8_dtype())
        key, value = stored.split(self.tail.head_dim, dim=-1)
        return PagedCache(
            key,
            value,
            self.tail.value_sums(kv_cache) if self.keeps_sums else None,
            key_scale=layer._k_scale if quantised else None,
            value_scale=layer._v_scale if quantised else None,
        )
