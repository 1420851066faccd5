"""The layers of one metadata builder, bound to thresholds, counters and one workspace."""

import logging
import weakref
from collections import Counter
from typing import Any

import torch

from topt_vllm.attention.api import Implementation
from topt_vllm.backend.gpu.kernel import on_device
from topt_vllm.backend.gpu.layer import GpuLayer
from topt_vllm.backend.gpu.statistics import DeviceStatistics, HostCounters
from topt_vllm.backend.layers import kv_replicas, layer_label, thresholds_of
from topt_vllm.backend.page import Tail
from topt_vllm.backend.startup import Resolved

logger = logging.getLogger("vllm.topt_vllm")

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
    """

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

    def allocate(self, max_sequences: int, max_query_rows: int, max_blocks: int) -> None:
        """Gives the layers a workspace; only the first call does anything, so captured graphs stay right.

        Args:
            max_sequences: Most sequences of a step.
            max_query_rows: Most query rows of a sequence that decodes.
            max_blocks: Entries in a row of vLLM's block table.
        """
        if self._kernel is not None:
            return
        capacity = max_blocks * self.block_size
        key = (self._device, *self._heads, max_sequences, max_query_rows, capacity)
        workspace = _workspaces.get(key)
        if workspace is None:
            workspace = self.implementation.allocate_workspace(
                max_sequences * max_query_rows,
                max_sequences,
                *self._heads,
                capacity,
                max_query_rows,
                self._device,
            )
            _workspaces[key] = workspace
        self._kernel = self.implementation.bind(workspace)


def bind_layers(
    impls: dict[str, Any],
    resolved: Resolved,
    block_size: int,
    tensor_parallel_size: int,
    device: torch.device,
) -> tuple[LayerGroup | None, HostCounters]:
    """Sets ``impl.bound`` of the layers that decode with the operator.

    vLLM makes several builders for the same layers: for microbatches, and to measure memory before the real cache.
    Layers stay bound to what the first of them made, so that graphs and all builders mean the same buffers.

    Args:
        impls: Attention implementations of the builder's layers, by name; all of the same heads.
        resolved: From :func:`topt_vllm.backend.startup.resolve`.
        block_size: Slots of a cache block.
        tensor_parallel_size: Ranks that the query heads are spread over.
        device: Of the cache.

    Returns:
        What the layers share, None when each stays with the platform's kernel; and what the host counts.

    Raises:
        ValueError: A layer's heads are not those of the model that was identified.
    """
    windows: Counter[tuple[int, int, float]] = Counter()
    dense: Counter[str] = Counter()
    ours: list[tuple[Any, Any]] = []
    labels: list[str] = []
    replicas = 1.0  # all layers have the same heads
    for name, impl in impls.items():
        replicas = kv_replicas(impl, name, resolved, tensor_parallel_size)
        if impl.platform_reason:
            windows[(impl.sliding_window[0] + 1, impl.num_heads, impl.num_kv_heads / replicas)] += 1
            continue
        labels.append(layer_label(name))
        thetas, reason = thresholds_of(impl, name, resolved, tensor_parallel_size)
        ours.append((impl, thetas))
        if reason:
            dense[reason] += 1
    counters = HostCounters(dense, len(ours) - dense.total(), windows, resolved.dense_up_to)
    if not ours:
        return None, counters
    bound = ours[0][0].bound
    if bound is not None and bound.group.block_size == block_size:
        return bound.group, counters
    first = ours[0][0]
    group = LayerGroup(
        resolved,
        first.num_heads,
        first.num_kv_heads,
        first.head_size,
        block_size,
        labels,
        replicas,
        device,
    )
    for (impl, thetas), statistics in zip(ours, group.statistics.layers, strict=True):
        impl.bound = GpuLayer(
            group,
            resolved.config.operator_policy,
            thetas.to(device) if thetas else None,
            block_size,
            statistics,
            Tail(impl.num_kv_heads, impl.head_size),
        )
    return group, counters
