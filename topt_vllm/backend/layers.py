"""What an attention layer is in the model: its rank's heads, its thresholds, its name in the metrics."""

from typing import Any

from vllm.model_executor.models.utils import extract_layer_index

from topt_vllm.attention.common import Thetas
from topt_vllm.attention.screen import ScreenTransform
from topt_vllm.backend import compat
from topt_vllm.backend.metrics import recorder
from topt_vllm.backend.startup import Resolved


def describe_rank(resolved: Resolved, tensor_parallel_size: int) -> None:
    """Tells the metrics which table is served, and what part of the heads this rank has."""
    rank = _rank(tensor_parallel_size)
    per_layer = resolved.config.per_layer_metrics
    recorder().describe(
        resolved.table_labels, rank, tensor_parallel_size, per_layer, screened=bool(resolved.screens)
    )


def layer_label(layer_name: str) -> str:
    """A layer in the metrics: its number, after ``draft_model.`` in a draft model, whose numbers start again."""
    number = str(extract_layer_index(layer_name))
    return f"draft_model.{number}" if compat.is_draft_layer(layer_name) else number


def kv_replicas(layer: Any, layer_name: str, resolved: Resolved, tensor_parallel_size: int) -> float:
    """Ranks that hold each KV head of a layer; arguments as :func:`thresholds_of`.

    vLLM repeats KV heads where there are more ranks than heads. A draft model's heads aren't known here; its rows
    are counted as if each rank had heads of its own.
    """
    known = resolved.kv_heads.get(extract_layer_index(layer_name))
    if known is None or compat.is_draft_layer(layer_name):
        return 1.0
    return max(1.0, layer.num_kv_heads * tensor_parallel_size / known)


def thresholds_of(
    layer: Any, layer_name: str, resolved: Resolved, tensor_parallel_size: int
) -> tuple[Thetas | None, str | None]:
    """A layer's thresholds, or None and why it has none.

    Under ``policy: sift`` neither: its thresholds belong to requests.

    Args:
        layer: vLLM's Attention layer.
        layer_name: Its prefix, such as ``model.layers.3.self_attn.attn``.
        resolved: From :func:`topt_vllm.backend.startup.resolve`.
        tensor_parallel_size: Ranks that the query heads are spread over.

    Raises:
        ValueError: The layer's heads are not those of the model that was identified.
    """
    if layer.sliding_window is not None:  # a window is short already
        return None, "sliding_window"
    index = extract_layer_index(layer_name)
    if compat.is_draft_layer(layer_name) or index >= resolved.identity.num_layers:
        return None, "draft_model"
    if resolved.config.sift is not None:
        return None, None
    if not resolved.thetas:
        return None, "no_thresholds"
    if index not in resolved.thetas:
        windowed = index in resolved.identity.sliding_window_layers
        return None, "sliding_window" if windowed else "dense_layer"
    heads = _heads(layer, layer_name, resolved, tensor_parallel_size)
    thetas = resolved.thetas[index]
    return (thetas if tensor_parallel_size == 1 else thetas.heads(heads.start, len(heads))), None


def promised_keys(
    layer: Any, layer_name: str, resolved: Resolved, tensor_parallel_size: int
) -> list[int] | None:
    """Keys that each of this rank's query heads should keep, None unless thresholds adapt.

    Arguments and errors as :func:`thresholds_of`.
    """
    keys = resolved.promised_keys.get(extract_layer_index(layer_name))
    if keys is None:
        return None
    heads = _heads(layer, layer_name, resolved, tensor_parallel_size)
    return keys[heads.start : heads.stop]


def screen_of(
    layer: Any, layer_name: str, resolved: Resolved, tensor_parallel_size: int
) -> ScreenTransform | None:
    """What a K screen knows of this rank's KV heads of a sparse layer; None where the layer has no screen.

    Arguments as :func:`thresholds_of`. A layer that shares another's cache has its screen, too.
    """
    transform = resolved.screens.get(extract_layer_index(layer.kv_sharing_target_layer_name or layer_name))
    if transform is None or tensor_parallel_size == 1:
        return transform
    # Several ranks have the same head where there are more of them than KV heads.
    first = _rank(tensor_parallel_size) * resolved.identity.num_kv_heads // tensor_parallel_size
    return transform.heads(first, layer.num_kv_heads)


def _heads(layer: Any, layer_name: str, resolved: Resolved, tensor_parallel_size: int) -> range:
    """This rank's query heads among the model's."""
    total = resolved.identity.num_query_heads
    if layer.num_heads * tensor_parallel_size != total:
        raise ValueError(
            f"{layer_name} has {layer.num_heads} query heads on each of {tensor_parallel_size} ranks, but the "
            f"model's configuration says {total} in all; TOPTHETA needs a tensor-parallel size that divides the "
            "heads"
        )
    first = _rank(tensor_parallel_size) * layer.num_heads
    return range(first, first + layer.num_heads)


def _rank(tensor_parallel_size: int) -> int:
    """This process's tensor-parallel rank; vLLM knows none before it has set ranks up."""
    if tensor_parallel_size == 1:
        return 0
    from vllm.distributed import get_tensor_model_parallel_rank

    return get_tensor_model_parallel_rank()
