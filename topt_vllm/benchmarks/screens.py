"""K screens of the cases that are measured."""

from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import cast

import torch

from topt_vllm.attention import api, reference
from topt_vllm.attention.common import KeyScreen, Selection, Stat, Thetas
from topt_vllm.attention.margin import DEFAULT_MARGIN
from topt_vllm.attention.screen import ScreenFormat, ScreenTransform, rotation_signs
from topt_vllm.benchmarks.cases import Inputs, Shape

OFF = "off"


@dataclass(frozen=True)
class Screens:
    """Which to measure.

    Attributes:
        names: Values of ``k_screen``.
        margin: Standard deviations; None for a hard bound.
    """

    names: Sequence[str] = (OFF,)
    margin: float | None = DEFAULT_MARGIN


NO_SCREEN = Screens()


def plain_transform(shape: Shape) -> ScreenTransform:
    """That of synthetic keys, whose channels are all alike."""
    heads = torch.zeros(shape.kv_heads, shape.head_dim)
    return ScreenTransform(heads, heads + 1.0, rotation_signs(0, shape.head_dim))


def with_screen(
    implementation: api.Implementation,
    inputs: Inputs,
    name: str,
    transform: ScreenTransform,
    margin: float | None,
) -> Inputs:
    """The case with a low-bit copy of its K.

    Raises:
        ValueError: The implementation has no such K screen.
    """
    if name == OFF:
        return inputs
    shape, format = inputs.shape, cast(ScreenFormat, name)
    api.require(implementation, screen=format)
    size = implementation.screen_bytes(format, shape.head_dim, shape.block_size)
    device = inputs.query.device
    codes = torch.zeros(shape.total_blocks, shape.kv_heads, size, dtype=torch.uint8, device=device)
    min_seq_len = implementation.capabilities.screens[format].min_seq_len
    cache = replace(
        inputs.cache, key_screen=KeyScreen(format, transform.to(device), codes, margin, min_seq_len)
    )
    implementation.finish(cache, inputs.written)
    return replace(inputs, cache=cache)


def specified(inputs: Inputs, thetas: Thetas | None, selection: Selection) -> torch.Tensor:
    """What the reference operator gives for a case with a screen, float32 [S, H, D]."""
    out = torch.empty_like(inputs.query, dtype=torch.float32)
    reference.decode(inputs.arguments(thetas, selection, out))
    return out


def bytes_read(inputs: Inputs, counts: torch.Tensor) -> int:
    """Of the copy of K: plane one and the steps of all keys, plane two of candidates if there is one."""
    screen, dim = inputs.cache.key_screen, inputs.shape.head_dim
    if screen is None:
        return 0
    if screen.format == "int4":
        return int(counts[Stat.V_ROWS]) * (dim // 2 + 4)
    # Rows of short contexts read K, and nothing of the copy.
    read, refined = (int(counts[stat] - counts[Stat.K_ROWS_READ]) for stat in (Stat.V_ROWS, Stat.CANDIDATES))
    return read * (dim // 2 + 4) + refined * dim // 2
