"""The Triton implementation: launches the kernels without reading anything back. README.md has the derivation."""

from dataclasses import dataclass

import torch
import triton

from topt_vllm.attention.common import DecodeBatch, PagedCache, Policy, RowThetas, Stat, Thetas
from topt_vllm.attention.triton.arguments import check
from topt_vllm.attention.triton.calls import Step, sums_call
from topt_vllm.attention.triton.decode_kernel import _topt_decode_kernel
from topt_vllm.attention.triton.launch import target_of
from topt_vllm.attention.triton.workspace import Workspace, allocate_workspace

__all__ = [
    "Bound",
    "Workspace",
    "allocate_workspace",
    "bind",
    "decode",
    "new_statistics",
    "prepare",
    "update_sums",
]

TAKES_SINKS = TAKES_NARROW_VALUES = True

_STATISTICS_SLOTS = 32


def interpreted() -> bool:
    """Whether Triton's interpreter runs the kernels."""
    return not isinstance(_topt_decode_kernel, triton.JITFunction)


def prepare(device_type: str) -> None:
    """Checks that the kernels can run on a device; they are compiled when they are first launched.

    Raises:
        RuntimeError: CPU tensors without Triton's interpreter.
    """
    if device_type == "cpu" and not interpreted():
        raise RuntimeError(
            "the triton kernel runs on GPUs, and the tensors are on the CPU. Use implementation cpu or auto here; "
            "to check the kernel without a GPU, set TRITON_INTERPRET=1 before Triton is imported (very slow)."
        )


def new_statistics(device: torch.device | str) -> torch.Tensor:
    """Zeroed accumulators float64 [slots, 7]: their sum over slots counts, and rows spread over the slots."""
    return torch.zeros(_STATISTICS_SLOTS, len(Stat), dtype=torch.float64, device=device)


@dataclass(frozen=True)
class Bound:
    """The implementation on a workspace: allocates nothing, so that a CUDA graph can capture it."""

    workspace: Workspace

    def decode(
        self,
        query: torch.Tensor,
        cache: PagedCache,
        batch: DecodeBatch,
        thetas: Thetas | RowThetas | None,
        policy: Policy,
        scale: float,
        softcap: float,
        out: torch.Tensor,
        statistics: torch.Tensor | None,
        reached: torch.Tensor | None = None,
        sinks: torch.Tensor | None = None,
    ) -> None:
        """Every row of a batch over the paged cache; arguments as :func:`topt_vllm.attention.api.decode`.

        Args:
            query: [R, H, D].
            cache: Blocks in any layout whose V rows are contiguous.
            batch: Rows, context lengths and block table, int32.
            thetas: Thresholds, or None for θ = −inf.
            policy: Selection and compensation.
            scale: Factor of q·k.
            softcap: Logits softcap, 0 for none.
            out: [R, H, Dv], written.
            statistics: float64 [7] or [slots, 7] to add to, or None.
            reached: int64 [R, H] to add to, or None.
            sinks: float32 [H], or None.

        Raises:
            RuntimeError: A tensor that the kernel can't read, or a workspace that is too small.
        """
        check(query, cache, batch, out, reached)
        step = Step(query, cache, batch, thetas, policy, scale, softcap, out, statistics, reached, sinks)
        launch = step.choose(target_of(query.device), self.workspace.programs)
        words, memory = step.parts(launch).words, self.workspace.memory
        if words > memory.numel():
            raise RuntimeError(
                f"workspace: expected at least {words} words for {query.shape[0]} rows of "
                f"{batch.seq_lens.shape[0]} sequences, got {memory.numel()}; allocate_workspace must be told the "
                "largest batch"
            )
        for call in step.calls(launch, memory, interpreted()):
            call.launch()

    def update_sums(self, cache: PagedCache, slot_mapping: torch.Tensor) -> None:
        """As :func:`update_sums`."""
        update_sums(cache, slot_mapping)


def bind(workspace: Workspace) -> Bound:
    """The implementation on a workspace of :func:`allocate_workspace`."""
    return Bound(workspace)


def decode(
    query: torch.Tensor,
    cache: PagedCache,
    batch: DecodeBatch,
    thetas: Thetas | RowThetas | None,
    policy: Policy,
    scale: float,
    softcap: float,
    out: torch.Tensor,
    statistics: torch.Tensor | None,
    reached: torch.Tensor | None = None,
    sinks: torch.Tensor | None = None,
    programs: int | None = None,
) -> None:
    """As :meth:`Bound.decode`, with a workspace of its own; ``programs`` fixes their number for a KV head."""
    step = Step(query, cache, batch, thetas, policy, scale, softcap, out, statistics)
    words = step.parts(step.choose(target_of(query.device), programs)).words
    workspace = Workspace(torch.empty(words, dtype=torch.float32, device=query.device), programs)
    bind(workspace).decode(
        query, cache, batch, thetas, policy, scale, softcap, out, statistics, reached, sinks
    )


def update_sums(cache: PagedCache, slot_mapping: torch.Tensor) -> None:
    """Recomputes the V sum of every block whose last slot is among those just written; nothing is read back.

    Args:
        cache: The layer's cache; ``value_sums`` is written, if there is one.
        slot_mapping: int64 [tokens], slots written by the step; negative for padding.
    """
    if cache.value_sums is not None and slot_mapping.numel():
        sums_call(cache, cache.value_sums, slot_mapping).launch()
