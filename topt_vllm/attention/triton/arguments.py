"""How tensors reach the kernels, and which are refused."""

from typing import Any

import torch
import triton.language as tl

from topt_vllm.attention.common import DecodeArguments, DecodeBatch, KeyScreen, PagedCache
from topt_vllm.attention.screen import ScreenFormat
from topt_vllm.attention.triton import primitives

_TRITON = {torch.float32: tl.float32, torch.float16: tl.float16, torch.bfloat16: tl.bfloat16}
_FORMATS = {
    torch.float8_e4m3fn: primitives.E4M3FN.value,
    torch.float8_e5m2: primitives.E5M2.value,
    torch.float8_e4m3fnuz: primitives.E4M3FNUZ.value,
}


def stored(part: torch.Tensor) -> tuple[torch.Tensor, int]:
    """K or V as the kernels get it, fp8 as bytes, and its format."""
    if part.dtype in _FORMATS:
        return part.view(torch.uint8), _FORMATS[part.dtype]
    return part, primitives.PLAIN.value


def screen_bytes(format: ScreenFormat, head_dim: int, block_size: int) -> int:
    """As ``screen_bytes`` of :class:`topt_vllm.attention.api.Implementation`.

    Codes [P, D / 2], each 8 more than plane one: channel 2p in the lower bits of byte p, 2p + 1 in the upper ones.
    Then an int32 of each row: its step, a float16, in the lower half, and the error norm in the upper one.

    Raises:
        ValueError: Heads whose rows don't fill words.
    """
    if head_dim % 8:
        raise ValueError(
            f"the triton kernel's K screen takes head dimensions that are multiples of 8, got {head_dim}"
        )
    return block_size * (head_dim // 2 + 4)


def compute_dtype(query: torch.Tensor, key: torch.Tensor, interpreted: bool) -> Any:
    """Operand type of the matrix products. The interpreter can't multiply bfloat16: there it is float32."""
    if interpreted or (key.dtype not in _FORMATS and key.dtype != query.dtype):
        return tl.float32
    return _TRITON[query.dtype]


def check(given: DecodeArguments) -> None:
    """Refuses what the decode kernels would misread.

    Raises:
        RuntimeError: Names the argument, what is expected and what was given.
    """
    query, cache, reached = given.query, given.cache, given.reached
    if query.dtype not in _TRITON:
        _refuse("query", " or ".join(map(str, _TRITON)), query.dtype)
    if cache.key.dtype not in _TRITON and cache.key.dtype not in _FORMATS:
        _refuse("key", " or ".join(map(str, [*_TRITON, *_FORMATS])), cache.key.dtype)
    if cache.value.dtype != cache.key.dtype:
        _refuse("value", f"the dtype of key, {cache.key.dtype}", cache.value.dtype)
    if given.vmean and cache.value_sums is None:
        _refuse("value_sums", "a tensor with vmean", None)
    _check_contiguous(query=query, out=given.out)
    most = given.batch.seq_lens.shape[0] * (given.batch.max_query_rows or query.shape[0])
    if cache.key_screen is not None and query.shape[0] > most:
        _refuse("query", f"at most {most} rows, max_query_rows of each sequence", query.shape[0])
    if reached is not None and (reached.shape != query.shape[:2] or not reached.is_contiguous()):
        _refuse("reached", f"contiguous {list(query.shape[:2])}", f"{list(reached.shape)}")
    check_cache(cache, given.batch)


def check_cache(cache: PagedCache, batch: DecodeBatch) -> None:
    """Refuses a cache or a batch that any kernel would misread.

    Raises:
        RuntimeError: Names the argument, what is expected and what was given.
    """
    _check_contiguous(value=cache.value, block_table=batch.block_table)
    if cache.value_sums is not None:
        _check_contiguous(value_sums=cache.value_sums)
        if cache.value_sums.dtype != torch.float32:
            _refuse("value_sums", "float32", cache.value_sums.dtype)
    if cache.key_screen is not None:
        _check_screen(cache.key_screen, cache.key)
    for name in ("query_start_loc", "seq_lens", "block_table"):
        tensor = getattr(batch, name)
        if tensor.dtype != torch.int32:
            _refuse(name, "int32", tensor.dtype)


def _check_screen(screen: KeyScreen, key: torch.Tensor) -> None:
    blocks, num_kv_heads, block_size, head_dim = key.shape
    shape = (blocks, num_kv_heads, screen_bytes(screen.format, head_dim, block_size))
    codes, transform = screen.codes, screen.transform
    if screen.min_seq_len:
        _refuse("key_screen: min_seq_len", "0", screen.min_seq_len)
    if codes.dtype != torch.uint8 or codes.shape != shape:
        _refuse("key_screen: codes", f"torch.uint8 {list(shape)}", f"{codes.dtype} {list(codes.shape)}")
    if codes.stride(2) != 1 or any(offset % 4 for offset in (*codes.stride()[:2], codes.storage_offset())):
        _refuse("key_screen: codes", "contiguous blocks of whole words", f"strides {codes.stride()}")
    for name in ("mean", "scale", "signs"):
        part = getattr(transform, name)
        if not part.is_contiguous() or part.device != codes.device:
            _refuse(
                f"key_screen: {name}", f"contiguous on {codes.device}", f"{part.stride()} on {part.device}"
            )


def _check_contiguous(**tensors: torch.Tensor) -> None:
    for name, tensor in tensors.items():
        if tensor.stride(-1) != 1:
            _refuse(f"{name}: stride of the last dimension", "1", tensor.stride(-1))


def _refuse(name: str, expected: str, got: object) -> None:
    raise RuntimeError(f"{name}: expected {expected}, got {got}")
