"""What measuring depends on besides the kernels: rivals, streaming, graphs and the clock of a device."""

import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from typing import cast

import torch

from topt_vllm.attention.api import Implementation, load_implementation
from topt_vllm.attention.common import LargestBatch
from topt_vllm.benchmarks.cases import Inputs, Shape, SharedRows, make_inputs, placed_inputs
from topt_vllm.benchmarks.kernels import platform_kernel
from topt_vllm.benchmarks.rivals import rivals
from topt_vllm.benchmarks.timing import Call, Variant, streaming_read

_STREAM_BYTES = 2**30  # far more than any GPU's caches hold
# KV cache of a CPU's call: a K screen leaves a fifth of it to read, which is still several times what caches hold.
# Short contexts are copied as often as a model has layers.
_COLD_BYTES = 2**30
_MOST_COPIES = 32


@dataclass(frozen=True)
class Cpu:
    """The CPU: calls as they are, by the wall clock."""

    def inputs(self, shape: Shape) -> Inputs:
        """A synthetic case on the layout of the device's cache."""
        return make_inputs(shape)

    def placed(self, rows: SharedRows) -> Inputs:
        """A batch on the layout of the device's cache."""
        return placed_inputs(rows)

    def implementation(self, inputs: Inputs) -> Implementation:
        """Ours, for calls like this one."""
        return load_implementation("cpu", "cpu")[1]

    def rivals(self, layers: Sequence[Inputs]) -> tuple[list[Variant], dict[str, str]]:
        """The platform's dense kernels, and why others are left out, by name."""
        stock = platform_kernel(layers)
        return ([stock], {}) if stock else ([], {"CPU_ATTN": "vLLM has none here for this dtype and size"})

    def copies(self, layers: Sequence[Inputs]) -> int:
        """How many copies of the layers a call goes over, so that each has left the caches when its turn comes."""
        return min(_MOST_COPIES, -(-_COLD_BYTES // sum(inputs.memory.nbytes for inputs in layers)))

    def stream(self, memory: torch.Tensor) -> Variant:
        """Reads memory in order."""
        return streaming_read(memory)

    def ready(self, variant: Variant) -> Variant:
        """The variant as it is timed."""
        return variant

    def measure(self, call: Call) -> float:
        """Seconds of one call."""
        start = time.perf_counter()
        call()
        return time.perf_counter() - start


@dataclass(frozen=True)
class Gpu:
    """A GPU: calls captured in graphs, by the device's clock.

    Attributes:
        device: Of the tensors.
        capture: A call as a graph of what it launches.
        measure: Seconds of one call, the caches cold.
        stream_bytes: Moved by one streaming copy.
    """

    device: torch.device
    capture: Callable[[Call], Call]
    measure: Callable[[Call], float]
    stream_bytes: int = _STREAM_BYTES

    def inputs(self, shape: Shape) -> Inputs:
        """As :meth:`Cpu.inputs`."""
        from topt_vllm.benchmarks.device_cases import device_inputs

        return device_inputs(shape, self.device)

    def placed(self, rows: SharedRows) -> Inputs:
        """As :meth:`Cpu.placed`."""
        from topt_vllm.benchmarks.device_cases import placed_device_inputs

        moved = {name: getattr(rows, name).to(self.device) for name in ("query", "key", "value", "table")}
        return placed_device_inputs(replace(rows, **moved))

    def implementation(self, inputs: Inputs) -> Implementation:
        """As :meth:`Cpu.implementation`: the Triton kernel on a workspace for this shape, as a graph needs it."""
        from topt_vllm.attention.triton import launcher

        launcher.prepare(self.device.type)
        shape = inputs.shape
        heads = (shape.heads, shape.kv_heads, shape.head_dim)
        return cast(Implementation, launcher.allocate(LargestBatch(shape.batch, 1, *heads, self.device)))

    def rivals(self, layers: Sequence[Inputs]) -> tuple[list[Variant], dict[str, str]]:
        """As :meth:`Cpu.rivals`."""
        return rivals(layers)

    def copies(self, layers: Sequence[Inputs]) -> int:
        """As :meth:`Cpu.copies`: one, for ``measure`` empties the caches."""
        return 1

    def stream(self, memory: torch.Tensor) -> Variant:
        """Copies one half of a buffer to the other, so that the buffer's bytes are what moves."""
        scratch = torch.zeros(self.stream_bytes, dtype=torch.uint8, device=self.device)
        source, target = scratch.chunk(2)
        return self.ready(Variant("streaming copy", lambda: target.copy_(source), [scratch]))

    def ready(self, variant: Variant) -> Variant:
        """As :meth:`Cpu.ready`."""
        return replace(variant, call=self.capture(variant.call))


Device = Cpu | Gpu
CPU = Cpu()
