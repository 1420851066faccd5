"""The tail of a cache page: per-block data of Top-Theta behind the block's K and V.

A page of vLLM's cache may be padded. TOPTHETA's pages carry the V sums of their block in the padding, and a low-bit
copy of its K where that is asked for: both count in its cache budget, live and die with the block, and need no
allocation of their own.
"""

from dataclasses import dataclass, replace
from typing import Any

import torch

from topt_vllm.attention.api import ScreenImplementation, load_implementation, screening
from topt_vllm.config import TopThetaConfig

_SUM_BYTES = 4  # float32
_ALIGNMENT = 64  # a cache line


@dataclass(frozen=True)
class Tail:
    """What lies behind K and V of one block.

    Attributes:
        num_kv_heads: KV heads of the layer on this rank.
        head_dim: D.
        screen_bytes: Bytes of the low-bit copy of K for one KV head; 0 for none.
    """

    num_kv_heads: int
    head_dim: int
    screen_bytes: int = 0

    @property
    def sums_bytes(self) -> int:
        """Bytes of the V sums, float32 [Hkv, D], up to a cache line."""
        return _aligned(self.num_kv_heads * self.head_dim * _SUM_BYTES)

    @property
    def bytes(self) -> int:
        """Bytes of the whole tail."""
        return self.sums_bytes + _aligned(self.num_kv_heads * self.screen_bytes)

    def extend(self, spec: Any) -> Any:
        """A vLLM ``AttentionSpec`` whose pages have room for the tail.

        For a hybrid model vLLM asks what one token takes, as a block of one slot, and multiplies (0.32): a tail
        belongs to a whole block, and each token would pay for one.
        """
        if spec.block_size == 1:
            return spec
        page = spec.unpadded_page_size_bytes + self.bytes
        return replace(spec, page_size_padded=max(page, spec.page_size_padded or 0))

    def describe(self, spec: Any, k_screen: str) -> str:
        """What the tail costs in the pages of a vLLM ``AttentionSpec``, for the log."""
        parts = f"V sums and {k_screen} copy of K" if self.screen_bytes else "V sums"
        share = self.bytes / self.extend(spec).page_size_bytes
        return f"{parts}: {share:.1%} of each cache page, {self.bytes} bytes per block of a layer"

    def value_sums(self, kv_cache: torch.Tensor) -> torch.Tensor:
        """V sums of every block, a view float32 [B, Hkv, D] of ``kv_cache`` [B, Hkv, P, 2D]."""
        first, page = self._place(kv_cache)
        flat = torch.empty(0, dtype=torch.float32, device=kv_cache.device).set_(kv_cache.untyped_storage())
        shape = (kv_cache.shape[0], self.num_kv_heads, self.head_dim)
        return flat.as_strided(shape, (page // _SUM_BYTES, self.head_dim, 1), first // _SUM_BYTES)

    def key_screen(self, kv_cache: torch.Tensor) -> torch.Tensor:
        """Low-bit copies of K, a view uint8 [B, Hkv, screen_bytes] of ``kv_cache`` [B, Hkv, P, 2D]."""
        first, page = self._place(kv_cache)
        flat = torch.empty(0, dtype=torch.uint8, device=kv_cache.device).set_(kv_cache.untyped_storage())
        shape = (kv_cache.shape[0], self.num_kv_heads, self.screen_bytes)
        return flat.as_strided(shape, (page, self.screen_bytes, 1), first + self.sums_bytes)

    def _place(self, kv_cache: torch.Tensor) -> tuple[int, int]:
        """Byte at which the first block's tail begins, and bytes of a page.

        Raises:
            RuntimeError: The pages have no room for the tail.
        """
        item = kv_cache.element_size()
        page, content = kv_cache.stride(0) * item, kv_cache[0].numel() * item
        if page - content < self.bytes:
            raise RuntimeError(
                f"cache pages of {page} bytes have no {self.bytes} bytes behind {content} of K and V; this is a bug"
            )
        return kv_cache.storage_offset() * item + content, page


# Of the engine that this process builds. vLLM asks a backend for its pages without an engine's configuration at
# hand (0.32), and remembers the backend of a layer shape for the process, so the backend class can't carry it.
_screen: ScreenImplementation | None = None


def configure(config: TopThetaConfig, device_type: str) -> None:
    """Settles what :func:`tail_of` gives; every layer calls it when it is made, before any page is laid out.

    Raises:
        ValueError: The configured implementation is not available here or has no K screen.
        RuntimeError: It can't be built.
    """
    global _screen
    _screen = None
    if config.k_screen != "off":
        _screen = screening(load_implementation(config.implementation, device_type)[1])


def tail_of(num_kv_heads: int, head_dim: int, block_size: int) -> Tail:
    """The tail of a layer's pages under the configuration in force."""
    screen_bytes = _screen.screen_bytes(head_dim, block_size) if _screen else 0
    return Tail(num_kv_heads, head_dim, screen_bytes)


def _aligned(size: int) -> int:
    return -(-size // _ALIGNMENT) * _ALIGNMENT
