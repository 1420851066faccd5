"""K screens of the cases that are measured."""

from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import cast

import torch

from topt_vllm.attention import api, reference
from topt_vllm.attention.common import KeyScreen, Selection, Stat, Thetas
from topt_vllm.attention.margin import DEFAULT_MARGIN
from topt_vllm.attention.screen import (
    ScreenFormat,
    ScreenTransform,
    refined_scores,
    rotation_signs,
    screen_scores,
)
from topt_vllm.benchmarks.cases import Inputs, Shape
from topt_vllm.benchmarks.oracle import moved_by

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

# Of the upper ends of scores, which are made in single precision.
_ROUNDING = 1e-5


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


def ties(inputs: Inputs, thetas: Thetas, selection: Selection) -> float:
    """What keys that rounding decides about behind a screen may do to an element of the output.

    The upper end of what plane one says may be rounded to either side of θ, and so may a score of both planes, for
    which kernels take the query in 16 bits.
    """
    screen = inputs.cache.key_screen
    effect = 0.0
    for sequence, n, head, heads in inputs.groups():
        if screen is None or n <= screen.min_seq_len:
            continue
        theta = thetas.at(n)[heads, None]
        key, value = inputs.gather(sequence, head, torch.float32)
        transform = screen.transform.heads(head, 1)
        keys, queries = transform.encode(key[None]), transform.queries(inputs.query[sequence, heads])
        _, upper = screen_scores(queries, keys, screen.margin, inputs.scale)
        refined = refined_scores(queries, keys, inputs.scale)
        upper, score = (reference.softcapped(part, inputs.softcap) for part in (upper, refined))
        tied = (upper - theta).abs() <= _ROUNDING * (1.0 + upper.abs())
        if screen.format == "int4+4":
            half_steps = queries.rotated.abs().amax(dim=-1, keepdim=True) / (2 * 32767)
            magnitude = keys.step.float() / 16.0 * (keys.codes + 0.5).abs().sum(dim=-1)
            tied |= (score - theta).abs() <= inputs.scale * half_steps * magnitude
        effect = max(effect, moved_by(tied, score, value, selection))
    return effect


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
