"""Which layers have a K screen, and what of it each rank has."""

from pathlib import Path
from typing import Any

from topt_vllm.attention.api import Implementation
from topt_vllm.attention.screen import ScreenFormat, ScreenTransform
from topt_vllm.config import ConfigError
from topt_vllm.table.command import lacks_key_statistics
from topt_vllm.table.schema import Budget, ThresholdTable


def choose_screens(
    format: ScreenFormat,
    found: tuple[ThresholdTable, Path] | None,
    budget: Budget | None,
    implementation: Implementation,
    model: str,
) -> dict[int, ScreenTransform]:
    """The sparse layers that a screen pays in, with what it knows of their K, over all KV heads.

    Layers in which it would let too many keys through are left out. Without a measurement none is.

    Args:
        format: Of the screen, one of those that the implementation has.
        found: The threshold table, and where it was found.
        budget: Its budget.
        implementation: The operator.
        model: Folder or hub id, for the message.

    Raises:
        ConfigError: There is no table, or it doesn't know the keys.
    """
    if found is None or budget is None:
        raise ConfigError(
            f"toptheta.k_screen is {format!r}, but there is no threshold table. Leave k_screen out, or name one."
        )
    table, path = found
    if table.key_statistics is None:
        raise ConfigError(
            f"toptheta.k_screen is {format!r}, but {lacks_key_statistics(model, path)}\nor leave k_screen out."
        )
    limit = implementation.capabilities.screens[format].largest_share
    return {
        layer: transform
        for layer, transform in table.key_statistics.transforms().items()
        if layer not in budget.dense_layers and budget.candidates.get(layer, 0.0) <= limit
    }


def describe_screens(config: Any, screens: dict[int, ScreenTransform], sparse: Any) -> str:
    """For the log: the screen, and which sparse layers do without."""
    left_out = sorted(set(sparse) - set(screens))
    without = ", ".join(map(str, left_out))
    return f"K screen {config.k_screen} with margin {config.k_screen_margin}" + (
        f", not in layers {without}, where too many keys would pass" if left_out else ""
    )
