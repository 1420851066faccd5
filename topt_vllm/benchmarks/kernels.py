"""The two kernels that are compared, each as one call over every layer of a case."""

from collections.abc import Callable, Sequence
from functools import partial
from typing import Any

import torch

from topt_vllm.attention import api
from topt_vllm.attention.common import DecodeBatch, Selection, Thetas
from topt_vllm.benchmarks.cases import Inputs, Shape
from topt_vllm.benchmarks.timing import Call, Variant

# vLLM's names of its CPU caches in fp8.
_PLATFORM_FP8 = {torch.float8_e4m3fn: "fp8_e4m3", torch.float8_e5m2: "fp8_e5m2"}
# Of the prompt that runs before the platform's kernel is timed.
_PROMPT_ROWS = 64


def platform_kernel(layers: Sequence[Inputs]) -> Variant | None:
    """vLLM's CPU_ATTN decode kernel as it would pick it here; None where vLLM for CPU is not installed."""
    try:
        from vllm import _custom_ops  # noqa: F401

        torch.ops._C.cpu_attention_with_kv_cache  # noqa: B018
    except (ImportError, AttributeError):
        return None
    isa = _platform_isa(layers[0].shape)
    _run_prompt(isa, layers[0])
    return over_layers(f"CPU_ATTN ({isa})", partial(_platform_call, isa), layers)


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


def _platform_isa(shape: Shape) -> str:
    """Instructions that vLLM picks here, each with a cache layout of its own; the vector kernels' is ours."""
    from vllm.v1.attention.backends.cpu_attn import _get_attn_isa

    isa: str = _get_attn_isa(shape.dtype, shape.block_size, shape.head_dim, _platform_cache(shape))
    if isa == "amx" and not torch.cpu._init_amx():  # asks Linux, once for a process; in engines oneDNN has
        raise RuntimeError("vLLM would use AMX on this CPU, but Linux doesn't let this process")
    return isa


def _run_prompt(isa: str, inputs: Inputs) -> None:
    """A prompt of vLLM's kernel, as has run before in an engine.

    Without one its vector kernel takes up to six times as long on Intel, until the scratch memory that it shares
    with prompts was used.
    """
    shape, batch = inputs.shape, inputs.batch
    rows = min(_PROMPT_ROWS, shape.lengths[0])
    query = torch.randn(rows, shape.heads, shape.head_dim).to(shape.dtype)
    first = DecodeBatch(torch.tensor([0, rows], dtype=torch.int32), batch.seq_lens[:1], batch.block_table[:1])
    _bind(inputs, inputs.memory, isa, query, first, torch.empty_like(query))()


def _platform_call(isa: str, inputs: Inputs, out: torch.Tensor) -> Call:
    """A call of vLLM's kernel."""
    memory = _in_layout(inputs, isa) if isa == "amx" else inputs.memory
    return _bind(inputs, memory, isa, inputs.query, inputs.batch, out)


def _in_layout(inputs: Inputs, isa: str) -> torch.Tensor:
    """The cache as vLLM writes it for these instructions, [B, Hkv, 2 P, D]."""
    from vllm import _custom_ops as ops

    shape, memory = inputs.shape, torch.empty_like(inputs.memory)
    for block, (key, value) in enumerate(zip(inputs.cache.key, inputs.cache.value, strict=True)):
        slots = torch.arange(block * shape.block_size, (block + 1) * shape.block_size)
        # What an fp8 cache holds is a number of the model's dtype, which vLLM's rounding leaves as it is.
        rows = (part.to(shape.dtype).transpose(0, 1).contiguous() for part in (key, value))
        stored = memory if shape.cache is None else memory.view(torch.uint8)
        ops.cpu_attn_reshape_and_cache(
            *rows, *stored.chunk(2, dim=2), slots, isa, kv_cache_dtype=_platform_cache(shape)
        )
    return memory


def _platform_cache(shape: Shape) -> str:
    return "auto" if shape.cache is None else _PLATFORM_FP8[shape.cache]


def _bind(
    inputs: Inputs, memory: torch.Tensor, isa: str, query: torch.Tensor, batch: DecodeBatch, out: torch.Tensor
) -> Call:
    from vllm import _custom_ops as ops
    from vllm import envs

    shape, stored = inputs.shape, _platform_cache(inputs.shape)
    key, value = (memory if shape.cache is None else memory.view(torch.uint8)).chunk(2, dim=2)
    metadata = ops.cpu_attn_get_scheduler_metadata(
        num_reqs=len(batch.seq_lens),
        num_heads=shape.heads,
        num_kv_heads=shape.kv_heads,
        head_dim=shape.head_dim,
        seq_lens=batch.seq_lens,
        dtype=shape.dtype,
        query_start_loc=batch.query_start_loc,
        causal=True,
        sliding_window_size=-1,
        isa=isa,
        enable_kv_split=envs.VLLM_CPU_ATTN_SPLIT_KV,
        kv_cache_dtype=stored,
    )
    return partial(
        ops.cpu_attention_with_kv_cache,
        query=query,
        key_cache=key,
        value_cache=value,
        output=out,
        query_start_loc=batch.query_start_loc,
        seq_lens=batch.seq_lens,
        scale=inputs.scale,
        causal=True,
        alibi_slopes=None,
        sliding_window=-1,
        block_table=batch.block_table,
        softcap=inputs.softcap,
        scheduler_metadata=metadata,
        s_aux=None,
        kv_cache_dtype=stored,
    )
