"""The Triton implementation: launches the kernels without reading anything back. README.md has the derivation."""

from dataclasses import dataclass

import torch
import triton

from topt_vllm.attention import common
from topt_vllm.attention.common import (
    SCREEN_LIMITS,
    Capabilities,
    DecodeArguments,
    DecodeBatch,
    LargestBatch,
    PagedCache,
)
from topt_vllm.attention.screen import ScreenFormat
from topt_vllm.attention.triton.arguments import check, check_cache
from topt_vllm.attention.triton.arguments import screen_bytes as screen_bytes
from topt_vllm.attention.triton.calls import DecodeStep
from topt_vllm.attention.triton.decode_kernel import _topt_decode_kernel
from topt_vllm.attention.triton.finish_calls import codes_call, finish_call
from topt_vllm.attention.triton.launch import PROGRAMS_PER_MULTIPROCESSOR, limits_of
from topt_vllm.attention.triton.workspace import allocate_workspace

capabilities = Capabilities(narrow_values=True, screens={"int4": SCREEN_LIMITS["int4"]}, graphs=True)

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


def screen_unasked(heads_per_kv: int) -> ScreenFormat | None:
    """None: a single sequence of 8k is a fifth slower behind one, and a graph is made before lengths are known."""
    return None


def new_statistics(device: torch.device | str) -> torch.Tensor:
    """Zeroed accumulators float64 [slots, 8]; rows spread over the slots, for many programs add at once."""
    return common.new_statistics(device, _STATISTICS_SLOTS)


def finish(cache: PagedCache, batch: DecodeBatch) -> None:
    """As ``finish`` of :class:`topt_vllm.attention.api.Implementation`. Nothing is read back."""
    if not batch.seq_lens.shape[0]:
        return
    check_cache(cache, batch)
    if cache.value_sums is not None:
        finish_call(cache, cache.value_sums, batch).launch()
    if cache.key_screen is not None:
        programs = PROGRAMS_PER_MULTIPROCESSOR * limits_of(cache.key.device).multiprocessors
        codes_call(cache, cache.key_screen, batch, max(1, programs // cache.key.shape[1])).launch()


@dataclass(frozen=True)
class Bound:
    """The implementation on a workspace: allocates nothing, so that a CUDA graph can capture it.

    Attributes:
        memory: The workspace, float32 [any].
        programs: Fixed number of programs of a KV head; None for the heuristic's.
    """

    memory: torch.Tensor
    programs: int | None = None

    # The module's.
    capabilities = capabilities
    finish = staticmethod(finish)
    new_statistics = staticmethod(new_statistics)
    screen_bytes = staticmethod(screen_bytes)

    def decode(self, given: DecodeArguments) -> None:
        """Every row of a batch over the paged cache, in any layout whose V rows are contiguous.

        Raises:
            RuntimeError: A tensor that the kernel can't read, or a workspace that is too small.
        """
        step = DecodeStep(**vars(given))
        check(step)
        launch = step.choose(limits_of(step.query.device), self.programs)
        words = sum(step.words(launch).values())
        if words > self.memory.numel():
            raise RuntimeError(
                f"workspace: expected at least {words} words for {step.query.shape[0]} rows of "
                f"{step.batch.seq_lens.shape[0]} sequences, got {self.memory.numel()}; allocate must be told "
                "the largest batch"
            )
        for call in step.calls(launch, self.memory, interpreted()):
            call.launch()


def allocate(largest: LargestBatch, programs: int | None = None) -> Bound:
    """As ``allocate`` of :class:`topt_vllm.attention.api.Implementation`; ``programs`` as of :class:`Bound`."""
    return Bound(allocate_workspace(largest, programs), programs)


def decode(given: DecodeArguments, programs: int | None = None) -> None:
    """As :meth:`Bound.decode`, with a workspace of its own; ``programs`` fixes their number for a KV head."""
    step, device = DecodeStep(**vars(given)), given.query.device
    words = sum(step.words(step.choose(limits_of(device), programs)).values())
    Bound(torch.empty(words, dtype=torch.float32, device=device), programs).decode(given)
