"""CUDA graphs and events: the part of the GPU benchmark that nothing but a GPU can run."""

import torch

from topt_vllm.benchmarks.devices import Gpu
from topt_vllm.benchmarks.timing import Call


def find_gpu() -> Gpu:
    """The current GPU.

    Raises:
        ValueError: torch sees none.
    """
    if not torch.cuda.is_available():
        raise ValueError(
            f"--device cuda needs a GPU that torch sees: torch {torch.__version__}, "
            f"CUDA {torch.version.cuda}, ROCm {torch.version.hip}; run it where there is one"
        )
    device = torch.device("cuda", torch.cuda.current_device())
    return Gpu(device, _capture, _EventTimer(device))


def _capture(call: Call) -> Call:
    """A graph of the call; what it compiles and allocates once happens before."""
    side = torch.cuda.Stream()
    side.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(side):
        for _ in range(3):
            call()
    torch.cuda.current_stream().wait_stream(side)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        call()
    return graph.replay


class _EventTimer:
    """Device time of one call, the L2 cache holding other memory.

    That memory is read. Written, its lines would be dirty, and the call would pay for writing them back.
    """

    def __init__(self, device: torch.device) -> None:
        size = 4 * torch.cuda.get_device_properties(device).L2_cache_size
        self._other = torch.zeros(size // 4, dtype=torch.float32, device=device)
        self._sum = torch.zeros((), dtype=torch.float32, device=device)

    def __call__(self, call: Call) -> float:
        start, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
        torch.sum(self._other, dim=0, out=self._sum)
        start.record()
        call()
        end.record()
        end.synchronize()
        return start.elapsed_time(end) / 1e3
