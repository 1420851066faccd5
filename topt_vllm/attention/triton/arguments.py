"""How tensors reach the kernels, and which are refused."""

from typing import Any

import torch
import triton.language as tl

from topt_vllm.attention.common import DecodeBatch, PagedCache
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


def compute_dtype(query: torch.Tensor, key: torch.Tensor, interpreted: bool) -> Any:
    """Operand type of the matrix products. The interpreter can't multiply bfloat16: there it is float32."""
    if interpreted or (key.dtype not in _FORMATS and key.dtype != query.dtype):
        return tl.float32
    return _TRITON[query.dtype]


def check(
    query: torch.Tensor,
    cache: PagedCache,
    batch: DecodeBatch,
    out: torch.Tensor,
    reached: torch.Tensor | None,
    needs_sums: bool,
) -> None:
    """Refuses what the decode kernels would misread.

    Raises:
        RuntimeError: Names the argument, what is expected and what was given.
    """
    if query.dtype not in _TRITON:
        _refuse("query", " or ".join(map(str, _TRITON)), query.dtype)
    if cache.key.dtype not in _TRITON and cache.key.dtype not in _FORMATS:
        _refuse("key", " or ".join(map(str, [*_TRITON, *_FORMATS])), cache.key.dtype)
    if cache.value.dtype != cache.key.dtype:
        _refuse("value", f"the dtype of key, {cache.key.dtype}", cache.value.dtype)
    if needs_sums and cache.value_sums is None:
        _refuse("value_sums", "a tensor with vmean", None)
    _check_contiguous(query=query, out=out)
    if reached is not None and (reached.shape != query.shape[:2] or not reached.is_contiguous()):
        _refuse("reached", f"contiguous {list(query.shape[:2])}", f"{list(reached.shape)}")
    check_cache(cache, batch)


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
    for name in ("query_start_loc", "seq_lens", "block_table"):
        tensor = getattr(batch, name)
        if tensor.dtype != torch.int32:
            _refuse(name, "int32", tensor.dtype)


def _check_contiguous(**tensors: torch.Tensor) -> None:
    for name, tensor in tensors.items():
        if tensor.stride(-1) != 1:
            _refuse(f"{name}: stride of the last dimension", "1", tensor.stride(-1))


def _refuse(name: str, expected: str, got: object) -> None:
    raise RuntimeError(f"{name}: expected {expected}, got {got}")
