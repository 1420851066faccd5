"""Decode batches on a GPU's cache layout, ``memory`` [B, P, Hkv, 2D]: a slot's K, then its V.

V sums are written by the kernel that writes them when serving.
"""

import torch

from topt_vllm.attention.common import PagedCache
from topt_vllm.attention.triton import launcher
from topt_vllm.benchmarks.cases import Inputs, Shape, SharedRows

# Blocks of random numbers that are made at a time.
_BLOCKS_AT_ONCE = 256


def device_inputs(shape: Shape, device: torch.device) -> Inputs:
    """As :func:`topt_vllm.benchmarks.cases.make_inputs`.

    Args:
        shape: Dimensions.
        device: Of every tensor.
    """
    generator = torch.Generator(device).manual_seed(0)
    total = shape.total_blocks
    sizes = (total, shape.block_size, shape.kv_heads, 2 * shape.head_dim)
    memory = torch.empty(sizes, dtype=shape.dtype, device=device)
    for part in memory.split(_BLOCKS_AT_ONCE):
        part.copy_(torch.randn(part.shape, generator=generator, device=device))
    table = shape.block_table(torch.randperm(total, generator=generator, device=device))
    query = torch.randn(shape.batch, shape.heads, shape.head_dim, generator=generator, device=device)
    return _inputs(shape, query.to(shape.dtype), memory, table, shape.head_dim**-0.5, 0.0)


def placed_device_inputs(rows: SharedRows) -> Inputs:
    """The batch where its tensors are."""
    memory = rows.scattered(torch.cat([rows.key, rows.value], dim=3).transpose(1, 2))
    return _inputs(rows.shape, rows.query, memory, rows.table, rows.scale, rows.softcap)


def _inputs(
    shape: Shape, query: torch.Tensor, memory: torch.Tensor, table: torch.Tensor, scale: float, softcap: float
) -> Inputs:
    key, value = memory.transpose(1, 2).split(shape.head_dim, dim=3)
    cache = PagedCache(key, value, torch.zeros(shape.sums_shape, device=memory.device))
    inputs = Inputs(shape, query, memory, cache, shape.decode_batch(table), scale, softcap)
    launcher.finish(cache, inputs.written)
    return inputs
