"""The kernel in front of a decode call with a K screen: queries as the screen takes them."""

import triton
import triton.language as tl

from topt_vllm.attention.triton.rotation import SLACK, nearest, neighbours, rotate

# Numbers of each query beside its codes: what a sum of products counts, what is added to that, the margin in steps
# and in error norms, q·mean.
COEFFICIENTS = tl.constexpr(5)


@triton.jit(do_not_specialize=["vectors"])
def _topt_queries_kernel(
    query,
    mean,
    channel_scale,
    signs,
    query_codes,
    coefficients,
    query_stride_row,
    query_stride_head,
    scale,
    deviations,
    vectors,
    HEADS: tl.constexpr,
    GROUP: tl.constexpr,
    HEAD_DIM: tl.constexpr,
    DIM_PAD: tl.constexpr,
    ROTATED: tl.constexpr,
    HARD: tl.constexpr,
    VECTORS: tl.constexpr,
):
    """q' of a few rows' heads in 8 bits, channels 2p in front of channels 2p + 1; the rest in scaled logits.

    Args:
        query_codes: int8 [R, H, 2, D / 2].
        coefficients: float32 [R, H, COEFFICIENTS].
        deviations: Of a step, what a score of |q'| = 1 may be off by; not with ``HARD``.
        vectors: R * H.
    """
    HALF: tl.constexpr = HEAD_DIM // 2
    vector = tl.program_id(0) * VECTORS + tl.arange(0, VECTORS)
    written = vector < vectors
    row, head = (vector // HEADS).to(tl.int64), vector % HEADS
    dim, half = tl.arange(0, DIM_PAD), tl.arange(0, DIM_PAD // 2)
    dim_mask = dim < HEAD_DIM
    mask = written[:, None] & dim_mask[None, :]
    q = tl.load(
        query + (row * query_stride_row + head * query_stride_head)[:, None] + dim[None, :],
        mask=mask,
        other=0.0,
    ).to(tl.float32)
    channel = (head // GROUP * HEAD_DIM)[:, None] + dim[None, :]
    offset = tl.sum(q * tl.load(mean + channel, mask=mask, other=0.0), axis=1)
    sign = tl.load(signs + dim, mask=dim_mask, other=1.0)
    rotated = rotate(
        q * tl.load(channel_scale + channel, mask=mask, other=0.0) * sign[None, :], VECTORS, DIM_PAD, ROTATED
    ) * (1.0 / ROTATED)

    largest = tl.max(tl.abs(rotated), axis=1)
    # As torch divides a number by a tensor.
    inverse = tl.where(largest > 0, 127.0 * tl.div_rn(1.0, tl.where(largest > 0, largest, 1.0)), 0.0)
    codes = nearest(rotated * inverse[:, None])
    step = tl.div_rn(largest, 127.0)
    # NaN of a query that holds one: then every key is a candidate.
    norm = tl.sqrt_rn(tl.sum(rotated * rotated, axis=1))
    if HARD:
        unseen = tl.where(dim_mask[None, :], rotated - codes * step[:, None], 0.0)
        in_steps = SLACK * 8.0 * tl.sqrt_rn(HEAD_DIM * tl.sum(unseen * unseen, axis=1))
        in_errors = SLACK * norm
    else:
        in_steps, in_errors = deviations * norm, tl.zeros_like(norm)

    codes = tl.where(codes == codes, codes, 0.0).to(tl.int32)
    # Stored codes c + 8 are from 0 to 15, and stand for (c + ½) steps.
    bias = -7.5 * tl.sum(codes, axis=1).to(tl.float32)
    low, high = neighbours(codes.to(tl.int8), VECTORS, DIM_PAD)
    place = query_codes + vector.to(tl.int64)[:, None] * HEAD_DIM + half[None, :]
    half_written = written[:, None] & (half < HALF)[None, :]
    tl.store(place, low, mask=half_written)
    tl.store(place + HALF, high, mask=half_written)
    numbers = coefficients + vector.to(tl.int64) * COEFFICIENTS
    tl.store(numbers, scale * step, mask=written)
    tl.store(numbers + 1, scale * step * bias, mask=written)
    tl.store(numbers + 2, scale * in_steps, mask=written)
    tl.store(numbers + 3, scale * in_errors, mask=written)
    tl.store(numbers + 4, scale * offset, mask=written)
