"""Launches of the kernels behind a cache write: shapes and strides decide, never contents."""

import torch

from topt_vllm.attention.common import DecodeBatch, KeyScreen, PagedCache
from topt_vllm.attention.screen import hadamard_block
from topt_vllm.attention.triton.arguments import stored
from topt_vllm.attention.triton.calls import Call, of_batch, strides, value_rows
from topt_vllm.attention.triton.codes_kernel import _topt_codes_kernel
from topt_vllm.attention.triton.finish_kernel import _topt_finish_kernel
from topt_vllm.attention.triton.launch import power_of_two

# Depth of the pipeline of the finish kernel's loop, and sequences that it looks at together.
_STAGES, _SEQUENCES_AT_ONCE = 3, 128
# Elements of K that a program of the codes kernel takes at a time.
_CODE_ELEMENTS = 2048


def finish_call(cache: PagedCache, sums: torch.Tensor, batch: DecodeBatch) -> Call:
    """The kernel that writes V sums; arguments as of ``finish`` of the launcher, ``sums`` being the cache's."""
    value, form = stored(cache.value)
    _, num_kv_heads, block_size, value_dim = cache.value.shape
    state_rows = cache.rows_per_state or block_size
    value_pad = power_of_two(value_dim)
    arguments = {
        "value": value,
        "value_sums": sums,
        **of_batch(batch),
        **strides("value", value, "block", "head", "slot"),
        **strides("sums", sums, "block", "head", "state"),
        "sequences": batch.seq_lens.shape[0],
        "VALUE_DIM": value_dim,
        "VALUE_PAD": value_pad,
        "BLOCK_SIZE": block_size,
        "STATE_ROWS": state_rows,
        "TILE": min(power_of_two(state_rows), value_rows(value_pad)),
        "AT_ONCE": _SEQUENCES_AT_ONCE,
        "STAGES": _STAGES,
        "FORMAT": form,
        "num_warps": 4,
    }
    return Call(_topt_finish_kernel, (batch.seq_lens.shape[0], num_kv_heads), arguments)


def codes_call(cache: PagedCache, screen: KeyScreen, batch: DecodeBatch, programs: int) -> Call:
    """The kernel that writes a K screen's codes; arguments as of ``finish`` of the launcher.

    Args:
        cache: Of the layer.
        screen: The cache's.
        batch: Rows that were written.
        programs: Of each KV head; the rows are shared out on the device.
    """
    key, form = stored(cache.key)
    _, num_kv_heads, block_size, head_dim = key.shape
    sequences, dim_pad = batch.seq_lens.shape[0], power_of_two(head_dim)
    arguments = {
        "key": key,
        "codes": screen.codes,
        "words": screen.codes.view(torch.int32),
        "mean": screen.transform.mean,
        "channel_scale": screen.transform.scale,
        "signs": screen.transform.signs,
        # Where it isn't read, a tensor that is aligned like it, whatever the batch.
        "key_scale": screen.transform.mean if cache.key_scale is None else cache.key_scale,
        **of_batch(batch),
        **strides("key", key, "block", "head", "slot", "dim"),
        **strides("codes", screen.codes, "block", "head"),
        "sequences": sequences,
        "first_jump": power_of_two(sequences) // 2,
        "HEAD_DIM": head_dim,
        "DIM_PAD": dim_pad,
        "ROTATED": hadamard_block(head_dim),
        "BLOCK_SIZE": block_size,
        "ROWS": max(1, _CODE_ELEMENTS // dim_pad),
        "SCALED_KEY": cache.key_scale is not None,
        "FORMAT": form,
        "num_warps": 4,
        # A product and a sum in one rounding would give other codes than the specification.
        "enable_fp_fusion": False,
    }
    return Call(_topt_codes_kernel, (programs, num_kv_heads), arguments)
