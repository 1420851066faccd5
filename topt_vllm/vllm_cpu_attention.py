"""vLLM's attention on CPUs, CPU_ATTN, as calls on tensors: a dense kernel for prompts and for decoding.

vLLM is imported when it is first needed, for that takes seconds.
"""

import logging
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from functools import cache, partial

import torch

from topt_vllm.attention.common import DecodeBatch


@dataclass(frozen=True)
class CpuAttention:
    """CPU_ATTN on one kind of KV cache, [B, Hkv, 2 P, D]: K of a block in the first half, V after it.

    Attributes:
        instructions: vLLM's name of those that it uses; each stores K in a layout of its own.
        cache_dtype: vLLM's name of the cache's dtype; "auto" for the query's.
    """

    instructions: str
    cache_dtype: str = "auto"

    def write(
        self, key: torch.Tensor, value: torch.Tensor, memory: torch.Tensor, slots: torch.Tensor
    ) -> None:
        """Writes rows into a cache.

        Args:
            key: [T, Hkv, D], a head's channels side by side.
            value: [T, Hkv, D], as ``key``.
            memory: The cache.
            slots: int64 [T], where each row goes: its block · P + its row in it.
        """
        from vllm import _custom_ops as ops

        halves = self._stored(memory).chunk(2, dim=2)
        ops.cpu_attn_reshape_and_cache(
            key, value, *halves, slots, self.instructions, kv_cache_dtype=self.cache_dtype
        )

    def bind(
        self,
        query: torch.Tensor,
        memory: torch.Tensor,
        batch: DecodeBatch,
        out: torch.Tensor,
        scale: float,
        softcap: float = 0.0,
    ) -> Callable[[], None]:
        """A call of the kernel, with everything prepared that vLLM prepares once for all layers.

        Args:
            query: [rows, H, D], a head's channels side by side.
            memory: The cache.
            batch: Whose rows they are; each sees the keys up to its own.
            out: [rows, H, D], contiguous.
            scale: Factor of q·k.
            softcap: Logits softcap, 0 for none.
        """
        from vllm import _custom_ops as ops
        from vllm import envs

        key, value = self._stored(memory).chunk(2, dim=2)
        metadata = ops.cpu_attn_get_scheduler_metadata(
            num_reqs=len(batch.seq_lens),
            num_heads=query.shape[1],
            num_kv_heads=memory.shape[1],
            head_dim=query.shape[2],
            seq_lens=batch.seq_lens,
            dtype=query.dtype,
            query_start_loc=batch.query_start_loc,
            causal=True,
            sliding_window_size=-1,
            isa=self.instructions,
            enable_kv_split=envs.VLLM_CPU_ATTN_SPLIT_KV,
            kv_cache_dtype=self.cache_dtype,
        )
        return partial(
            ops.cpu_attention_with_kv_cache,
            query=query,
            key_cache=key,
            value_cache=value,
            output=out,
            query_start_loc=batch.query_start_loc,
            seq_lens=batch.seq_lens,
            scale=scale,
            causal=True,
            alibi_slopes=None,
            sliding_window=-1,
            block_table=batch.block_table,
            softcap=softcap,
            scheduler_metadata=metadata,
            s_aux=None,
            kv_cache_dtype=self.cache_dtype,
        )

    def _stored(self, memory: torch.Tensor) -> torch.Tensor:
        return memory if self.cache_dtype == "auto" else memory.view(torch.uint8)


def choose(
    dtype: torch.dtype, block_size: int, head_dim: int, cache_dtype: str = "auto"
) -> CpuAttention | None:
    """CPU_ATTN as vLLM would run it on this CPU; None where it has none here, or none of this dtype and size."""
    if not _loaded():
        return None
    from vllm.v1.attention.backends.cpu_attn import CPUAttentionBackend, _get_attn_isa

    if dtype not in CPUAttentionBackend.supported_dtypes:
        return None
    if head_dim not in CPUAttentionBackend.get_supported_head_sizes():
        return None
    try:
        return CpuAttention(_get_attn_isa(dtype, block_size, head_dim, cache_dtype), cache_dtype)
    except NotImplementedError:  # fp8 on this CPU, or of this size
        return None


@cache
def _loaded() -> bool:
    """Whether vLLM's kernels for CPUs are installed; loads them."""
    with _quiet():
        try:
            from vllm import _custom_ops  # noqa: F401
            from vllm.v1.attention.backends import cpu_attn  # noqa: F401
        except ImportError:
            return False
    return hasattr(torch.ops._C, "cpu_attention_with_kv_cache")


@contextmanager
def _quiet() -> Iterator[None]:
    """vLLM tells about platforms and Triton when it is imported, between the lines of whoever needs one kernel."""
    before = logging.root.manager.disable
    logging.disable(logging.WARNING)
    try:
        yield
    finally:
        logging.disable(before)
