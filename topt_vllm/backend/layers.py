"""Gives each attention layer its share of the thresholds."""

from typing import Any

from vllm.model_executor.models.utils import extract_layer_index

from topt_vllm.adaptation import ThetaController
from topt_vllm.attention.common import Thetas, new_statistics
from topt_vllm.backend import compat
from topt_vllm.backend.impl import TopThetaLayer
from topt_vllm.backend.metrics import LayerAccumulators, recorder
from topt_vllm.backend.page import tail_of
from topt_vllm.backend.quantised import quantisation_of
from topt_vllm.backend.startup import Resolved
from topt_vllm.sift import SiftLayer


def bind_layer(
    layer: Any, layer_name: str, resolved: Resolved, block_size: int, tensor_parallel_size: int
) -> None:
    """Sets ``layer.impl.bound``: thresholds of this rank's heads, kernel, policy, accumulators.

    Args:
        layer: vLLM's Attention layer.
        layer_name: Its prefix, such as ``model.layers.3.self_attn.attn``.
        resolved: From :func:`topt_vllm.backend.startup.resolve`.
        block_size: Slots of a cache block.
        tensor_parallel_size: Ranks that the query heads are spread over.

    Raises:
        ValueError: The layer's heads are not those of the model that was identified.
    """
    impl = layer.impl
    thetas, reason = thresholds_of(impl, layer_name, resolved, tensor_parallel_size)
    replicas = kv_replicas(impl, layer_name, resolved, tensor_parallel_size)
    controller = None
    if thetas is not None and resolved.promised_keys:
        keys = resolved.promised_keys[extract_layer_index(layer_name)]
        first = _rank(tensor_parallel_size) * impl.num_heads
        controller = ThetaController(thetas, keys[first : first + impl.num_heads], resolved.dense_up_to)
        thetas = controller.thetas
    impl.bound = TopThetaLayer(
        implementation=resolved.implementation,
        policy=resolved.config.operator_policy,
        thetas=thetas,
        dense_reason=reason,
        block_size=block_size,
        quantisation=quantisation_of(layer),
        tail=tail_of(impl.num_kv_heads, impl.head_size, block_size),
        statistics=new_statistics(),
        controller=controller,
        sift=_sift_layer(impl, resolved) if thetas is None and reason is None else None,
        kv_replicas=replicas,
    )
    recorder().add_layer(
        LayerAccumulators(impl.bound.statistics, impl.num_heads, replicas, layer_label(layer_name))
    )


def _sift_layer(impl: Any, resolved: Resolved) -> SiftLayer:
    settings = resolved.config.sift
    assert settings is not None
    return SiftLayer(impl.num_heads, settings)


def describe_rank(resolved: Resolved, tensor_parallel_size: int) -> None:
    """Tells the metrics which table is served, and what part of the heads this rank has."""
    rank = _rank(tensor_parallel_size)
    recorder().describe(resolved.table_labels, rank, tensor_parallel_size, resolved.config.per_layer_metrics)


def layer_label(layer_name: str) -> str:
    """A layer in the metrics: its number, after ``draft_model.`` in a draft model, whose numbers start again."""
    number = str(extract_layer_index(layer_name))
    return f"draft_model.{number}" if compat.is_draft_layer(layer_name) else number


def kv_replicas(impl: Any, layer_name: str, resolved: Resolved, tensor_parallel_size: int) -> float:
    """Ranks that hold each KV head of a layer; arguments as :func:`bind_layer`.

    vLLM repeats KV heads where there are more ranks than heads. A draft model's heads aren't known here; its rows
    are counted as if each rank had heads of its own.
    """
    if compat.is_draft_layer(layer_name):
        return 1.0
    return max(1.0, impl.num_kv_heads * tensor_parallel_size / resolved.identity.num_kv_heads)


def thresholds_of(
    impl: Any, layer_name: str, resolved: Resolved, tensor_parallel_size: int
) -> tuple[Thetas | None, str | None]:
    """A layer's thresholds, or None and why it has none; arguments as :func:`bind_layer`.

    Under ``policy: sift`` neither: its thresholds belong to requests.

    Raises:
        ValueError: The layer's heads are not those of the model that was identified.
    """
    index = extract_layer_index(layer_name)
    if compat.is_draft_layer(layer_name) or index >= resolved.identity.num_layers:
        return None, "draft_model"
    if resolved.config.sift is not None:
        return None, None
    if not resolved.thetas:
        return None, "no_thresholds"
    if index not in resolved.thetas:
        return None, "dense_layer"
    whole = resolved.thetas[index]
    return _rank_slice(whole, impl.num_heads, layer_name, resolved, tensor_parallel_size), None


def _rank_slice(
    thetas: Thetas, num_heads: int, layer_name: str, resolved: Resolved, tensor_parallel_size: int
) -> Thetas:
    total = resolved.identity.num_query_heads
    if num_heads * tensor_parallel_size != total:
        raise ValueError(
            f"{layer_name} has {num_heads} query heads on each of {tensor_parallel_size} ranks, but the model's "
            f"configuration says {total} in all; TOPTHETA needs a tensor-parallel size that divides the heads"
        )
    if tensor_parallel_size == 1:
        return thetas
    return thetas.heads(_rank(tensor_parallel_size) * num_heads, num_heads)


def _rank(tensor_parallel_size: int) -> int:
    """This process's tensor-parallel rank; vLLM knows none before it has set ranks up."""
    if tensor_parallel_size == 1:
        return 0
    from vllm.distributed import get_tensor_model_parallel_rank

    return get_tensor_model_parallel_rank()
