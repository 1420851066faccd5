"""What a threshold table must agree on with the model that it is used for."""

import hashlib
import json
from typing import Annotated, Any

from pydantic import BaseModel, ConfigDict, Field

from topt_vllm.table.layers import (
    ATTENTION_FREE,
    FULL,
    WINDOWED,
    Heads,
    layer_heads,
    layer_kinds,
    layer_value,
)

# Everything in a Hugging Face configuration that changes the scores of a layer. Absent keys count as None,
# so that a default written out and a default left out differ only where transformers itself differs.
_FINGERPRINT_KEYS = (
    "model_type",
    "hidden_size",
    "num_hidden_layers",
    "num_attention_heads",
    "num_key_value_heads",
    "vocab_size",
    "sliding_window",
    "layer_types",
    "attn_logit_softcapping",
    "query_pre_attn_scalar",
)
_NOT_COMPARED = ("id", "revision", "architecture")


class ModelIdentity(BaseModel):
    """Identity and attention geometry of a model.

    Attributes:
        id: Name for people: a hub id or the folder's name; not compared.
        revision: Hub revision where known; not compared.
        architecture: Such as ``LlamaForCausalLM``; not compared.
        num_layers: Decoder layers.
        num_query_heads: Query heads of a layer with full attention, over all tensor-parallel ranks.
        num_kv_heads: KV heads of such a layer, over all tensor-parallel ranks.
        head_dim: Dimension of its queries and keys.
        sliding_window_layers: Layers with a window shorter than the model's context. They carry no thresholds.
        attention_free_layers: Layers without attention: linear attention, state spaces, convolutions, or an MLP
            alone. Neither do they. Models without such layers leave it out.
        fingerprint: ``sha256:`` and the digest of the attention-relevant configuration.
    """

    model_config = ConfigDict(extra="forbid", frozen=True, strict=True)

    id: str
    revision: str | None
    architecture: str
    num_layers: int = Field(gt=0)
    num_query_heads: int = Field(gt=0)
    num_kv_heads: int = Field(gt=0)
    head_dim: int = Field(gt=0)
    sliding_window_layers: Annotated[list[int], Field(fail_fast=True)]
    attention_free_layers: Annotated[list[int], Field(fail_fast=True)] = []
    fingerprint: str = Field(pattern=r"^sha256:[0-9a-f]{64}$")

    @property
    def full_layers(self) -> list[int]:
        """Layers that get thresholds, ascending."""
        without = {*self.sliding_window_layers, *self.attention_free_layers}
        return [layer for layer in range(self.num_layers) if layer not in without]

    def layers_text(self) -> str:
        """How many layers there are, and how many of them have no thresholds, for people."""
        kinds = {"sliding window": self.sliding_window_layers, "no attention": self.attention_free_layers}
        counts = {kind: len(layers) for kind, layers in kinds.items() if layers}
        if not counts:
            return f"{self.num_layers} layers"
        reason = ", ".join(f"{count} {kind}" if len(counts) > 1 else kind for kind, count in counts.items())
        return f"{self.num_layers} layers, {sum(counts.values())} of them without thresholds ({reason})"

    def difference(self, other: "ModelIdentity") -> str | None:
        """The first compared attribute in which two models differ, as text with both values; None if none."""
        for name in type(self).model_fields:
            if name not in _NOT_COMPARED and getattr(self, name) != getattr(other, name):
                return f"{name}: {getattr(self, name)} against {getattr(other, name)}"
        return None


def identify(config: Any, model_id: str, revision: str | None = None) -> ModelIdentity:
    """Reads the identity off a transformers configuration.

    Args:
        config: A ``PretrainedConfig``; of a composite model, its text part is taken.
        model_id: Name for people.
        revision: Hub revision, where known.

    Raises:
        ValueError: Not a decoder-only model with the same attention heads in all layers with full attention.
    """
    top = config
    config = config.get_text_config() if hasattr(config, "get_text_config") else config
    _require_decoder(top, config, model_id)
    try:
        kinds = layer_kinds(config)
        heads = _common_heads(config, kinds)
    except ValueError as error:
        raise ValueError(f"{model_id} ({type(config).__name__}): {error}") from error
    architectures = getattr(top, "architectures", None) or [type(top).__name__]
    free = [layer for layer, kind in enumerate(kinds) if kind in ATTENTION_FREE]
    return ModelIdentity(
        id=model_id,
        revision=revision,
        architecture=architectures[0],
        num_layers=len(kinds),
        num_query_heads=heads.query,
        num_kv_heads=heads.kv,
        head_dim=heads.dim,
        sliding_window_layers=[layer for layer, kind in enumerate(kinds) if kind in WINDOWED],
        # Left out, not empty, in the tables of models that have none.
        **({"attention_free_layers": free} if free else {}),
        fingerprint=_fingerprint(config),
    )


def _require_decoder(top: Any, config: Any, model_id: str) -> None:
    """Raises ValueError where nothing is decoded from K and V of the model's own heads."""
    if getattr(top, "is_encoder_decoder", False):
        raise ValueError(
            f"{model_id} is an encoder-decoder model; Top-Theta thresholds need a decoder-only one"
        )
    if getattr(config, "kv_lora_rank", None):
        raise ValueError(
            f"{model_id} has multi-head latent attention: all heads read one compressed row for each token, so "
            "that there are no V rows of a head's own to skip. Top-Theta doesn't support it"
        )
    if not isinstance(getattr(config, "num_hidden_layers", None), int):
        raise ValueError(
            f"{model_id} ({type(config).__name__}) has no single num_hidden_layers; only models with one stack of "
            "decoder layers are supported"
        )
    if layer_value(config, 0, "num_attention_heads") is None:
        raise ValueError(
            f"{model_id} ({type(config).__name__}) has no attention heads; Top-Theta skips V rows of attention, "
            "and state-space models have none"
        )


def _common_heads(config: Any, kinds: list[str]) -> Heads:
    """Of the layers with full attention, or of all with a window where there are none.

    Raises:
        ValueError: There is no attention, or they differ.
    """
    wanted = FULL if FULL & set(kinds) else WINDOWED
    heads = {layer: layer_heads(config, layer) for layer, kind in enumerate(kinds) if kind in wanted}
    if not heads:
        raise ValueError("no layer has attention; Top-Theta skips V rows of attention")
    first = next(iter(heads))
    for layer, found in heads.items():
        if found != heads[first]:
            raise ValueError(
                f"layer {first} has {heads[first]}, layer {layer} has {found}; thresholds need the same heads in "
                "all layers with full attention"
            )
    return heads[first]


def _fingerprint(config: Any) -> str:
    own = set(getattr(config, "per_layer_attributes", None) or ())
    facts: dict[str, Any] = {key: getattr(config, key, None) for key in _FINGERPRINT_KEYS if key not in own}
    if facts.get("sliding_window") == 0:  # how Qwen2-MoE's says that there is none; vLLM makes None of it
        facts["sliding_window"] = None
    facts["rope"] = _plain(getattr(config, "rope_parameters", None) or {})
    if own:
        facts["heads"] = [layer_heads(config, layer) for layer in range(config.num_hidden_layers)]
    digest = hashlib.sha256(json.dumps(facts, sort_keys=True).encode()).hexdigest()
    return f"sha256:{digest}"


def _plain(value: Any) -> Any:
    if isinstance(value, dict):
        return {str(key): _plain(item) for key, item in value.items() if item is not None}
    return float(value) if isinstance(value, int | float) and not isinstance(value, bool) else value
