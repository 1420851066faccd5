"""What a threshold table must agree on with the model that it is used for."""

import hashlib
import json
from typing import Annotated, Any

from pydantic import BaseModel, ConfigDict, Field

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


class ModelIdentity(BaseModel):
    """Identity and attention geometry of a model.

    Attributes:
        id: Name for people: a hub id or the folder's name; not compared.
        revision: Hub revision where known; not compared.
        architecture: Such as ``LlamaForCausalLM``.
        num_layers: Decoder layers.
        num_query_heads: Query heads of a layer, over all tensor-parallel ranks.
        num_kv_heads: KV heads of a layer, over all tensor-parallel ranks.
        head_dim: Dimension of a head.
        sliding_window_layers: Layers with a sliding window. They carry no thresholds.
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
    fingerprint: str = Field(pattern=r"^sha256:[0-9a-f]{64}$")

    def difference(self, other: "ModelIdentity") -> str | None:
        """The first compared attribute in which two models differ, as text with both values; None if none."""
        for name in (
            "num_layers",
            "num_query_heads",
            "num_kv_heads",
            "head_dim",
            "sliding_window_layers",
            "fingerprint",
        ):
            if getattr(self, name) != getattr(other, name):
                return f"{name}: {getattr(self, name)} against {getattr(other, name)}"
        return None


def identify(config: Any, model_id: str, revision: str | None = None) -> ModelIdentity:
    """Reads the identity off a transformers configuration.

    Args:
        config: A ``PretrainedConfig``; of a composite model, its text part is taken.
        model_id: Name for people.
        revision: Hub revision, where known.

    Raises:
        ValueError: Not a decoder-only model with uniform attention heads.
    """
    top = config
    config = config.get_text_config() if hasattr(config, "get_text_config") else config
    if getattr(top, "is_encoder_decoder", False):
        raise ValueError(
            f"{model_id} is an encoder-decoder model; Top-Theta thresholds need a decoder-only one"
        )
    num_heads = getattr(config, "num_attention_heads", None)
    num_layers = getattr(config, "num_hidden_layers", None)
    if not isinstance(num_heads, int) or not isinstance(num_layers, int):
        raise ValueError(
            f"{model_id} ({type(config).__name__}) has no single num_attention_heads and num_hidden_layers; "
            "only models whose layers all have the same attention heads are supported"
        )
    layer_types = getattr(config, "layer_types", None)
    if layer_types is not None:
        windowed = [i for i, kind in enumerate(layer_types) if kind != "full_attention"]
    else:
        windowed = list(range(num_layers)) if _model_wide_window(config) else []
    architectures = getattr(top, "architectures", None) or [type(top).__name__]
    return ModelIdentity(
        id=model_id,
        revision=revision,
        architecture=architectures[0],
        num_layers=num_layers,
        num_query_heads=num_heads,
        num_kv_heads=getattr(config, "num_key_value_heads", None) or num_heads,
        head_dim=getattr(config, "head_dim", None) or config.hidden_size // num_heads,
        sliding_window_layers=windowed,
        fingerprint=_fingerprint(config),
    )


def _model_wide_window(config: Any) -> bool:
    window = getattr(config, "sliding_window", None)
    return window is not None and getattr(config, "use_sliding_window", True)


def _fingerprint(config: Any) -> str:
    facts: dict[str, Any] = {key: getattr(config, key, None) for key in _FINGERPRINT_KEYS}
    facts["rope"] = _plain(getattr(config, "rope_parameters", None) or {})
    digest = hashlib.sha256(json.dumps(facts, sort_keys=True).encode()).hexdigest()
    return f"sha256:{digest}"


def _plain(value: Any) -> Any:
    if isinstance(value, dict):
        return {str(key): _plain(item) for key, item in value.items() if item is not None}
    return float(value) if isinstance(value, int | float) and not isinstance(value, bool) else value
