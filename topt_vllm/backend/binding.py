"""Binds the layers of one metadata builder to thresholds, counters, states and what they share."""

from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from vllm.config import VllmConfig

from topt_vllm.attention.common import KeyScreen
from topt_vllm.backend.counters import HostCounters, PlatformLayer
from topt_vllm.backend.group import LayerGroup
from topt_vllm.backend.layer import TopThetaLayer
from topt_vllm.backend.layers import ModelLayer
from topt_vllm.backend.resolved import Resolved
from topt_vllm.backend.states import states_of
from topt_vllm.backend.thresholds import (
    AdaptingThresholds,
    DraftingThresholds,
    SiftingThresholds,
    Thresholds,
)


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
    for each in known:
        each.layer.impl.platform_reason = each.reason if each.on_platform else None
    own = [each for each in known if not each.drafts]
    model = _host_counters(own, resolved.dense_up_to)
    drafts = _host_counters([each for each in known if each.drafts], resolved.dense_up_to)
    if resolved.drafts:
        drafts, model = model, _host_counters(own, resolved.dense_up_to, "verifies_drafts")
    if not own:  # the draft model's own builder
        model = drafts
    operated = [each for each in known if not each.on_platform]
    if not operated:
        return BoundLayers(None, model, drafts, False)
    sparse = any(each.reason is None for each in operated)
    first = operated[0].layer
    bound = first.impl.bound
    if bound is not None and bound.group.block_size == block_size:
        return BoundLayers(bound.group, model, drafts, sparse)
    thresholds = _thresholds(operated, resolved, max_rows, device)
    group = LayerGroup(
        resolved,
        (first.num_heads, first.num_kv_heads, first.head_size),
        block_size,
        [each.label for each in operated],
        [each.kv_replicas for each in operated],
        thresholds,
        device,
    )
    for index, (each, statistics) in enumerate(zip(operated, group.counters.layers, strict=True)):
        each.layer.impl.bound = TopThetaLayer(
            group,
            resolved.config.selection,
            index,
            statistics,
            states_of(each.name, each.layer, vllm_config),
            _key_screen(each, device) if each.reason is None else None,
        )
    return BoundLayers(group, model, drafts, sparse)


def _host_counters(
    layers: Sequence[ModelLayer], dense_up_to: int, otherwise: str | None = None
) -> HostCounters:
    """What the host counts of layers; ``otherwise`` is why those are dense that have thresholds."""
    reasons = [each.reason or otherwise for each in layers if not each.on_platform]
    return HostCounters(
        Counter(filter(None, reasons)),
        reasons.count(None),
        Counter(_platform_layer(each) for each in layers if each.on_platform),
        dense_up_to,
    )


def _thresholds(
    layers: Sequence[ModelLayer], resolved: Resolved, max_rows: int, device: torch.device
) -> Thresholds:
    if resolved.config.sift is not None:
        num_heads = layers[0].layer.num_heads
        return SiftingThresholds(
            [each.reason is None for each in layers], num_heads, resolved.config.sift, device
        )
    thetas = [found and found.to(device) for found, _ in map(ModelLayer.thresholds, layers)]
    if resolved.drafts:
        return DraftingThresholds(thetas)
    keys = [promised for each in layers if each.reason is None and (promised := each.promised_keys())]
    if keys:
        return AdaptingThresholds(thetas, keys, resolved.dense_up_to, max_rows)
    return Thresholds(thetas)


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
    known = [ModelLayer(layer, name, resolved, tensor_parallel_size) for name, layer in layers.items()]
    if sparse := [each.name for each in known if each.reason is None]:
        raise RuntimeError(
            f"{sparse[0]} has thresholds, but an engine without any was made in this process before, and vLLM "
            "keeps its choice of attention. Start this one in a process of its own."
        )
    return _host_counters(known, 0)


def _platform_layer(known: ModelLayer) -> PlatformLayer:
    layer = known.layer
    return PlatformLayer(
        str(known.reason), layer.sliding_window, layer.num_heads, layer.num_kv_heads / known.kv_replicas
    )
