"""Dense attention to long contexts on CPUs, by vLLM's kernel where it is the faster one."""

from functools import cache

import torch

from topt_vllm import vllm_cpu_attention
from topt_vllm.attention.common import DecodeBatch
from topt_vllm.replay.scores import LayerCall
from topt_vllm.vllm_cpu_attention import CpuAttention

# Attention to fewer keys saves less time than importing vLLM takes.
_LONG = 4096
_BLOCK = 128


def attend_by_vllm(call: LayerCall) -> torch.Tensor | None:
    """Plain causal attention of a sequence's last rows, [1, r, H, D]; None for what torch had better compute.

    torch's own takes twice as long on CPUs: 14.1 s of SmolLM2's pass over 8192 tokens in float32, vLLM's 5.9. With
    AMX, which torch has for bfloat16, vLLM's isn't measured.

    Args:
        call: Without softcap and sinks. Its mask isn't looked at.
    """
    query, key, value = call.query, call.key, call.value
    length, count = key.shape[1], query.shape[1]
    if query.device.type != "cpu" or length < _LONG or call.window or value.shape != key.shape:
        return None
    attention = _attention(query.dtype, query.shape[-1])
    if attention is None:
        return None
    blocks = -(-length // _BLOCK)
    memory = query.new_zeros(blocks, len(key), 2 * _BLOCK, query.shape[-1])
    attention.write(_by_row(key), _by_row(value), memory, torch.arange(length))
    batch = DecodeBatch(
        torch.tensor([0, count], dtype=torch.int32),
        torch.tensor([length], dtype=torch.int32),
        torch.arange(blocks, dtype=torch.int32)[None],
    )
    rows = _by_row(query)
    out = rows.new_empty(rows.shape)
    attention.bind(rows, memory, batch, out, call.scale)()
    return out[None]


@cache
def _attention(dtype: torch.dtype, head_dim: int) -> CpuAttention | None:
    found = vllm_cpu_attention.choose(dtype, _BLOCK, head_dim)
    return None if found is None or found.instructions == "amx" else found


def _by_row(heads: torch.Tensor) -> torch.Tensor:
    """[H, n, D] as [n, H, D]; vLLM's kernels take heads and rows wherever they lie, but no channels apart."""
    rows = heads.transpose(0, 1)
    return rows if rows.stride(-1) == 1 else rows.contiguous()
