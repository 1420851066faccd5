"""The two kernels that are compared, each as one call over every layer of a case."""

from collections.abc import Callable, Sequence
from functools import partial
from typing import Any

import torch

from topt_vllm.attention import api
from topt_vllm.attention.common import Selection, Thetas
from topt_vllm.benchmarks.cases import Inputs
from topt_vllm.benchmarks.timing import Call, Variant

# vLLM's names of its CPU caches in fp8.
_PLATFORM_FP8 = {torch.float8_e4m3fn: "fp8_e4m3", torch.float8_e5m2: "fp8_e5m2"}


def platform_kernel(layers: Sequence[Inputs]) -> Variant | None:
    """vLLM's CPU_ATTN decode kernel; None where vLLM for CPU is not installed."""
    try:
        from vllm import _custom_ops  # noqa: F401

        torch.ops._C.cpu_attention_with_kv_cache  # noqa: B018
    except (ImportError, AttributeError):
        return None
    return over_layers("CPU_ATTN", _platform_call, layers)


def our_kernel(
    name: str,
    implementation: api.Implementation,
    layers: Sequence[Inputs],
    thetas: Sequence[Thetas | None],
    selection: Selection,
) -> Variant:
    """Ours at these thresholds, one entry per layer."""

    def prepare(inputs: Inputs, out: torch.Tensor, theta: Thetas | None) -> Call:
        return partial(implementation.decode, inputs.arguments(theta, selection, out))

    return over_layers(name, prepare, layers, thetas)


def count(
    implementation: api.Implementation,
    layers: Sequence[Inputs],
    thetas: Sequence[Thetas | None],
    selection: Selection,
) -> torch.Tensor:
    """Statistics of one call, [layers, 8], indexed by :class:`~topt_vllm.attention.common.Stat`."""
    found = []
    for inputs, theta in zip(layers, thetas, strict=True):
        statistics, out = implementation.new_statistics(inputs.query.device), torch.empty_like(inputs.query)
        implementation.decode(inputs.arguments(theta, selection, out, statistics))
        found.append(statistics.sum(dim=0))
    return torch.stack(found)


def over_layers(
    name: str, prepare: Callable[..., Call], layers: Sequence[Inputs], *more: Sequence[Any]
) -> Variant:
    """One call over every layer, into outputs full of NaN.

    Args:
        name: For messages.
        prepare: From a layer, its output and what else there is of it to its call.
        layers: The cases.
        more: One entry per layer each.
    """
    outs = [torch.full_like(inputs.query, float("nan")) for inputs in layers]
    calls = [prepare(*given) for given in zip(layers, outs, *more, strict=True)]

    def run() -> None:
        for call in calls:
            call()

    return Variant(name, run, outs)


def _platform_call(inputs: Inputs, out: torch.Tensor) -> Call:
    from vllm import _custom_ops as ops
    from vllm import envs

    shape = inputs.shape
    # The layout that both kernels read; on an AMX machine vLLM would choose another for itself.
    isa = "vec" if shape.block_size % 32 == 0 and shape.head_dim % 32 == 0 else "vec16"
    stored = "auto" if shape.cache is None else _PLATFORM_FP8[shape.cache]
    memory = inputs.memory if shape.cache is None else inputs.memory.view(torch.uint8)
    key, value = memory.chunk(2, dim=2)
    metadata = ops.cpu_attn_get_scheduler_metadata(
        num_reqs=shape.batch,
        num_heads=shape.heads,
        num_kv_heads=shape.kv_heads,
        head_dim=shape.head_dim,
        seq_lens=inputs.batch.seq_lens,
        dtype=shape.dtype,
        query_start_loc=inputs.batch.query_start_loc,
        causal=True,
        sliding_window_size=-1,
        isa=isa,
        enable_kv_split=envs.VLLM_CPU_ATTN_SPLIT_KV,
        kv_cache_dtype=stored,
    )
    return partial(
        ops.cpu_attention_with_kv_cache,
        query=inputs.query,
        key_cache=key,
        value_cache=value,
        output=out,
        query_start_loc=inputs.batch.query_start_loc,
        seq_lens=inputs.batch.seq_lens,
        scale=inputs.scale,
        causal=True,
        alibi_slopes=None,
        sliding_window=-1,
        block_table=inputs.batch.block_table,
        softcap=inputs.softcap,
        scheduler_metadata=metadata,
        s_aux=None,
        kv_cache_dtype=stored,
    )
