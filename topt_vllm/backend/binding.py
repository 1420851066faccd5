"""Binds the layers of one metadata builder to thresholds, counters, states and what they share."""

from collections import Counter
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

import torch
from vllm.config import VllmConfig

from topt_vllm.attention.common import KeyScreen, Thetas
from topt_vllm.backend.counters import HostCounters, PlatformLayer
from topt_vllm.backend.group import LayerGroup
from topt_vllm.backend.layer import TopThetaLayer
from topt_vllm.backend.layers import ModelLayer
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
        layers: Those that decode with the operator.
        thetas: Thresholds of each, None for θ = −inf.
        sparse: Whether each may skip rows.
        dense: Those that may not, by reason.
        platform: Layers that stay with the platform's kernel.
        draft_dense: Those of a draft model that decode with the operator, by reason.
        draft_platform: Those of a draft model that stay with the platform's kernel.
        replicas: Ranks that hold each KV head; all layers have the same heads.
    """

    layers: list[ModelLayer] = field(default_factory=list)
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
        sparse: Whether some of the builder's own layers may skip rows.
    """

    group: LayerGroup | None
    model: HostCounters
    drafts: HostCounters
    sparse: bool


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
    ranks = vllm_config.parallel_config.tensor_parallel_size
    known = [ModelLayer(layer, name, resolved, ranks) for name, layer in layers.items()]
    found = _sort(known)
    model = HostCounters(found.dense, sum(found.sparse), found.platform, resolved.dense_up_to)
    drafts = HostCounters(found.draft_dense, 0, found.draft_platform, resolved.dense_up_to)
    if resolved.drafts:
        drafts = model
        verifying = found.dense + Counter(verifies_drafts=sum(found.sparse))
        model = HostCounters(verifying, 0, found.platform, resolved.dense_up_to)
    if all(each.drafts for each in known):  # the draft model's own builder
        model = drafts
    if not found.layers:
        return BoundLayers(None, model, drafts, False)
    first = found.layers[0].layer
    bound = first.impl.bound
    if bound is not None and bound.group.block_size == block_size:
        return BoundLayers(bound.group, model, drafts, any(found.sparse))
    thresholds = _thresholds(found, resolved, first.num_heads, max_rows, device)
    group = LayerGroup(
        resolved,
        (first.num_heads, first.num_kv_heads, first.head_size),
        block_size,
        [each.label for each in found.layers],
        found.replicas,
        thresholds,
        device,
    )
    for each, own, statistics in zip(found.layers, thresholds.layers, group.counters.layers, strict=True):
        each.layer.impl.bound = TopThetaLayer(
            group,
            resolved.config.selection,
            own,
            statistics,
            states_of(each.name, each.layer, vllm_config),
            _key_screen(each, device) if own.skips else None,
        )
    return BoundLayers(group, model, drafts, any(found.sparse))


def _sort(layers: list[ModelLayer]) -> _Sorted:
    found = _Sorted()
    for each in layers:
        found.replicas = each.kv_replicas
        thetas, reason = each.thresholds()
        if reason and each.dense_on_platform:
            each.layer.impl.platform_reason = reason
            kinds = found.draft_platform if each.drafts else found.platform
            kinds[_platform_layer(each, reason)] += 1
            continue
        found.layers.append(each)
        found.thetas.append(thetas)
        found.sparse.append(reason is None)
        if reason:
            (found.draft_dense if each.drafts else found.dense)[reason] += 1
    return found


def _thresholds(
    found: _Sorted,
    resolved: Resolved,
    num_heads: int,
    max_rows: int,
    device: torch.device,
) -> Thresholds:
    if resolved.config.sift is not None:
        return SiftingThresholds(found.sparse, num_heads, resolved.config.sift, device)
    thetas = [each and each.to(device) for each in found.thetas]
    if resolved.drafts:
        return DraftingThresholds(thetas)
    keys = [
        promised
        for each, sparse in zip(found.layers, found.sparse, strict=True)
        if sparse and (promised := each.promised_keys())
    ]
    if keys:
        return AdaptingThresholds(thetas, keys, resolved.dense_up_to, max_rows)
    return Thresholds([LayerThresholds(each) for each in thetas])


def _key_screen(layer: ModelLayer, device: torch.device) -> KeyScreen | None:
    """The K screen of a layer that may skip rows, without codes; None for none."""
    resolved, transform = layer.resolved, layer.screen()
    format = resolved.screen_format
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
        known = ModelLayer(layer, name, resolved, tensor_parallel_size)
        _, reason = known.thresholds()
        if reason is None:
            raise RuntimeError(
                f"{name} has thresholds, but an engine without any was made in this process before, and vLLM keeps "
                "its choice of attention. Start this one in a process of its own."
            )
        platform[_platform_layer(known, reason)] += 1
    return HostCounters(Counter(), 0, platform, 0)


def _platform_layer(known: ModelLayer, reason: str) -> PlatformLayer:
    layer = known.layer
    return PlatformLayer(
        reason, layer.sliding_window, layer.num_heads, layer.num_kv_heads / known.kv_replicas
    )
