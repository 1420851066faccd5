"""Which K screen there is, and which layers have it."""

from collections.abc import Collection
from pathlib import Path
from typing import TYPE_CHECKING

import torch

from topt_vllm.attention.api import Implementation
from topt_vllm.attention.screen import ScreenFormat, ScreenTransform
from topt_vllm.backend.resolved import Resolved
from topt_vllm.config import ConfigError, TopThetaConfig
from topt_vllm.table.command import lacks_key_statistics
from topt_vllm.table.schema import Budget, ThresholdTable

if TYPE_CHECKING:
    from vllm.config import VllmConfig

# Of the cache; above, layers with windows and others, which aren't counted, might not fit beside it.
_LARGEST_REQUEST = 0.8
_SLOTS = 64  # of a block, for sizes by the token


def unasked_format(
    known: Resolved, table: ThresholdTable, vllm_config: "VllmConfig"
) -> tuple[ScreenFormat | None, str]:
    """The format under ``k_screen: auto``, which nobody has asked for: so it stops nothing that runs without.

    Returns:
        The format, and for the log why there is none where one would pay.
    """
    implementation, identity = known.implementation, known.identity
    format = implementation.screen_unasked(identity.num_query_heads // identity.num_kv_heads)
    if format is None:
        return None, ""
    shortest = implementation.capabilities.screens[format].min_seq_len
    longest = vllm_config.model_config.max_model_len
    room = vllm_config.cache_config.kv_cache_memory_bytes
    obstacles = {
        "the table has no key_statistics; `topt-vllm calibrate --k-screen-only` adds them": (
            table.key_statistics is None
        ),
        "it would be larger than K in fp8": vllm_config.cache_config.cache_dtype.startswith("fp8"),
        f"contexts of up to {shortest} tokens read K in full": longest <= shortest,
        "without V sums every KV connector is allowed, with a K screen some": (
            vllm_config.kv_transfer_config is not None and known.config.compensation == "none"
        ),
        f"beside it the cache would hardly hold --max-model-len {longest}": (
            room is not None and _request_bytes(known, format, vllm_config) > _LARGEST_REQUEST * room
        ),
    }
    found = [reason for reason, applies in obstacles.items() if applies]
    return (None, f"no K screen: {found[0]}") if found else (format, "")


def _request_bytes(known: Resolved, format: ScreenFormat, vllm_config: "VllmConfig") -> float:
    """What the longest request takes of a rank's cache in layers of full attention, V sums and screen included."""
    parallel, dim = vllm_config.parallel_config, known.identity.head_dim
    ranks = parallel.tensor_parallel_size
    heads = sum(max(1, known.kv_heads[layer] // ranks) for layer in known.see_all)
    content = 2 * dim * vllm_config.model_config.dtype.itemsize
    sums = torch.float32.itemsize * dim / _SLOTS
    screen = known.implementation.screen_bytes(format, dim, _SLOTS) / _SLOTS
    tokens = vllm_config.model_config.max_model_len / parallel.pipeline_parallel_size
    return tokens * heads * (content + sums + screen)


def choose_screens(
    format: ScreenFormat,
    found: tuple[ThresholdTable, Path] | None,
    budget: Budget | None,
    implementation: Implementation,
    vllm_config: "VllmConfig",
) -> dict[int, ScreenTransform]:
    """The sparse layers that a screen pays in, with what it knows of their K, over all KV heads.

    Layers in which it would let too many keys through are left out. Without a measurement none is.

    Args:
        format: Of the screen, one of those that the implementation has.
        found: The threshold table, and where it was found.
        budget: Its budget.
        implementation: The operator.
        vllm_config: Of the engine.

    Raises:
        ConfigError: There is no table, it doesn't know the keys, or the screen would be larger than they are.
    """
    if found is None or budget is None:
        raise ConfigError(
            f"toptheta.k_screen is {format!r}, but there is no threshold table. Leave k_screen out, or name one."
        )
    cache_dtype = vllm_config.cache_config.cache_dtype
    if format == "int4+4" and cache_dtype.startswith("fp8"):
        raise ConfigError(
            f"toptheta.k_screen is {format!r} and the cache {cache_dtype!r}: a copy of K in 4 + 4 bits is larger "
            "than K itself then. Set k_screen to off, or --kv-cache-dtype to auto."
        )
    table, path = found
    if table.key_statistics is None:
        what_to_do = lacks_key_statistics(vllm_config.model_config.model, path)
        raise ConfigError(f"toptheta.k_screen is {format!r}, but {what_to_do}\nor leave k_screen out.")
    limit = implementation.capabilities.screens[format].largest_share
    return {
        layer: transform
        for layer, transform in table.key_statistics.transforms().items()
        if layer not in budget.dense_layers and budget.candidates.get(layer, 0.0) <= limit
    }


def describe_screens(
    format: ScreenFormat,
    config: TopThetaConfig,
    screens: dict[int, ScreenTransform],
    sparse: Collection[int],
) -> str:
    """For the log: the screen, and which sparse layers do without."""
    left_out = sorted(set(sparse) - set(screens))
    without = ", ".join(map(str, left_out))
    return f"K screen {format} with margin {config.k_screen_margin}" + (
        f", not in layers {without}, where too many keys would pass" if left_out else ""
    )
