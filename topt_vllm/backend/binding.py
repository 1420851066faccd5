"""Binds the layers of one metadata builder to thresholds, counters and what they share."""

from collections import Counter
from dataclasses import dataclass, field
from typing import Any

import torch

from topt_vllm.attention.common import Thetas
from topt_vllm.backend.gpu.group import LayerGroup
from topt_vllm.backend.gpu.layer import GpuLayer
from topt_vllm.backend.gpu.statistics import HostCounters, PlatformLayer
from topt_vllm.backend.layers import kv_replicas, layer_label, thresholds_of
from topt_vllm.backend.page import Tail
from topt_vllm.backend.startup import Resolved


@dataclass
class _Sorted:
    """A builder's layers by what attends in them.

    Attributes:
        impls: Attention implementations that decode with the operator.
        thetas: Thresholds of each, None for θ = −inf.
        labels: Names of each in the metrics.
        dense: Those without thresholds, by reason.
        platform: Layers that stay with the platform's kernel.
        replicas: Ranks that hold each KV head; all layers have the same heads.
    """

    impls: list[Any] = field(default_factory=list)
    thetas: list[Thetas | None] = field(default_factory=list)
    labels: list[str] = field(default_factory=list)
    dense: Counter[str] = field(default_factory=Counter)
    platform: Counter[PlatformLayer] = field(default_factory=Counter)
    replicas: float = 1.0


def bind_layers(
    impls: dict[str, Any],
    resolved: Resolved,
    block_size: int,
    tensor_parallel_size: int,
    device: torch.device,
) -> tuple[LayerGroup | None, HostCounters]:
    """Sets ``impl.bound`` of the layers that decode with the operator, and ``impl.platform_reason`` of the others.

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
    found = _sort(impls, resolved, tensor_parallel_size)
    counters = HostCounters(
        found.dense, len(found.impls) - found.dense.total(), found.platform, resolved.dense_up_to
    )
    if not found.impls:
        return None, counters
    first = found.impls[0]
    if first.bound is not None and first.bound.group.block_size == block_size:
        return first.bound.group, counters
    group = LayerGroup(
        resolved,
        first.num_heads,
        first.num_kv_heads,
        first.head_size,
        block_size,
        found.labels,
        found.replicas,
        device,
    )
    for impl, thetas, statistics in zip(found.impls, found.thetas, group.statistics.layers, strict=True):
        impl.bound = GpuLayer(
            group,
            resolved.config.operator_policy,
            thetas.to(device) if thetas else None,
            block_size,
            statistics,
            Tail(impl.num_kv_heads, impl.head_size),
        )
    return group, counters


def _sort(impls: dict[str, Any], resolved: Resolved, tensor_parallel_size: int) -> _Sorted:
    found = _Sorted()
    for name, impl in impls.items():
        found.replicas = kv_replicas(impl, name, resolved, tensor_parallel_size)
        # A window is short already.
        window = impl.sliding_window[0] + 1 or None
        thetas, reason = thresholds_of(impl, name, resolved, tensor_parallel_size)
        if window or (reason and resolved.dense_on_platform):
            impl.platform_reason = "sliding_window" if window else reason
            found.platform[_platform_layer(impl, impl.platform_reason, window, found.replicas)] += 1
            continue
        found.impls.append(impl)
        found.thetas.append(thetas)
        found.labels.append(layer_label(name))
        if reason:
            found.dense[reason] += 1
    return found


def count_platform_layers(
    layers: dict[str, Any], resolved: Resolved, tensor_parallel_size: int
) -> HostCounters:
    """What the host counts of layers that all stay with the platform's kernel; arguments as :func:`bind_layers`.

    Args:
        layers: vLLM's attention layers, by name.
        resolved: As there.
        tensor_parallel_size: As there.

    Raises:
        RuntimeError: A layer has thresholds.
    """
    platform: Counter[PlatformLayer] = Counter()
    for name, layer in layers.items():
        thetas, reason = thresholds_of(layer, name, resolved, tensor_parallel_size)
        if layer.sliding_window is not None:
            reason = "sliding_window"
        elif thetas is not None or reason is None:
            raise RuntimeError(
                f"{name} has thresholds, but an engine without any was made in this process before, and vLLM keeps "
                "its choice of attention. Start this one in a process of its own."
            )
        replicas = kv_replicas(layer, name, resolved, tensor_parallel_size)
        platform[_platform_layer(layer, reason, layer.sliding_window, replicas)] += 1
    return HostCounters(Counter(), 0, platform, 0)


def _platform_layer(layer: Any, reason: str, window: int | None, kv_replicas: float) -> PlatformLayer:
    return PlatformLayer(reason, window, layer.num_heads, layer.num_kv_heads / kv_replicas)
