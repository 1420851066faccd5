"""vLLM's dense decode kernels for GPUs, called as vLLM's backends call them for a decode batch."""

from collections.abc import Callable, Sequence
from typing import Any

import torch

from topt_vllm.benchmarks.cases import Inputs
from topt_vllm.benchmarks.kernels import poisoned, run_all
from topt_vllm.benchmarks.timing import Call, Variant

# What vLLM's Triton backend calls with: a smaller grid than this is split into segments.
_LEAST_GRID, _SEGMENTS = 128, 16


def flash_arguments(inputs: Inputs, out: torch.Tensor, version: int) -> dict[str, Any]:
    """Arguments of ``flash_attn_varlen_func``; the kernel chooses its splits for the captured shape."""
    return _paged(inputs, out) | {"fa_version": version, "num_splits": 0}


def triton_arguments(inputs: Inputs, out: torch.Tensor) -> dict[str, Any]:
    """Arguments of ``unified_attention``, with the buffers of its partial results."""
    shape, device = inputs.shape, inputs.query.device
    threshold = _LEAST_GRID // shape.kv_heads
    segments = (threshold, shape.heads, _SEGMENTS)
    dim_pad = 1 << (shape.head_dim - 1).bit_length()
    return _paged(inputs, out) | {
        "window_size": (-1, -1),
        "q_descale": None,
        "k_descale": None,
        "v_descale": None,
        "seq_threshold_3D": threshold,
        "num_par_softmax_segments": _SEGMENTS,
        "softmax_segm_output": torch.empty(*segments, dim_pad, device=device),
        "softmax_segm_max": torch.empty(segments, device=device),
        "softmax_segm_expsum": torch.empty(segments, device=device),
    }


def _paged(inputs: Inputs, out: torch.Tensor) -> dict[str, Any]:
    # vLLM's kernels take [B, P, Hkv, D].
    key, value = (part.transpose(1, 2) for part in (inputs.cache.key, inputs.cache.value))
    return {
        "q": inputs.query,
        "k": key,
        "v": value,
        "out": out,
        "cu_seqlens_q": inputs.batch.query_start_loc,
        "max_seqlen_q": 1,
        "seqused_k": inputs.batch.seq_lens,
        "max_seqlen_k": inputs.shape.seq_len,
        "softmax_scale": inputs.scale,
        "causal": True,
        "block_table": inputs.batch.block_table,
        "softcap": inputs.softcap,
    }


def rivals(layers: Sequence[Inputs]) -> tuple[list[Variant], dict[str, str]]:
    """Those that run on this machine, and why the others don't, by name."""
    found, left_out = [], {}
    for name, prepare in (("FlashAttention", _flash), ("Triton", _triton)):
        outs = poisoned(layers)
        try:
            calls = [prepare(inputs, out) for inputs, out in zip(layers, outs, strict=True)]
            run_all(calls)
        except (ImportError, AttributeError, NotImplementedError, RuntimeError, ValueError) as error:
            left_out[name] = f"{type(error).__name__}: {error}".splitlines()[0]
            continue
        found.append(_variant(name, calls, outs))
    return found, left_out


def _variant(name: str, calls: list[Call], outs: list[torch.Tensor]) -> Variant:
    return Variant(name, lambda: run_all(calls), outs, [None] * len(outs))


def _flash(inputs: Inputs, out: torch.Tensor) -> Call:
    from vllm.v1.attention.backends.fa_utils import flash_attn_varlen_func, get_flash_attn_version

    version = get_flash_attn_version(head_size=inputs.shape.head_dim)
    if version is None:
        raise NotImplementedError("vLLM names no FlashAttention version for this GPU and head dimension")
    return _bound(flash_attn_varlen_func, flash_arguments(inputs, out, version))


def _triton(inputs: Inputs, out: torch.Tensor) -> Call:
    from vllm.v1.attention.ops.triton_unified_attention import unified_attention

    return _bound(unified_attention, triton_arguments(inputs, out))


def _bound(function: Callable[..., Any], arguments: dict[str, Any]) -> Call:
    def call() -> None:
        function(**arguments)

    return call
