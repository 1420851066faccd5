"""Binds the layers of one metadata builder to thresholds, counters, states and what they share."""

from collections import Counter
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

import torch
from vllm.config import VllmConfig

from topt_vllm.attention.common import KeyScreen, Thetas
from topt_vllm.backend import compat
from topt_vllm.backend.counters import HostCounters, PlatformLayer
from topt_vllm.backend.group import LayerGroup
from topt_vllm.backend.layer import TopThetaLayer
from topt_vllm.backend.layers import kv_replicas, layer_label, promised_keys, screen_of, thresholds_of
from topt_vllm.backend.startup import Resolved
from topt_vllm.backend.states import states_of
from topt_vllm.backend.thresholds import (
    AdaptingThresholds,
    DraftingThresholds,
    LayerThresholds,
    SiftingThresholds,
    Thresholds,
)


@dataclass
class _Sorted:
    """A builder's layers by what attends in them.

    Attributes:
        layers: Those that decode with the operator, by name.
        thetas: Thresholds of each, None for θ = −inf.
        sparse: Whether each may skip rows.
        dense: Those that may not, by reason.
        platform: Layers that stay with the platform's kernel.
        draft_dense: Those of a draft model that decode with the operator, by reason.
        draft_platform: Those of a draft model that stay with the platform's kernel.
        replicas: Ranks that hold each KV head; all layers have the same heads.
    """

    layers: dict[str, Any] = field(default_factory=dict)
    thetas: list[Thetas | None] = field(default_factory=list)
    sparse: list[bool] = field(default_factory=list)
    dense: Counter[str] = field(default_factory=Counter)
    platform: Counter[PlatformLayer] = field(default_factory=Counter)
    draft_dense: Counter[str] = field(default_factory=Counter)
    draft_platform: Counter[PlatformLayer] = field(default_factory=Counter)
    replicas: float = 1.0


@dataclass(frozen=True)
class BoundLayers:
    """What a builder needs of its layers.

    Attributes:
        group: What the layers that decode with the operator share; None without any.
        model: What the host counts of a step of the model.
        drafts: What it counts of a step of the draft model, or of the model's own drafts.
    """

    group: LayerGroup | None
    model: HostCounters
    drafts: HostCounters


def bind_layers(
    layers: Mapping[str, Any],
    resolved: Resolved,
    block_size: int,
    max_rows: int,
    vllm_config: VllmConfig,
    device: torch.device,
) -> BoundLayers:
    """Sets ``impl.bound`` of the layers that decode with the operator, and ``impl.platform_reason`` of the others.

    vLLM makes several builders for the same layers: for microbatches, and to measure memory before the real cache.
    Layers stay bound to what the first of them made, so that graphs and all builders mean the same buffers.

    Args:
        layers: vLLM's attention layers of the builder, by name; all of the same heads.
        resolved: From :func:`topt_vllm.backend.startup.resolve`.
        block_size: Slots of a cache block.
        max_rows: Most decode rows of a step.
        vllm_config: Of the engine.
        device: Of the cache.

    Raises:
        ValueError: A layer's heads are not those of the model that was identified.
    """
    tensor_parallel_size = vllm_config.parallel_config.tensor_parallel_size
    found = _sort(layers, resolved, tensor_parallel_size)
    model = HostCounters(found.dense, sum(found.sparse), found.platform, resolved.dense_up_to)
    drafts = HostCounters(found.draft_dense, 0, found.draft_platform, resolved.dense_up_to)
    if resolved.drafts:
        drafts = model
        verifying = found.dense + Counter(verifies_drafts=sum(found.sparse))
        model = HostCounters(verifying, 0, found.platform, resolved.dense_up_to)
    if all(map(compat.is_draft_layer, layers)):  # the draft model's own builder
        model = drafts
    if not found.layers:
        return BoundLayers(None, model, drafts)
    first = next(iter(found.layers.values()))
    bound = first.impl.bound
    if bound is not None and bound.group.block_size == block_size:
        return BoundLayers(bound.group, model, drafts)
    thresholds = _thresholds(found, resolved, first.num_heads, max_rows, tensor_parallel_size, device)
    group = LayerGroup(
        resolved,
        (first.num_heads, first.num_kv_heads, first.head_size),
        block_size,
        [layer_label(name) for name in found.layers],
        found.replicas,
        thresholds,
        device,
    )
    each = zip(found.layers.items(), thresholds.layers, group.counters.layers, strict=True)
    for (name, layer), own, statistics in each:
        layer.impl.bound = TopThetaLayer(
            group,
            resolved.config.selection,
            own,
            statistics,
            states_of(name, layer, vllm_config),
            _key_screen(layer, name, resolved, tensor_parallel_size, device) if own.skips else None,
        )
    return BoundLayers(group, model, drafts)


def _sort(layers: Mapping[str, Any], resolved: Resolved, tensor_parallel_size: int) -> _Sorted:
    found = _Sorted()
    for name, layer in layers.items():
        found.replicas = kv_replicas(layer, name, resolved, tensor_parallel_size)
        thetas, reason = thresholds_of(layer, name, resolved, tensor_parallel_size)
        draft = compat.is_draft_layer(name)
        if reason and (resolved.dense_on_platform or layer.sliding_window is not None):
            layer.impl.platform_reason = reason
            kinds = found.draft_platform if draft else found.platform
            kinds[_platform_layer(layer, reason, found.replicas)] += 1
            continue
        found.layers[name] = layer
        found.thetas.append(thetas)
        found.sparse.append(reason is None)
        if reason:
            (found.draft_dense if draft else found.dense)[reason] += 1
    return found


def _thresholds(
    found: _Sorted,
    resolved: Resolved,
    num_heads: int,
    max_rows: int,
    tensor_parallel_size: int,
    device: torch.device,
) -> Thresholds:
    if resolved.config.sift is not None:
        return SiftingThresholds(found.sparse, num_heads, resolved.config.sift, device)
    thetas = [each and each.to(device) for each in found.thetas]
    if resolved.drafts:
        return DraftingThresholds(thetas)
    keys = [
        promised
        for (name, layer), sparse in zip(found.layers.items(), found.sparse, strict=True)
        if sparse and (promised := promised_keys(layer, name, resolved, tensor_parallel_size))
    ]
    if keys:
        return AdaptingThresholds(thetas, keys, resolved.dense_up_to, max_rows)
    return Thresholds([LayerThresholds(each) for each in thetas])


def _key_screen(
    layer: Any, layer_name: str, resolved: Resolved, tensor_parallel_size: int, device: torch.device
) -> KeyScreen | None:
    """The K screen of a layer that may skip rows, without codes; None for none."""
    transform, format = screen_of(layer, layer_name, resolved, tensor_parallel_size), resolved.config.screen
    if transform is None or format is None:
        return None
    codes = torch.empty(0, dtype=torch.uint8, device=device)
    limits = resolved.implementation.capabilities.screens[format]
    return KeyScreen(format, transform.to(device), codes, resolved.config.screen_margin, limits.min_seq_len)


def count_platform_layers(
    layers: Mapping[str, Any], resolved: Resolved, tensor_parallel_size: int
) -> HostCounters:
    """What the host counts of layers that all stay with the platform's kernel; arguments as :func:`bind_layers`.

    Args:
        layers: vLLM's attention layers, by name.
        resolved: As there.
        tensor_parallel_size: Ranks that the query heads are spread over.

    Raises:
        RuntimeError: A layer has thresholds.
    """
    platform: Counter[PlatformLayer] = Counter()
    for name, layer in layers.items():
        _, reason = thresholds_of(layer, name, resolved, tensor_parallel_size)
        if reason is None:
            raise RuntimeError(
                f"{name} has thresholds, but an engine without any was made in this process before, and vLLM keeps "
                "its choice of attention. Start this one in a process of its own."
            )
        replicas = kv_replicas(layer, name, resolved, tensor_parallel_size)
        platform[_platform_layer(layer, reason, replicas)] += 1
    return HostCounters(Counter(), 0, platform, 0)


def _platform_layer(layer: Any, reason: str, kv_replicas: float) -> PlatformLayer:
    return PlatformLayer(reason, layer.sliding_window, layer.num_heads, layer.num_kv_heads / kv_replicas)
