"""What one layer needs to decode."""

import weakref
from collections.abc import Callable
from dataclasses import dataclass, replace

import torch

from topt_vllm.attention.common import KeyScreen, PagedCache, Selection
from topt_vllm.backend.group import LayerGroup
from topt_vllm.backend.states import LayerStates


@dataclass
class TopThetaLayer:
    """Thresholds, counters, cache and states of one layer.

    Attributes:
        group: What the layers of a metadata builder share, the operator among it.
        selection: Selection and compensation.
        index: Its place in the group.
        statistics: Accumulators on the cache's device, float64 [slots, 8].
        states: What the layer has beside its cache.
        key_screen: The layer's K screen without its codes; None for none.
        cache: Views of vLLM's tensors; made when they are first seen.
    """

    group: LayerGroup
    selection: Selection
    index: int
    statistics: torch.Tensor
    states: LayerStates
    key_screen: KeyScreen | None = None
    cache: PagedCache | None = None
    _source: weakref.ref[torch.Tensor] | None = None

    @property
    def skips(self) -> bool:
        """Whether it may skip rows."""
        return self.group.thresholds.skips(self.index)

    def paged_cache(self, kv_cache: torch.Tensor, views: Callable[[torch.Tensor], PagedCache]) -> PagedCache:
        """Views of vLLM's cache and of the layer's states.

        They go when vLLM drops the cache: on GPUs it makes a small one to measure memory with before the real one.

        Args:
            kv_cache: [B, Hkv, P, 2D], in whatever order its layout has.
            views: K, V and their scales in it, as the platform stores them.

        Raises:
            RuntimeError: The cache isn't what the metadata builder was told.
        """
        if self.cache is None or self._source is None or self._source() is not kv_cache:
            if kv_cache.shape[2] != self.group.block_size:
                raise RuntimeError(
                    f"cache blocks have {kv_cache.shape[2]} slots, {self.group.block_size} expected; this is a bug"
                )
            # A view remembers the tensor that it was taken of, which would keep vLLM's alive.
            self.cache = self._with_states(views(kv_cache.detach()))
            self._source = weakref.ref(kv_cache, self._drop)
        return self.cache

    def _with_states(self, cache: PagedCache) -> PagedCache:
        if not self.skips:
            return cache
        sums, codes = self.states.value_sums, self.states.key_screen
        if sums is not None and self.selection.compensation == "vmean":
            cache = replace(cache, value_sums=sums.numbers())
        screen = self.key_screen
        if screen is not None and codes is not None:
            screen = replace(screen, codes=codes.codes())
        return replace(cache, key_screen=screen)

    def _drop(self, _: weakref.ref[torch.Tensor]) -> None:
        self.cache = None
