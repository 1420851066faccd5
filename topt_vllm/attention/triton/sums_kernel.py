"""The cache-update kernel: the V sum of every block whose last slot was just written."""

import triton
import triton.language as tl

from topt_vllm.attention.triton.primitives import decode_stored


@triton.jit(do_not_specialize=["num_tokens"])
def _topt_sums_kernel(
    value,
    value_sums,
    slot_mapping,
    num_tokens,
    value_stride_block,
    value_stride_head,
    value_stride_slot,
    sums_stride_block,
    sums_stride_head,
    TOKENS: tl.constexpr,
    HEAD_DIM: tl.constexpr,
    DIM_PAD: tl.constexpr,
    BLOCK_SIZE: tl.constexpr,
    TILE: tl.constexpr,
    FORMAT: tl.constexpr,
):
    """One program per KV head and TOKENS tokens; nearly all of them find no finished block and leave."""
    kv_head = tl.program_id(1).to(tl.int64)
    start = tl.program_id(0) * TOKENS
    token = start + tl.arange(0, TOKENS)
    slot = tl.load(slot_mapping + token, mask=token < num_tokens, other=-1)
    finishes = (slot >= 0) & (slot % BLOCK_SIZE == BLOCK_SIZE - 1)
    if tl.max(finishes.to(tl.int32), axis=0) == 0:
        return
    dim = tl.arange(0, DIM_PAD)
    dim_mask = dim < HEAD_DIM
    for index in range(start, tl.minimum(start + TOKENS, num_tokens)):
        last = tl.load(slot_mapping + index)
        if (last >= 0) & (last % BLOCK_SIZE == BLOCK_SIZE - 1):
            block = last // BLOCK_SIZE
            total = tl.zeros([DIM_PAD], tl.float32)
            for first in range(0, BLOCK_SIZE, TILE):
                row = first + tl.arange(0, TILE)
                place = block * value_stride_block + kv_head * value_stride_head + row * value_stride_slot
                stored = tl.load(
                    value + place[:, None] + dim[None, :],
                    mask=(row < BLOCK_SIZE)[:, None] & dim_mask[None, :],
                    other=0,
                )
                total += tl.sum(decode_stored(stored, FORMAT, tl.float32), axis=0)
            tl.store(
                value_sums + block * sums_stride_block + kv_head * sums_stride_head + dim,
                total,
                mask=dim_mask,
            )
