"""Synthetic decode batches on a GPU's cache layout."""

import torch

from topt_vllm.attention.common import PagedCache
from topt_vllm.attention.triton import launcher
from topt_vllm.benchmarks.cases import Inputs, Shape

# Blocks of random numbers that are made at a time.
_BLOCKS_AT_ONCE = 256


def device_inputs(shape: Shape, device: torch.device, seed: int = 0) -> Inputs:
    """As :func:`topt_vllm.benchmarks.cases.make_inputs`, but ``memory`` is [B, P, Hkv, 2D]: a slot's K, then its V.

    The V sums are written by the kernel that writes them when serving.

    Args:
        shape: Dimensions.
        device: Of every tensor.
        seed: Of the random numbers.
    """
    generator = torch.Generator(device).manual_seed(seed)
    total = shape.total_blocks
    sizes = (total, shape.block_size, shape.kv_heads, 2 * shape.head_dim)
    memory = torch.empty(sizes, dtype=shape.dtype, device=device)
    for part in memory.split(_BLOCKS_AT_ONCE):
        part.copy_(torch.randn(part.shape, generator=generator, device=device))
    key, value = memory.transpose(1, 2).split(shape.head_dim, dim=3)
    table = shape.block_table(torch.randperm(total, generator=generator, device=device))
    query = torch.randn(shape.batch, shape.heads, shape.head_dim, generator=generator, device=device)
    cache = PagedCache(key, value, torch.zeros(shape.sums_shape, device=device))
    scale = shape.head_dim**-0.5
    inputs = Inputs(shape, query.to(shape.dtype), memory, cache, shape.decode_batch(table), scale)
    launcher.finish(cache, inputs.written)
    return inputs
