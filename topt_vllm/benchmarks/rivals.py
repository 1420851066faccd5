"""vLLM's dense decode kernels for GPUs, called as vLLM's backends call them for a decode batch (0.32)."""

from collections.abc import Sequence
from functools import partial
from typing import Any

import torch

from topt_vllm.benchmarks.cases import Inputs
from topt_vllm.benchmarks.kernels import over_layers
from topt_vllm.benchmarks.timing import Call, Variant

# What vLLM's Triton backend calls with: a smaller grid than this is split into segments.
_LEAST_GRID, _SEGMENTS = 128, 16
# What absent packages, GPUs and compilers raise.
_UNUSABLE = (ImportError, AttributeError, RuntimeError, ValueError, AssertionError, OSError)
# Blocks that vLLM gives FlashInfer's own decode kernel.
_FLASHINFER_BLOCKS = (16, 32, 64)


def schedule_arguments(inputs: Inputs, num_splits: int) -> dict[str, Any]:
    """Arguments of ``get_scheduler_metadata``, which vLLM's builder calls once per step for FlashAttention 3."""
    shape = inputs.shape
    return {
        "batch_size": shape.batch,
        "max_seqlen_q": 1,
        "max_seqlen_k": shape.longest,
        "num_heads_q": shape.heads,
        "num_heads_kv": shape.kv_heads,
        "headdim": shape.head_dim,
        "cache_seqlens": inputs.batch.seq_lens,
        "qkv_dtype": shape.dtype,
        "cu_seqlens_q": inputs.batch.query_start_loc,
        "page_size": shape.block_size,
        "causal": True,
        "window_size": (-1, -1),
        "num_splits": num_splits,
    }


def flash_arguments(
    inputs: Inputs, out: torch.Tensor, version: int, schedule: torch.Tensor | None, num_splits: int
) -> dict[str, Any]:
    """Arguments of ``flash_attn_varlen_func``.

    Args:
        inputs: The case.
        out: [S, H, D], written.
        version: Of FlashAttention.
        schedule: FlashAttention 3's; None for the others.
        num_splits: The most that a graph has buffers for; 0 for the kernel's own choice.
    """
    return _paged(inputs, out) | {
        "window_size": [-1, -1],
        "scheduler_metadata": schedule,
        "fa_version": version,
        "num_splits": num_splits,
    }


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


def plan_arguments(inputs: Inputs) -> dict[str, Any]:
    """Arguments of vLLM's ``fast_plan_decode`` but the wrapper; what FlashInfer plans with lies on the host."""
    shape = inputs.shape
    blocks = torch.tensor([0, *shape.sequence_blocks], dtype=torch.int32)
    lengths = torch.tensor(shape.lengths, dtype=torch.int32)
    rows = zip(inputs.batch.block_table, shape.sequence_blocks, strict=True)
    return {
        "indptr_cpu": blocks.cumsum(0, dtype=torch.int32),
        "indices": torch.cat([row[:count] for row, count in rows]),
        "last_page_len_cpu": (lengths - 1) % shape.block_size + 1,
        "seq_lens_cpu": lengths,
        "num_qo_heads": shape.heads,
        "num_kv_heads": shape.kv_heads,
        "head_dim": shape.head_dim,
        "page_size": shape.block_size,
        "pos_encoding_mode": "NONE",
        "sm_scale": inputs.scale,
        "window_left": -1,
        "logits_soft_cap": inputs.softcap,
        "q_data_type": shape.dtype,
        "kv_data_type": shape.dtype,
        "o_data_type": shape.dtype,
        "fixed_split_size": -1,
        "disable_split_kv": False,
    }


def _paged(inputs: Inputs, out: torch.Tensor) -> dict[str, Any]:
    key, value = _as_vllm(inputs)
    return {
        "q": inputs.query,
        "k": key,
        "v": value,
        "out": out,
        "cu_seqlens_q": inputs.batch.query_start_loc,
        "max_seqlen_q": 1,
        "seqused_k": inputs.batch.seq_lens,
        "max_seqlen_k": inputs.shape.longest,
        "softmax_scale": inputs.scale,
        "causal": True,
        "block_table": inputs.batch.block_table,
        "softcap": inputs.softcap,
    }


def _as_vllm(inputs: Inputs) -> tuple[torch.Tensor, torch.Tensor]:
    """K and V as vLLM's kernels take them, [B, P, Hkv, D]."""
    return inputs.cache.key.transpose(1, 2), inputs.cache.value.transpose(1, 2)


def rivals(layers: Sequence[Inputs]) -> tuple[list[Variant], dict[str, str]]:
    """Those that run on this machine, and why the others don't, by name."""
    found, left_out = [], {}
    for name, prepare in (("FlashAttention", _flash), ("FlashInfer", _flashinfer), ("Triton", _triton)):
        try:
            variant = over_layers(name, prepare, layers)
            variant.call()
            found.append(variant)
        except _UNUSABLE as error:
            left_out[name] = f"{type(error).__name__}: {error}".splitlines()[0]
    return found, left_out


def _flash(inputs: Inputs, out: torch.Tensor) -> Call:
    from vllm.config.attention import AttentionConfig
    from vllm.v1.attention.backends import fa_utils

    shape = inputs.shape
    version = fa_utils.get_flash_attn_version(
        head_size=shape.head_dim,
        requires_softcap=bool(inputs.softcap),
        kv_cache_block_size=shape.block_size,
        supports_fa4_hd256=True,
    )
    if version is None:
        raise NotImplementedError("vLLM names no FlashAttention version for this GPU and head dimension")
    if version == 4 and fa_utils.uses_fa4_hd256_kernel(shape.head_dim, shape.head_dim):
        raise NotImplementedError(
            "FlashAttention 4 has a kernel of its own for head dimension 256, not called here"
        )
    # In graphs vLLM bounds FlashAttention 3's splits and computes the schedule beforehand; others choose splits.
    schedule, num_splits = None, 0
    if version == 3:
        num_splits = AttentionConfig().flash_attn_max_num_splits_for_cuda_graph
        schedule = fa_utils.get_scheduler_metadata(**schedule_arguments(inputs, num_splits))
    arguments = flash_arguments(inputs, out, version, schedule, num_splits)
    return partial(fa_utils.flash_attn_varlen_func, **arguments)


def _triton(inputs: Inputs, out: torch.Tensor) -> Call:
    from vllm.v1.attention.ops.triton_unified_attention import unified_attention

    return partial(unified_attention, **triton_arguments(inputs, out))


def _flashinfer(inputs: Inputs, out: torch.Tensor) -> Call:
    """FlashInfer's own kernel, planned here. Where it can, vLLM decodes with XQA or trtllm-gen instead."""
    if inputs.shape.block_size not in _FLASHINFER_BLOCKS:
        raise NotImplementedError(
            f"vLLM gives FlashInfer blocks of {_FLASHINFER_BLOCKS}, not of {inputs.shape.block_size}"
        )
    from vllm import envs
    from vllm.v1.attention.backends import flashinfer as backend

    plan, device = plan_arguments(inputs), inputs.query.device
    wrapper = backend.BatchDecodeWithPagedKVCacheWrapper(
        torch.zeros(envs.VLLM_FLASHINFER_WORKSPACE_BUFFER_SIZE, dtype=torch.uint8, device=device),
        "NHD",
        use_cuda_graph=True,
        paged_kv_indptr_buffer=plan["indptr_cpu"].to(device),
        paged_kv_indices_buffer=torch.zeros_like(plan["indices"]),
        paged_kv_last_page_len_buffer=plan["last_page_len_cpu"].to(device),
        use_tensor_cores=True,
        backend="auto",
    )
    backend.fast_plan_decode(wrapper, **plan)
    scales = {"q_scale": 1.0, "k_scale": 1.0, "v_scale": 1.0}
    return partial(wrapper.run, q=inputs.query, paged_kv_cache=_as_vllm(inputs), out=out, **scales)
