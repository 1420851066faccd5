"""The model to replay: what can be known from its configuration, and its weights."""

import copy
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from importlib.util import find_spec
from typing import Any

import torch
import transformers
from transformers.quantizers.auto import get_hf_quantizer

from topt_vllm.replay.capture import can_be_captured
from topt_vllm.replay.checkpoint import TOKENIZERS, check_files, lacks_tokenizer
from topt_vllm.replay.options import ReplayError
from topt_vllm.table.identity import ModelIdentity, identify
from topt_vllm.table.layers import STATEFUL, layer_heads, layer_kinds, layer_value
from topt_vllm.table.words import name_of_model

_DEFAULT_MAX_SEQ_LENGTH = 8192

# By ``model_type``: layers that attend in a way of their own, which their configuration doesn't show.
_OWN_ATTENTION = {
    "diffllama": "its layers attend twice for each token and subtract the one from the other",
    "jetmoe": "it routes each token to experts with query heads of their own, so that no head sees all tokens",
    "inkling_text": "it adds a bias by position to the scores, which a threshold on q·k doesn't know",
}


@dataclass(frozen=True)
class Subject:
    """What is known about the model before its weights are loaded.

    Attributes:
        identity: Goes into the table.
        window: Tokens that the layers with a sliding window attend to at most; 0 where they keep no KV cache.
        vocabulary: Number of tokens.
        context: Tokens of the longest sequence; None where the configuration doesn't say.
        kv_heads: KV heads by layer; () where all layers have the identity's.
        stateful: Whether some layers hand on more from row to row than K and V, as state-space layers do.
        shares_kv: Whether some layers attend to the K and V of earlier ones.
        rotations_change: Tokens of a pass behind which all of its rotary embeddings are others (longrope); None
            where they never are.
    """

    identity: ModelIdentity
    window: int
    vocabulary: int
    context: int | None = None
    kv_heads: tuple[int, ...] = ()
    stateful: bool = False
    shares_kv: bool = False
    rotations_change: int | None = None

    @property
    def full_layers(self) -> list[int]:
        """Layers that get thresholds: those with full attention."""
        return self.identity.full_layers

    @property
    def attention_layers(self) -> list[int]:
        """Those with full attention or a window."""
        free = self.identity.attention_free_layers
        return [layer for layer in range(self.identity.num_layers) if layer not in free]

    def window_of(self, layer: int) -> int:
        """Keys that a row of the layer sees at most; 0 for all."""
        return self.window if layer in self.identity.sliding_window_layers else 0

    def kv_heads_of(self, layer: int) -> int:
        """KV heads of a layer that has attention."""
        return self.kv_heads[layer] if self.kv_heads else self.identity.num_kv_heads

    def keys_seen(self, contexts: torch.Tensor) -> list[int]:
        """By layer, keys that rows with these contexts see together; int64 [r]."""
        full, windowed = int(contexts.sum()), int(contexts.clamp(max=self.window).sum())
        known = dict.fromkeys(self.identity.sliding_window_layers, windowed)
        known |= dict.fromkeys(self.identity.attention_free_layers, 0)
        return [known.get(layer, full) for layer in range(self.identity.num_layers)]

    def v_rows(self, contexts: torch.Tensor) -> list[int]:
        """By layer, (KV head, key) pairs that these rows see; int64 [r]."""
        return [keys * self.kv_heads_of(layer) for layer, keys in enumerate(self.keys_seen(contexts))]

    def v_share(self, layers: Iterable[int], contexts: torch.Tensor) -> float:
        """Share of all that :meth:`v_rows` counts which lies in some of the layers."""
        rows = self.v_rows(contexts)
        return sum(rows[layer] for layer in layers) / sum(rows)

    def check_rotations(self, shortest: int, longest: int) -> None:
        """Refuses to compare passes over so few tokens with those over so many.

        Raises:
            ReplayError: Their K differ.
        """
        if self.rotations_change is not None and shortest <= self.rotations_change < longest:
            raise ReplayError(
                f"this model turns K in other ways in passes of more than {self.rotations_change} tokens "
                f"(longrope), and {shortest} and {longest} lie on either side; name lengths on one side"
            )

    def max_seq_length(self, asked: int | None) -> int:
        """Tokens of a sequence: what is asked for, or the model's context, 8192 at most.

        Raises:
            ReplayError: More is asked for than the model's context.
        """
        if asked is None:
            return min(self.context or _DEFAULT_MAX_SEQ_LENGTH, _DEFAULT_MAX_SEQ_LENGTH)
        if self.context is not None and asked > self.context:
            raise ReplayError(
                f"--max-seq-length is {asked}, but the model's context is {self.context} tokens"
            )
        return asked


@contextmanager
def _quiet() -> Iterator[None]:
    """Keeps transformers' warnings off the terminal where our own message says it better."""
    before = transformers.logging.get_verbosity()
    transformers.logging.set_verbosity_error()
    try:
        yield
    finally:
        transformers.logging.set_verbosity(before)


def examine(model: str, trust_remote_code: bool = False) -> Subject:
    """Checks from its configuration alone whether a model can be replayed.

    Args:
        model: Folder or hub id.
        trust_remote_code: Whether to run code that comes with the model.

    Raises:
        ReplayError: The model can't be read or isn't supported.
    """
    config = read_config(model, trust_remote_code)
    try:
        identity = identify(config, name_of_model(model), getattr(config, "_commit_hash", None))
    except ValueError as error:
        raise ReplayError(str(error)) from error
    text = config.get_text_config()
    if (own := _OWN_ATTENTION.get(text.model_type)) is not None:
        raise ReplayError(f"{model}: {own}; this architecture can't be calibrated")
    kinds = layer_kinds(text)
    if "chunked_attention" in kinds:
        raise ReplayError(
            f"{model}: layers of the kind chunked_attention attend within chunks of the context, which Top-Theta "
            "doesn't support; this architecture can't be calibrated"
        )
    if not identity.full_layers:
        raise ReplayError(f"{model}: every layer has a sliding window; there is nothing to calibrate")
    skeleton = _skeleton(config, model, trust_remote_code)
    _check_architecture(skeleton, identity, model)
    _require_dequantiser(config, model)
    return Subject(
        identity=identity,
        window=_window(text, identity.sliding_window_layers),
        vocabulary=text.vocab_size,
        context=getattr(text, "max_position_embeddings", None),
        kv_heads=_kv_heads(skeleton, text, identity),
        stateful=bool(STATEFUL & set(kinds)),
        shares_kv=bool(getattr(text, "num_kv_shared_layers", 0)),
        rotations_change=_rotations_change(text),
    )


def _rotations_change(config: Any) -> int | None:
    """Of transformers' longrope, which takes the factors of long contexts for all tokens of a longer pass."""
    rope = getattr(config, "rope_parameters", None) or {}
    if rope.get("rope_type") != "longrope":
        return None
    return rope.get("original_max_position_embeddings") or getattr(
        config, "original_max_position_embeddings", None
    )


def _window(config: Any, layers: list[int]) -> int:
    """Of the layers with a window, which is the same for all; 0 where there are none."""
    names = ("sliding_window", "attention_chunk_size")
    sizes = (layer_value(config, layer, name) for layer in layers[:1] for name in names)
    return next((size for size in sizes if size), 0)


def _kv_heads(skeleton: Any, config: Any, identity: ModelIdentity) -> tuple[int, ...]:
    """By layer; () where all that attend have the same."""
    windowed = identity.sliding_window_layers
    found = [identity.num_kv_heads] * identity.num_layers
    for layer in windowed:
        found[layer] = layer_heads(config, layer).kv
    # MiMo V2 has twice as many in its windowed layers, and its configuration doesn't say so.
    for part in _attention(skeleton):
        if part.layer_idx in windowed and (groups := getattr(part, "num_key_value_groups", None)):
            found[part.layer_idx] = layer_heads(config, part.layer_idx).query // groups
    return tuple(found) if set(found) != {identity.num_kv_heads} else ()


def read_config(model: str, trust_remote_code: bool = False) -> Any:
    """The model's configuration.

    Raises:
        ReplayError: There is none.
    """
    check_files(model)
    return _read(transformers.AutoConfig, model, trust_remote_code)


def load_tokenizer(model: str, trust_remote_code: bool = False) -> Any:
    """The model's tokenizer.

    Raises:
        ReplayError: There is none.
    """
    try:
        found = _read(transformers.AutoTokenizer, model, trust_remote_code=trust_remote_code)
        works = bool(found("a b")["input_ids"])
    except ReplayError:
        if not lacks_tokenizer(model):
            raise
        works = False
    if not works:
        # transformers makes an empty one where there are no files.
        raise ReplayError(
            f"--model {model}: no tokenizer: the folder has none of {', '.join(TOKENIZERS)}. Copy them from where "
            "the weights came from"
        )
    return found


def load_causal_lm(model: str, device: str | None, dtype: str, trust_remote_code: bool = False) -> Any:
    """The model with its weights.

    Args:
        model: Folder or hub id.
        device: ``cpu``, ``cuda``, ``cuda:N``, ``auto`` to spread over all GPUs; None for a GPU where there is one.
        dtype: Out of :data:`~topt_vllm.replay.options.DTYPES`.
        trust_remote_code: Whether to run code that comes with the model.

    Raises:
        ReplayError: The weights or the device can't be used.
    """
    device = device or ("cuda" if torch.cuda.is_available() else "cpu")
    kind = dtype if dtype == "auto" else getattr(torch, dtype)
    # device_map needs accelerate; one device does without.
    spread: dict[str, Any] = {"device_map": "auto"} if device == "auto" else {}
    reader = auto_class(_read(transformers.AutoConfig, model, trust_remote_code))
    # It would make weights up in place of those whose shapes differ; without that its error doesn't name them.
    more = {"output_loading_info": True, "ignore_mismatched_sizes": True, **spread}
    with _quiet():
        loaded, found = _read(reader, model, trust_remote_code, dtype=kind, **more)
    if found["missing_keys"]:
        # transformers makes up what a checkpoint lacks, or what is compressed in a way that it doesn't know.
        raise ReplayError(f"--model {model}: the weights lack {', '.join(sorted(found['missing_keys'])[:3])}")
    if found["mismatched_keys"]:
        name, given, wanted = min(found["mismatched_keys"])
        raise ReplayError(
            f"--model {model}: {name} has the shape {list(given)}, and config.json says {list(wanted)}; the "
            "configuration belongs to another checkpoint"
        )
    return loaded.eval() if spread else loaded.to(device).eval()


def check_device(device: str | None) -> None:
    """Raises ReplayError where ``device`` doesn't exist here."""
    if device == "auto" and find_spec("accelerate") is None:
        raise ReplayError(
            "--device auto needs the package accelerate; pip install accelerate, or name one device"
        )
    if device is None or device == "auto":
        return
    try:
        torch.empty(0, device=device)
    except (RuntimeError, AssertionError) as error:
        reason = str(error).splitlines()[0]
        if reason.startswith(("Expected one of", "Invalid device string")):
            reason = "no such device; name cpu, cuda, cuda:N, or auto for all GPUs"
        raise ReplayError(f"--device {device} can't be used here: {reason}") from error


def _read(loader: Any, model: str, trust_remote_code: bool = False, **arguments: Any) -> Any:
    try:
        return loader.from_pretrained(model, trust_remote_code=trust_remote_code, **arguments)
    # Broken files raise anything, out of several libraries. Code of the model's own is its author's to mend.
    except Exception as error:
        if trust_remote_code and not isinstance(error, OSError | ValueError | ImportError):
            raise
        reason = (str(error).strip() or type(error).__name__).splitlines()[0]
        if "trust_remote_code" in str(error):
            reason = "it comes with code of its own; add --trust-remote-code to run that"
        raise ReplayError(f"--model {model}: {reason}") from error


def _require_dequantiser(config: Any, model: str) -> None:
    """Compressed weights need a package of their own kind."""
    try:
        get_hf_quantizer(copy.deepcopy(config), None, None, True, {})
    except (ValueError, ImportError, RuntimeError) as error:
        reason = str(error).strip().splitlines()[0]
        raise ReplayError(f"{model}: its weights are compressed, and can't be read here: {reason}") from error


def auto_class(config: Any) -> Any:
    """What transformers loads the model with: a class that takes images or sound too where text has none alone."""
    by_text = type(config) in transformers.MODEL_FOR_CAUSAL_LM_MAPPING
    if type(config) in transformers.MODEL_FOR_MULTIMODAL_LM_MAPPING and not by_text:
        return transformers.AutoModelForMultimodalLM
    return transformers.AutoModelForCausalLM


def _skeleton(config: Any, model: str, trust_remote_code: bool) -> Any:
    """The model without weights.

    Raises:
        ReplayError: It isn't a causal language model.
    """
    try:
        with _quiet(), torch.device("meta"):
            return auto_class(config).from_config(config, trust_remote_code=trust_remote_code)
    # Code of any architecture runs here, and what it can't make of a configuration raises anything.
    except Exception as error:
        reason = (str(error).strip() or type(error).__name__).splitlines()[0]
        if config.get_text_config() is not config and isinstance(error, ValueError):
            reason = (
                f"{type(config).__name__} has a text model inside, and transformers doesn't load it by itself. "
                "Save the text model as a checkpoint of its own and calibrate that"
            )
        raise ReplayError(f"{model}: not a causal language model for transformers: {reason}") from error


def _check_architecture(skeleton: Any, identity: ModelIdentity, model: str) -> None:
    """Raises ReplayError where the model isn't a decoder whose layers can be looked into one by one."""
    name = type(skeleton).__name__
    if not can_be_captured(skeleton):
        raise ReplayError(
            f"{model}: transformers' {name} does not call its AttentionInterface, "
            "through which the calibrator sees the scores; this architecture can't be calibrated"
        )
    causal = {part.layer_idx: part.is_causal for part in _attention(skeleton) if hasattr(part, "is_causal")}
    if not all(causal.values()):
        raise ReplayError(
            f"{model}: {name} is an encoder: its tokens attend to those behind them too. Top-Theta thresholds need "
            "a decoder-only model"
        )
    without = sorted(set(identity.full_layers) - set(causal))
    if causal and without:
        raise ReplayError(
            f"{model}: transformers' {name} has no attention module of its own in layer {without[0]}, as where "
            "layers share one or attend to images; this architecture can't be calibrated"
        )


def _attention(model: Any) -> Iterator[Any]:
    """Modules of the decoder that know which layer they belong to, attention among them."""
    return (part for part in model.get_decoder().modules() if getattr(part, "layer_idx", None) is not None)
