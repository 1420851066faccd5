"""The two kernels that are compared, each as one call over every layer of a case."""

from collections.abc import Callable, Sequence
from functools import partial
from typing import Any

import torch

from topt_vllm import vllm_cpu_attention
from topt_vllm.attention import api
from topt_vllm.attention.common import DecodeBatch, Selection, Thetas
from topt_vllm.benchmarks.cases import Inputs
from topt_vllm.benchmarks.timing import Call, Variant
from topt_vllm.vllm_cpu_attention import CpuAttention

# vLLM's names of its CPU caches in fp8.
_PLATFORM_FP8 = {torch.float8_e4m3fn: "fp8_e4m3", torch.float8_e5m2: "fp8_e5m2"}
# Of the prompt that runs before the platform's kernel is timed.
_PROMPT_ROWS = 64


def platform_kernel(layers: Sequence[Inputs]) -> Variant | None:
    """vLLM's CPU_ATTN kernel as it would pick it here; None where it has none for this case."""
    shape = layers[0].shape
    stored = "auto" if shape.cache is None else _PLATFORM_FP8[shape.cache]
    attention = vllm_cpu_attention.choose(shape.dtype, shape.block_size, shape.head_dim, stored)
    if attention is None:
        return None
    isa = attention.instructions
    if isa == "amx" and not torch.cpu._init_amx():  # asks Linux, once for a process; in engines oneDNN has
        raise RuntimeError("vLLM would use AMX on this CPU, but Linux doesn't let this process")
    _run_prompt(attention, layers[0])
    return over_layers(f"CPU_ATTN ({isa})", partial(_platform_call, attention), layers)


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


def _run_prompt(attention: CpuAttention, inputs: Inputs) -> None:
    """A prompt of vLLM's kernel, as has run before in an engine.

    Without one its vector kernel takes up to six times as long on Intel, until the scratch memory that it shares
    with prompts was used.
    """
    shape, batch = inputs.shape, inputs.batch
    rows = min(_PROMPT_ROWS, shape.lengths[0])
    query = torch.randn(rows, shape.heads, shape.head_dim).to(shape.dtype)
    first = DecodeBatch(torch.tensor([0, rows], dtype=torch.int32), batch.seq_lens[:1], batch.block_table[:1])
    attention.bind(query, inputs.memory, first, torch.empty_like(query), inputs.scale, inputs.softcap)()


def _platform_call(attention: CpuAttention, inputs: Inputs, out: torch.Tensor) -> Call:
    """A call of vLLM's kernel."""
    # The layout of its vector kernels is ours.
    memory = _written(attention, inputs) if attention.instructions == "amx" else inputs.memory
    return attention.bind(inputs.query, memory, inputs.batch, out, inputs.scale, inputs.softcap)


def _written(attention: CpuAttention, inputs: Inputs) -> torch.Tensor:
    """The cache as vLLM writes it, [B, Hkv, 2 P, D]."""
    shape, memory = inputs.shape, torch.empty_like(inputs.memory)
    for block, (key, value) in enumerate(zip(inputs.cache.key, inputs.cache.value, strict=True)):
        slots = torch.arange(block * shape.block_size, (block + 1) * shape.block_size)
        # What an fp8 cache holds is a number of the model's dtype, which vLLM's rounding leaves as it is.
        rows = [part.to(shape.dtype).transpose(0, 1).contiguous() for part in (key, value)]
        attention.write(rows[0], rows[1], memory, slots)
    return memory
