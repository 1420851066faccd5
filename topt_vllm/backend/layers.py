"""Gives each attention layer its share of the thresholds."""

from typing import Any

from vllm.model_executor.models.utils import extract_layer_index

from topt_vllm.attention.common import Thetas, new_statistics
from topt_vllm.backend import compat
from topt_vllm.backend.impl import TopThetaLayer
from topt_vllm.backend.metrics import recorder
from topt_vllm.backend.page import tail_of
from topt_vllm.backend.startup import Resolved


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
    impl.bound = TopThetaLayer(
        implementation=resolved.implementation,
        policy=resolved.config.policy,
        thetas=thetas,
        dense_reason=reason,
        block_size=block_size,
        tail=tail_of(impl.num_kv_heads, impl.head_size, block_size),
        statistics=new_statistics(),
    )
    recorder().add_layer(impl.bound.statistics)


def thresholds_of(
    impl: Any, layer_name: str, resolved: Resolved, tensor_parallel_size: int
) -> tuple[Thetas | None, str | None]:
    """A layer's thresholds, or None and why it has none; arguments as :func:`bind_layer`.

    Raises:
        ValueError: The layer's heads are not those of the model that was identified.
    """
    index = extract_layer_index(layer_name)
    if compat.is_draft_layer(layer_name) or index >= resolved.identity.num_layers:
        return None, "draft_model"
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
    from vllm.distributed import get_tensor_model_parallel_rank

    return thetas.heads(get_tensor_model_parallel_rank() * num_heads, num_heads)
