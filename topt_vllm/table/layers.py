"""What the layers of a model are, read off its transformers configuration."""

from typing import Any, NamedTuple

# By the names that transformers gives them in ``layer_types``. Hybrid layers have a state-space part beside their
# attention.
FULL = frozenset({"full_attention", "hybrid"})
WINDOWED = frozenset({"sliding_attention", "hybrid_sliding", "chunked_attention"})
ATTENTION_FREE = frozenset({"linear_attention", "conv", "moe", "mlp"})
# What a row of these needs of those before it isn't, or isn't only, K and V.
STATEFUL = frozenset({"linear_attention", "conv", "hybrid", "hybrid_sliding"})

# Names in older configurations and in vLLM's.
_RENAMED = {"attention": "full_attention", "mamba": "linear_attention", "recurrent": "linear_attention"}


class Heads(NamedTuple):
    """Attention heads of a layer; ``dim`` is that of its queries and keys."""

    query: int
    kv: int
    dim: int

    def __str__(self) -> str:
        return f"{self.query} query heads, {self.kv} KV heads and head_dim {self.dim}"


def layer_kinds(config: Any, context: int | None = None) -> list[str]:
    """The kind of every layer, out of the sets above.

    A window as long as the context is none, so that such layers have full attention.

    Args:
        config: A transformers configuration.
        context: Longest context (tokens); the model's own by default.

    Raises:
        ValueError: A layer is of another kind.
    """
    kinds = [_RENAMED.get(kind, kind) for kind in _named_kinds(config)]
    unknown = sorted(set(kinds) - FULL - WINDOWED - ATTENTION_FREE)
    if unknown:
        raise ValueError(
            f"layers of the kind {', '.join(unknown)} choose what they attend to by themselves; thresholds are for "
            "full attention"
        )
    context = context or getattr(config, "max_position_embeddings", None)
    for layer, kind in enumerate(kinds):
        if kind == "sliding_attention":
            window = layer_value(config, layer, "sliding_window")
            if window is not None and context is not None and window >= context:
                kinds[layer] = "full_attention"
    return kinds


def _named_kinds(config: Any) -> list[str]:
    if (kinds := getattr(config, "layer_types", None)) is not None:
        return list(kinds)
    kinds = list(getattr(config, "layers_block_type", None) or ["attention"] * config.num_hidden_layers)
    windows = getattr(config, "use_sliding_window", True)
    for layer, kind in enumerate(kinds):
        if kind == "attention" and windows and layer_value(config, layer, "sliding_window") is not None:
            kinds[layer] = "sliding_attention"
    return kinds


def layer_heads(config: Any, layer: int) -> Heads:
    """Of one layer; that it has attention is not checked."""
    query = layer_value(config, layer, "num_attention_heads")
    dim = layer_value(config, layer, "head_dim")
    return Heads(
        query, layer_value(config, layer, "num_key_value_heads") or query, dim or config.hidden_size // query
    )


def layer_value(config: Any, layer: int, name: str) -> Any:
    """A value that layers of some models have of their own, as Gemma 4's head_dim; None where there is none."""
    own = name in (getattr(config, "per_layer_attributes", None) or ())
    return getattr(config.per_layer_config[layer] if own else config, name, None)
