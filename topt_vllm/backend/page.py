"""The tail of a cache page: per-block data of Top-Theta behind the block's K and V.

A page of vLLM's cache may be padded. TOPTHETA's pages carry the V sums of their block in the padding, so they are
counted in vLLM's cache budget, live and die with the block, and need no allocation of their own.
"""

from dataclasses import replace
from typing import Any

import torch

_SUM_BYTES = 4  # float32


def tail_bytes(num_kv_heads: int, head_dim: int) -> int:
    """Bytes behind K and V of one block: V sums, float32 [Hkv, D]."""
    return num_kv_heads * head_dim * _SUM_BYTES


def with_tail(spec: Any) -> Any:
    """A vLLM ``AttentionSpec`` whose pages have room for the tail."""
    page = spec.unpadded_page_size_bytes + tail_bytes(spec.num_kv_heads, spec.head_size)
    return replace(spec, page_size_padded=max(page, spec.page_size_padded or 0))


def value_sums(kv_cache: torch.Tensor) -> torch.Tensor:
    """V sums of every block as a view into the pages' tails.

    Args:
        kv_cache: [B, Hkv, P, 2D], pages padded by :func:`with_tail`.

    Returns:
        float32 [B, Hkv, D].

    Raises:
        RuntimeError: The pages have no room for the tail.
    """
    num_blocks, num_kv_heads, block_size, width = kv_cache.shape
    head_dim = width // 2
    item = kv_cache.element_size()
    page, content = kv_cache.stride(0) * item, num_kv_heads * block_size * width * item
    if page - content < tail_bytes(num_kv_heads, head_dim):
        raise RuntimeError(
            f"cache pages of {page} bytes have no room behind {content} bytes of K and V; this is a bug"
        )
    first = kv_cache.storage_offset() * item + content
    flat = torch.empty(0, dtype=torch.float32).set_(kv_cache.untyped_storage())
    return flat.as_strided(
        (num_blocks, num_kv_heads, head_dim), (page // _SUM_BYTES, head_dim, 1), first // _SUM_BYTES
    )
