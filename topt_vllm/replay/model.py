"""The model to replay: what can be known from its configuration, and its weights."""

import copy
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
import transformers
from transformers.quantizers.auto import get_hf_quantizer

from topt_vllm.replay.capture import can_be_captured
from topt_vllm.replay.options import ReplayError
from topt_vllm.table.identity import ModelIdentity, identify

_DEFAULT_MAX_SEQ_LENGTH = 8192


@dataclass(frozen=True)
class Subject:
    """What is known about the model before its weights are loaded.

    Attributes:
        identity: Goes into the table.
        window: Tokens that the layers with a sliding window attend to at most; 0 where they keep no KV cache.
        vocabulary: Number of tokens.
        context: Tokens of the longest sequence; None where the configuration doesn't say.
    """

    identity: ModelIdentity
    window: int
    vocabulary: int
    context: int | None = None

    @property
    def full_layers(self) -> list[int]:
        """Layers that get thresholds: those without a sliding window."""
        windowed = self.identity.sliding_window_layers
        return [layer for layer in range(self.identity.num_layers) if layer not in windowed]

    def window_of(self, layer: int) -> int:
        """Keys that a row of the layer sees at most; 0 for all."""
        return self.window if layer in self.identity.sliding_window_layers else 0

    def keys_seen(self, contexts: torch.Tensor) -> list[int]:
        """By layer, keys that rows with these contexts see together; int64 [r]."""
        full, windowed = int(contexts.sum()), int(contexts.clamp(max=self.window).sum())
        kinds = self.identity.sliding_window_layers
        return [windowed if layer in kinds else full for layer in range(self.identity.num_layers)]

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


def examine(model: str, decoded: bool = True) -> Subject:
    """Checks from its configuration alone whether a model can be replayed.

    Args:
        model: Folder or hub id.
        decoded: Whether rows will be decoded behind a dense prompt, for which its K and V have to be enough.

    Raises:
        ReplayError: The model can't be read or isn't supported.
    """
    config = _read(transformers.AutoConfig, model)
    try:
        identity = identify(config, Path(model.rstrip("/")).name, getattr(config, "_commit_hash", None))
    except ValueError as error:
        raise ReplayError(str(error)) from error
    _require_attention_interface(config, model)
    _require_dequantiser(config, model)
    text = config.get_text_config()
    others = set(getattr(text, "layer_types", None) or ()) - {"full_attention", "sliding_attention"}
    if decoded and others:
        raise ReplayError(
            f"{model}: nothing can be decoded behind a dense prompt in layers of the kind "
            f"{', '.join(sorted(others))}; this architecture can't be calibrated"
        )
    sizes = (getattr(text, name, None) for name in ("sliding_window", "attention_chunk_size"))
    subject = Subject(
        identity=identity,
        window=next((size for size in sizes if size), 0),
        vocabulary=text.vocab_size,
        context=getattr(text, "max_position_embeddings", None),
    )
    if not subject.full_layers:
        raise ReplayError(f"{model}: every layer has a sliding window; there is nothing to calibrate")
    return subject


def load_tokenizer(model: str) -> Any:
    """The model's tokenizer.

    Raises:
        ReplayError: There is none.
    """
    return _read(transformers.AutoTokenizer, model)


def load_causal_lm(model: str, device: str | None, dtype: str) -> Any:
    """The model with its weights.

    Args:
        model: Folder or hub id.
        device: ``cpu``, ``cuda``, ``cuda:N``, ``auto`` to spread over all GPUs; None for a GPU where there is one.
        dtype: Out of :data:`~topt_vllm.replay.options.DTYPES`.

    Raises:
        ReplayError: The weights or the device can't be used.
    """
    device = device or ("cuda" if torch.cuda.is_available() else "cpu")
    kind = dtype if dtype == "auto" else getattr(torch, dtype)
    # device_map needs accelerate; one device does without.
    spread = {"device_map": "auto"} if device == "auto" else {}
    reader = transformers.AutoModelForCausalLM
    loaded, found = _read(reader, model, dtype=kind, output_loading_info=True, **spread)
    if found["missing_keys"]:
        # transformers makes up what a checkpoint lacks, or what is compressed in a way that it doesn't know.
        raise ReplayError(f"--model {model}: the weights lack {', '.join(sorted(found['missing_keys'])[:3])}")
    return loaded.eval() if spread else loaded.to(device).eval()


def check_device(device: str | None) -> None:
    """Raises ReplayError where ``device`` doesn't exist here."""
    if device is None or device == "auto":
        return
    try:
        torch.empty(0, device=device)
    except (RuntimeError, AssertionError) as error:
        reason = str(error).splitlines()[0]
        raise ReplayError(f"--device {device} can't be used here: {reason}") from error


def _read(loader: Any, model: str, **arguments: Any) -> Any:
    try:
        return loader.from_pretrained(model, **arguments)
    except (OSError, ValueError, ImportError) as error:
        reason = str(error).strip().splitlines()[0]
        raise ReplayError(f"--model {model}: {reason}") from error


def _require_dequantiser(config: Any, model: str) -> None:
    """Compressed weights need a package of their own kind."""
    try:
        get_hf_quantizer(copy.deepcopy(config), None, None, True, {})
    except (ValueError, ImportError, RuntimeError) as error:
        reason = str(error).strip().splitlines()[0]
        raise ReplayError(f"{model}: its weights are compressed, and can't be read here: {reason}") from error


def _require_attention_interface(config: Any, model: str) -> None:
    try:
        with _quiet(), torch.device("meta"):
            skeleton = transformers.AutoModelForCausalLM.from_config(config)
            supported = can_be_captured(skeleton)
    except (ValueError, ImportError) as error:
        reason = str(error).strip().splitlines()[0]
        raise ReplayError(f"{model}: not a causal language model for transformers: {reason}") from error
    if not supported:
        raise ReplayError(
            f"{model}: transformers' {type(skeleton).__name__} does not call its AttentionInterface, "
            "through which the calibrator sees the scores; this architecture can't be calibrated"
        )
