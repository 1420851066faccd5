"""The C++ implementation: hands tensors to the compiled operator. Arguments as in attention/reference.py."""

from functools import cache
from pathlib import Path
from typing import Any

import torch

from topt_vllm.attention.common import (
    SCREEN_LIMITS,
    Capabilities,
    DecodeArguments,
    DecodeBatch,
    PagedCache,
    RowThetas,
    Thetas,
)
from topt_vllm.attention.common import new_statistics as new_statistics
from topt_vllm.attention.cpu import jit
from topt_vllm.attention.screen import ScreenFormat

capabilities = Capabilities(screens={"int4+4": SCREEN_LIMITS["int4+4"]}, amx_copies=True)

# Measured: 8 gain by a K screen, 16 lose (docs/results.md).
_LARGEST_GROUP_WITH_AMX = 8

_FOLDER = Path(__file__).parent / "csrc"


@cache
def _operators() -> Any:
    library = jit.torch_library("topt", _FOLDER, ("binding.cpp", "kernel.cpp", "kernel_bytes.cpp"))
    jit.load(library)
    return getattr(torch.ops, library.namespace)


def prepare(device_type: str = "cpu") -> None:
    """Compiles the kernel if this machine has not yet, and loads it.

    Raises:
        RuntimeError: Another device, or no compiler, or it failed; the message has its output and the remedy.
    """
    if device_type != "cpu":
        raise RuntimeError(
            f"the cpu kernel can't read {device_type} tensors; use implementation auto or triton for them"
        )
    _operators()


def decode(given: DecodeArguments) -> None:
    """Every row of a batch over the paged cache, whose K is stored [D, P] (``stride(2) == 1``) and V [P, D].

    Args:
        given: The cache holds bfloat16, float16, float32, float8_e4m3fn or float8_e5m2.
    """
    cache, batch, selection = given.cache, given.batch, given.selection
    of_heads = given.thetas if isinstance(given.thetas, Thetas) else None
    # Here and in `finish` by its overload: torch's search for it by so many arguments takes time in every layer.
    _operators().decode.default(
        given.query,
        cache.key,
        cache.value,
        cache.value_sums,
        batch.query_start_loc,
        batch.seq_lens,
        batch.block_table,
        of_heads.lengths if of_heads else None,
        of_heads.theta if of_heads else None,
        of_heads.law if of_heads else None,
        given.thetas.theta if isinstance(given.thetas, RowThetas) else None,
        selection.min_seq_len,
        selection.sink_tokens,
        selection.recent_tokens,
        selection.group_keep == "union",
        selection.compensation == "vmean",
        given.scale,
        given.softcap,
        given.out,
        given.statistics,
        *_screen(cache),
        cache.key_screen.margin if cache.key_screen else None,
        cache.key_screen.min_seq_len if cache.key_screen else 0,
        given.reached,
        None if given.sinks is None else given.sinks.float(),
        cache.key_scale,
        cache.value_scale,
    )


def copy_to_amx(cache: PagedCache, blocks: torch.Tensor, copy: torch.Tensor) -> None:
    """Copies blocks of the cache; as ``copy_to_amx`` of :class:`topt_vllm.attention.api.Implementation`."""
    _operators().copy_to_amx(cache.key, cache.value, blocks, copy)


def finish(cache: PagedCache, batch: DecodeBatch) -> None:
    """Writes V sums and K screen; as ``finish`` of :class:`topt_vllm.attention.api.Implementation`."""
    _operators().finish.default(
        cache.key,
        cache.value,
        cache.value_sums,
        *_screen(cache),
        batch.query_start_loc,
        batch.seq_lens,
        batch.block_table,
        cache.key_scale,
    )


def screen_unasked(heads_per_kv: int) -> ScreenFormat | None:
    """Both planes: not where AMX reads K in full as fast, nor where unpacking them without AVX2 takes longer."""
    capability = jit.capability()
    pays = heads_per_kv <= _LARGEST_GROUP_WITH_AMX if capability == "amx" else capability != "default"
    return "int4+4" if pays else None


def screen_bytes(format: ScreenFormat, head_dim: int, block_size: int) -> int:
    """Bytes of the copy of K for one KV head of one block; csrc/screen_block.h has the layout.

    Raises:
        ValueError: There is no copy of such heads or blocks.
    """
    for name, value in (("head dimension", head_dim), ("block size", block_size)):
        if value <= 0 or value % 16:
            raise ValueError(f"the cpu kernel needs a {name} that is a multiple of 16, got {value}")
    # Beyond, sums of a query's 16-bit codes times those of K don't fit their 32 bits.
    if head_dim > 512:
        raise ValueError(
            f"the cpu kernel's K screen takes head dimensions up to 512, got {head_dim}; leave k_screen out"
        )
    return _operators().screen_bytes(head_dim, block_size)


def _screen(cache: PagedCache) -> tuple[torch.Tensor | None, ...]:
    """Codes, mean, scale and signs."""
    screen = cache.key_screen
    if screen is None:
        return None, None, None, None
    return screen.codes, screen.transform.mean, screen.transform.scale, screen.transform.signs
