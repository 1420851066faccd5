"""Where the Triton kernels run in this session, and how cases that are made on the CPU get there.

On the GPU where torch sees one, else in Triton's interpreter on CPU tensors; ``TRITON_INTERPRET=1`` asks for the
interpreter. It is chosen for a whole process, before anything imports Triton: conftest.py imports this file first.
"""

import os
from collections.abc import Callable
from dataclasses import fields, is_dataclass, replace
from types import SimpleNamespace
from typing import Any

import pytest
import torch

from topt_vllm.attention.common import SCREEN_LIMITS, Capabilities

ON_GPU = os.environ.get("TRITON_INTERPRET", "0") in ("", "0") and torch.cuda.is_available()
DEVICE = torch.device("cuda:0" if ON_GPU else "cpu")
if not ON_GPU:
    os.environ["TRITON_INTERPRET"] = "1"

# The interpreter takes seconds for what a kernel does in milliseconds.
TRITON = pytest.param("triton", marks=[pytest.mark.gpu, pytest.mark.slow])
interpreter_only = pytest.mark.skipif(
    ON_GPU, reason="needs Triton's interpreter, and here the kernels run on the GPU; set TRITON_INTERPRET=1"
)
gpu_only = pytest.mark.skipif(not ON_GPU, reason="needs a GPU that torch sees")


def describe() -> str:
    """Where the kernels run and why, in one line."""
    if ON_GPU:
        return f"Triton kernels: on the GPU, {torch.cuda.get_device_name(DEVICE)}"
    reason = "TRITON_INTERPRET is set" if torch.cuda.is_available() else "torch sees no GPU"
    return f"Triton kernels: in Triton's interpreter on CPU tensors, for {reason}"


class Mover:
    """Copies tensors to a device by whole storages: strides, overlaps and what lies between stay as they are.

    Args:
        device: To copy to; copies are made on the CPU too.
    """

    def __init__(self, device: torch.device) -> None:
        self._device = device
        # By address: the bytes of a storage, and their copy.
        self._copies: dict[int, tuple[torch.Tensor, torch.Tensor]] = {}

    def move(self, value: Any) -> Any:
        """A tensor, or a dataclass with the tensors in it, on the device; anything else as it is."""
        if isinstance(value, torch.Tensor):
            return self._tensor(value)
        if is_dataclass(value):
            return replace(
                value, **{part.name: self.move(getattr(value, part.name)) for part in fields(value)}
            )
        return value

    def copy_back(self) -> None:
        """Brings every storage back, so that what was written beside a tensor is seen, too."""
        for original, copy in self._copies.values():
            original.copy_(copy)

    def _tensor(self, tensor: torch.Tensor) -> torch.Tensor:
        storage = tensor.untyped_storage()
        if storage.data_ptr() not in self._copies:
            original = torch.empty(0, dtype=torch.uint8).set_(storage)
            copy = torch.empty_like(original, device=self._device).copy_(original)
            self._copies[storage.data_ptr()] = original, copy
        _, copy = self._copies[storage.data_ptr()]
        moved = torch.empty(0, dtype=tensor.dtype, device=self._device)
        return moved.set_(copy.untyped_storage(), tensor.storage_offset(), tensor.size(), tensor.stride())


def on_device(function: Callable[..., None]) -> Callable[..., None]:
    """A function of the kernels for arguments on the CPU; what it writes is copied back."""
    if not ON_GPU:
        return function

    def moved(*arguments: Any, **options: Any) -> None:
        mover = Mover(DEVICE)
        function(
            *[mover.move(each) for each in arguments],
            **{name: mover.move(each) for name, each in options.items()},
        )
        mover.copy_back()

    return moved


def triton_implementation(
    decode: Callable[..., None],
    finish: Callable[..., None] | None = None,
    screen_bytes: Callable[..., int] | None = None,
) -> Any:
    """An implementation for cases on the CPU whose functions are the Triton launcher's, or made of them."""
    return SimpleNamespace(
        decode=on_device(decode),
        finish=finish and on_device(finish),
        capabilities=Capabilities(narrow_values=True, screens={"int4": SCREEN_LIMITS["int4"]}),
        screen_bytes=screen_bytes,
    )


def captured(launch: Callable[[], Any]) -> Callable[[], Any]:
    """What replays the launches as a CUDA graph; without a GPU, the function itself. Calls it once before."""
    launch()  # compiles, which would break a capture
    if not ON_GPU:
        return launch
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        launch()
    return graph.replay


def synchronize() -> None:
    """Waits for what was started on the GPU."""
    if ON_GPU:
        torch.cuda.synchronize(DEVICE)
