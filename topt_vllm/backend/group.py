"""What the layers of one metadata builder share: the operator, its workspace and the counters."""

import weakref

import torch

from topt_vllm.attention.api import Implementation
from topt_vllm.attention.common import LargestBatch
from topt_vllm.backend.counters import DeviceCounters
from topt_vllm.backend.resolved import Resolved
from topt_vllm.backend.thresholds import Thresholds
from topt_vllm.backend.warm_up import WarmUp

# By device and sizes: layers run one after another, so groups of the same sizes share one. It goes with the last.
_allocated: weakref.WeakValueDictionary[LargestBatch, Implementation] = weakref.WeakValueDictionary()


def on_buffers(implementation: Implementation, largest: LargestBatch) -> Implementation:
    """The operator on buffers for batches of these sizes, which all who ask for the same share."""
    kernel = _allocated.get(largest)
    if kernel is None:
        kernel = _allocated[largest] = implementation.allocate(largest)
    return kernel


class LayerGroup:
    """What layers share that one metadata builder serves.

    Args:
        resolved: From :func:`topt_vllm.backend.startup.resolve`.
        heads: Query heads and KV heads of each layer on this rank, and D.
        block_size: Slots of a cache block.
        labels: Names in the metrics of the layers that decode with the operator.
        kv_replicas: Of each of them, ranks that hold each KV head.
        thresholds: Of these layers.
        device: Of the cache.

    Attributes:
        counters: What the kernel counts.
        block_size: Slots of a cache block.
        thresholds: Of the layers that decode with the operator.
        warm_up: Compiles what later steps need; None where nothing is compiled for a step.
    """

    def __init__(
        self,
        resolved: Resolved,
        heads: tuple[int, int, int],
        block_size: int,
        labels: list[str],
        kv_replicas: list[float],
        thresholds: Thresholds,
        device: torch.device,
    ) -> None:
        self._implementation = resolved.implementation
        graphs = self._implementation.capabilities.graphs
        self._kernel = None if graphs else self._implementation
        self.warm_up: WarmUp | None = None
        self.counters = DeviceCounters(
            torch.stack([self._implementation.new_statistics(device) for _ in labels]),
            labels,
            heads[0],
            kv_replicas,
        )
        self.block_size = block_size
        self.thresholds = thresholds
        self._heads = heads
        self._device = device

    @property
    def kernel(self) -> Implementation:
        """The operator, on buffers of its own where it needs them.

        Raises:
            RuntimeError: No step's metadata was built yet.
        """
        if self._kernel is None:
            raise RuntimeError("TOPTHETA decodes before its buffers were allocated; this is a bug")
        return self._kernel

    def allocate(self, max_sequences: int, max_query_rows: int) -> None:
        """Gives the operator its buffers; only the first call does anything, so captured graphs stay right.

        Args:
            max_sequences: Most sequences of a step.
            max_query_rows: Most query rows of a sequence that decodes.
        """
        if self._kernel is not None:
            return
        self.warm_up = WarmUp(max_sequences, max_query_rows)
        largest = LargestBatch(max_sequences, max_query_rows, *self._heads, self._device)
        self._kernel = on_buffers(self._implementation, largest)
