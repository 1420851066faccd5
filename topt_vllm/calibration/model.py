"""The model to calibrate: what can be known from its configuration, and its weights."""

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
import transformers

from topt_vllm.calibration.capture import can_be_captured
from topt_vllm.calibration.options import CalibrationError, CalibrationOptions, calibrated_lengths
from topt_vllm.table.identity import ModelIdentity, identify

DEFAULT_MAX_SEQ_LENGTH = 8192


@dataclass(frozen=True)
class Subject:
    """What is known about the model before its weights are loaded.

    Attributes:
        identity: Goes into the table.
        full_layers: Layers that get thresholds: those without a sliding window.
        dense_layers: Layers to attend densely, of all budgets.
        lengths: Calibrated context lengths; the last is the sequences' length.
        window: Tokens that the other layers attend to at most; 0 where they keep no KV cache.
        vocabulary: Number of tokens.
    """

    identity: ModelIdentity
    full_layers: list[int]
    dense_layers: list[int]
    lengths: list[int]
    window: int
    vocabulary: int

    @property
    def max_seq_length(self) -> int:
        """Tokens of each sequence."""
        return self.lengths[-1]


@contextmanager
def _quiet() -> Iterator[None]:
    """Keeps transformers' warnings off the terminal where our own message says it better."""
    before = transformers.logging.get_verbosity()
    transformers.logging.set_verbosity_error()
    try:
        yield
    finally:
        transformers.logging.set_verbosity(before)


def examine(options: CalibrationOptions) -> Subject:
    """Checks model and options against each other from the model's configuration alone.

    Raises:
        CalibrationError: The model can't be read or isn't supported, or an option doesn't fit it.
    """
    config = _read(transformers.AutoConfig, options.model)
    revision = getattr(config, "_commit_hash", None)
    try:
        identity = identify(config, Path(options.model.rstrip("/")).name, revision)
    except ValueError as error:
        raise CalibrationError(str(error)) from error
    _require_attention_interface(config, options.model)
    full = [layer for layer in range(identity.num_layers) if layer not in identity.sliding_window_layers]
    if not full:
        raise CalibrationError(
            f"{options.model}: every layer has a sliding window; there is nothing to calibrate"
        )
    text_config = config.get_text_config()
    return Subject(
        identity=identity,
        full_layers=full,
        dense_layers=_dense_layers(options, full),
        lengths=calibrated_lengths(_max_seq_length(options, text_config), options.ks[-1]),
        window=_window(text_config),
        vocabulary=text_config.vocab_size,
    )


def load_tokenizer(model: str) -> Any:
    """The model's tokenizer.

    Raises:
        CalibrationError: There is none.
    """
    return _read(transformers.AutoTokenizer, model)


def load_model(options: CalibrationOptions) -> Any:
    """The model's decoder without its output head: logits of a long sequence are large and not always needed.

    Raises:
        CalibrationError: The weights or the device can't be used.
    """
    return load_causal_lm(options).base_model


def load_causal_lm(options: CalibrationOptions) -> Any:
    """The whole model.

    Raises:
        CalibrationError: The weights or the device can't be used.
    """
    device = options.device or ("cuda" if torch.cuda.is_available() else "cpu")
    dtype = options.dtype if options.dtype == "auto" else getattr(torch, options.dtype)
    # device_map needs accelerate; one device does without.
    spread = {"device_map": "auto"} if device == "auto" else {}
    model = _read(transformers.AutoModelForCausalLM, options.model, dtype=dtype, **spread)
    return model.eval() if spread else model.to(device).eval()


def check_device(device: str | None) -> None:
    """Raises CalibrationError where ``device`` doesn't exist here."""
    if device is None or device == "auto":
        return
    try:
        torch.empty(0, device=device)
    except (RuntimeError, AssertionError) as error:
        reason = str(error).splitlines()[0]
        raise CalibrationError(f"--device {device} can't be used here: {reason}") from error


def _read(loader: Any, model: str, **arguments: Any) -> Any:
    try:
        return loader.from_pretrained(model, **arguments)
    except (OSError, ValueError, ImportError) as error:
        reason = str(error).strip().splitlines()[0]
        raise CalibrationError(f"--model {model}: {reason}") from error


def _require_attention_interface(config: Any, model: str) -> None:
    try:
        with _quiet(), torch.device("meta"):
            skeleton = transformers.AutoModelForCausalLM.from_config(config)
            supported = can_be_captured(skeleton)
    except (ValueError, ImportError) as error:
        reason = str(error).strip().splitlines()[0]
        raise CalibrationError(f"{model}: not a causal language model for transformers: {reason}") from error
    if not supported:
        raise CalibrationError(
            f"{model}: transformers' {type(skeleton).__name__} does not call its AttentionInterface, "
            "through which the calibrator sees the scores; this architecture can't be calibrated"
        )


def _dense_layers(options: CalibrationOptions, full: list[int]) -> list[int]:
    if options.dense_layers is None:
        return [layer for layer in full if layer == 0]
    unknown = sorted(set(options.dense_layers) - set(full))
    if unknown:
        raise CalibrationError(
            f"--dense-layers {unknown} are not layers that get thresholds; those are {_ranges(full)}"
        )
    if len(set(options.dense_layers)) == len(full):
        raise CalibrationError(
            "--dense-layers names every layer that gets thresholds; nothing would be sparse"
        )
    return sorted(set(options.dense_layers))


def _ranges(numbers: list[int]) -> str:
    if numbers == list(range(numbers[0], numbers[-1] + 1)):
        return f"{numbers[0]} to {numbers[-1]}"
    return ", ".join(map(str, numbers))


def _window(text_config: Any) -> int:
    sizes = (getattr(text_config, name, None) for name in ("sliding_window", "attention_chunk_size"))
    return next((size for size in sizes if size), 0)


def _max_seq_length(options: CalibrationOptions, text_config: Any) -> int:
    limit = getattr(text_config, "max_position_embeddings", None)
    asked = options.max_seq_length
    if asked is None:
        return min(limit or DEFAULT_MAX_SEQ_LENGTH, DEFAULT_MAX_SEQ_LENGTH)
    if limit is not None and asked > limit:
        raise CalibrationError(f"--max-seq-length is {asked}, but the model's context is {limit} tokens")
    return asked
