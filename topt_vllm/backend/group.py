"""What the layers of one metadata builder share: the operator, its workspace and the counters."""

import weakref
from typing import Any

import torch

from topt_vllm.attention.api import Implementation
from topt_vllm.backend.gpu.kernel import on_device
from topt_vllm.backend.gpu.statistics import DeviceStatistics
from topt_vllm.backend.gpu.warm_up import WarmUp
from topt_vllm.backend.startup import Resolved

# By device and sizes: layers run one after another, so groups of the same sizes share one. It goes with the last.
_workspaces: weakref.WeakValueDictionary[tuple[Any, ...], Any] = weakref.WeakValueDictionary()


class LayerGroup:
    """What layers share that one metadata builder serves.

    Args:
        resolved: From :func:`topt_vllm.backend.startup.resolve`.
        num_heads: Query heads of each layer on this rank.
        num_kv_heads: KV heads of each layer on this rank.
        head_dim: D.
        block_size: Slots of a cache block.
        labels: Names in the metrics of the layers that decode with the operator.
        kv_replicas: Ranks that hold each KV head.
        device: Of the cache.

    Attributes:
        implementation: The operator.
        statistics: What the kernel counts.
        block_size: Slots of a cache block.
        warm_up: Compiles what later steps need; there once a workspace is.
    """

    warm_up: WarmUp

    def __init__(
        self,
        resolved: Resolved,
        num_heads: int,
        num_kv_heads: int,
        head_dim: int,
        block_size: int,
        labels: list[str],
        kv_replicas: float,
        device: torch.device,
    ) -> None:
        self.implementation = on_device(resolved.implementation, resolved.implementation_name)
        self._kernel: Implementation | None = None
        self.statistics = DeviceStatistics(
            torch.stack([self.implementation.new_statistics(device) for _ in labels]),
            labels,
            num_heads,
            kv_replicas,
        )
        self.block_size = block_size
        self._heads = (num_heads, num_kv_heads, head_dim)
        self._device = device

    @property
    def kernel(self) -> Implementation:
        """The operator on the workspace.

        Raises:
            RuntimeError: No decode step's metadata was built yet.
        """
        if self._kernel is None:
            raise RuntimeError("TOPTHETA decodes before its workspace was allocated; this is a bug")
        return self._kernel

    def allocate(self, max_sequences: int, max_query_rows: int) -> None:
        """Gives the layers a workspace; only the first call does anything, so captured graphs stay right.

        Args:
            max_sequences: Most sequences of a step.
            max_query_rows: Most query rows of a sequence that decodes.
        """
        if self._kernel is not None:
            return
        self.warm_up = WarmUp(self.implementation, max_sequences, max_query_rows)
        key = (self._device, *self._heads, max_sequences, max_query_rows)
        workspace = _workspaces.get(key)
        if workspace is None:
            workspace = self.implementation.allocate_workspace(
                max_sequences, max_query_rows, *self._heads, self._device
            )
            _workspaces[key] = workspace
        self._kernel = self.implementation.bind(workspace)
