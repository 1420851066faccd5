"""Prefill by vLLM's AMX kernels of a cache that is laid out for vector kernels, as the operator reads it.

AMX attention is three to four times as fast as vector attention, but lays K and V out in tiles. What a step's
prompts read of the cache is copied into tiles first, layer by layer: one pass over memory.
"""

import logging
from dataclasses import dataclass, field

import torch
from vllm import _custom_ops as ops
from vllm.v1.attention.backend import CommonAttentionMetadata
from vllm.v1.attention.backends.cpu_attn import CPUAttentionMetadata

from topt_vllm.attention.api import Implementation
from topt_vllm.attention.common import PagedCache
from topt_vllm.backend import compat

logger = logging.getLogger("vllm.topt_vllm")

# Query vectors that read a copied row, on average, from which on a copy is made: it costs what AMX spares some 20.
_MIN_READERS = 64


@dataclass(frozen=True)
class Copy:
    """The blocks that a step's prompts read.

    Attributes:
        implementation: Copies them.
        blocks: int64 [n], physical blocks, in the order in which they are copied.
        block_table: int32 [S, blocks of the longest], places in the copy.
    """

    implementation: Implementation
    blocks: torch.Tensor
    block_table: torch.Tensor

    def load(self, cache: PagedCache) -> torch.Tensor:
        """The blocks of a layer's cache as AMX kernels read them [n, Hkv, P, 2 D]; the next load overwrites it."""
        _, num_kv_heads, block_size, head_dim = cache.key.shape
        memory = _Memory.take((len(self.blocks), num_kv_heads, block_size, 2 * head_dim), cache.key.dtype)
        self.implementation.copy_to_amx(cache, self.blocks, memory)
        return memory


@dataclass
class CopyMetadata(CPUAttentionMetadata):
    """Of a batch whose block table names places in a copy."""

    copy: Copy = field(kw_only=True)


@dataclass(frozen=True)
class Copies:
    """What to copy for a batch.

    Attributes:
        implementation: Copies blocks.
        block_size: Slots of a cache block.
        query_heads_per_kv: Query heads of each KV head.
        max_tokens: Most tokens of a copy.
    """

    implementation: Implementation
    block_size: int
    query_heads_per_kv: int
    max_tokens: int

    def of(self, common: CommonAttentionMetadata) -> Copy | None:
        """For a batch of prompts; None where vector kernels are as fast, or the copy would be too large."""
        contexts = common.seq_lens[: common.num_reqs].long()
        starts = common.query_start_loc_cpu[: common.num_reqs + 1].long()
        tokens = int(contexts.sum())
        readers = int(((starts[1:] - starts[:-1]) * contexts).sum()) * self.query_heads_per_kv
        if not 0 < tokens <= self.max_tokens or readers < _MIN_READERS * tokens:
            return None
        counts = (contexts + self.block_size - 1) // self.block_size
        places = torch.arange(int(counts.max()))
        used = places < counts[:, None]
        first = counts.cumsum(0) - counts
        table = torch.where(used, places + first[:, None], 0).int()
        blocks = common.block_table_tensor[: common.num_reqs, : len(places)][used].long()
        return Copy(self.implementation, blocks, table)


class _Memory:
    """What copies are written to: layers run one after another, so all have the same."""

    bytes = torch.empty(0, dtype=torch.uint8)

    @classmethod
    def take(cls, shape: tuple[int, ...], dtype: torch.dtype) -> torch.Tensor:
        """As much of it, grown where it is too small; contents are what they were."""
        size = dtype.itemsize * torch.Size(shape).numel()
        if len(cls.bytes) < size:
            cls.bytes = torch.empty(size, dtype=torch.uint8)
        return cls.bytes[:size].view(dtype).view(shape)


def reads(implementation: Implementation, dtype: torch.dtype, kv_cache_dtype: str) -> bool:
    """Whether caches can be copied; where not, the log says that prompts take vLLM's vector kernels, and why.

    Args:
        implementation: Reads the cache.
        dtype: Of the model.
        kv_cache_dtype: vLLM's name of the cache's.
    """
    if compat.CPU_FP8_DTYPES.get(kv_cache_dtype) is torch.float8_e4m3fn:
        # On average by 1.7 % of an output's root mean square in 0.32, where vector kernels and fp8_e5m2 are exact.
        reason = "of fp8_e4m3 they are inexact"
    elif not implementation.capabilities.amx_copies:
        reason = "the implementation doesn't copy caches"
    elif not torch.cpu._init_amx():  # asks Linux, once for a process; in engines oneDNN has, too
        reason = "Linux doesn't let this process use AMX"
    elif not _writes_as_vllm(implementation, dtype, kv_cache_dtype):
        reason = "this vLLM lays out caches for AMX in another way"
    else:
        return True
    logger.info("TOPTHETA: prompts take vLLM's vector kernels, slower than its AMX kernels: %s", reason)
    return False


def _writes_as_vllm(implementation: Implementation, dtype: torch.dtype, kv_cache_dtype: str) -> bool:
    """Whether copies are laid out as vLLM's AMX writer does it, for which its versions may differ."""
    block_size, head_dim = 32, 64
    numbers = torch.arange(2 * block_size * head_dim)
    stored = compat.CPU_FP8_DTYPES.get(kv_cache_dtype)
    if stored is None:
        rows = numbers.to(torch.int16).view(dtype)
    else:  # such as no rounding changes
        rows = (numbers % 113).to(torch.uint8).view(stored).to(dtype)
    caches = torch.zeros(2, 1, 1, 2 * block_size, head_dim, dtype=dtype if stored is None else torch.uint8)
    for isa, memory in zip(("vec", "amx"), caches, strict=True):
        parts = *rows.view(2, block_size, 1, head_dim), *memory.chunk(2, dim=2), torch.arange(block_size)
        ops.cpu_attn_reshape_and_cache(*parts, isa, kv_cache_dtype=kv_cache_dtype)
    vectors, tiles = caches.view(stored or dtype)
    key, value = vectors.chunk(2, dim=2)
    cache = PagedCache(key.view(1, 1, head_dim, block_size).transpose(2, 3), value)
    copy = Copy(implementation, torch.tensor([0]), torch.zeros(1, 1, dtype=torch.int32)).load(cache)
    return torch.equal(*(part.flatten().view(torch.uint8) for part in (copy, tiles)))
