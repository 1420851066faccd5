"""Runs a model once over a text and keeps what its attention layers saw, for replays of real caches."""

from pathlib import Path

import torch

from topt_vllm.benchmarks.cache_file import CapturedCache, CapturedLayer
from topt_vllm.calibration.capture import can_be_captured, captured
from topt_vllm.calibration.model import load_model, load_tokenizer
from topt_vllm.calibration.options import CalibrationError, CalibrationOptions
from topt_vllm.calibration.scores import LayerCall
from topt_vllm.calibration.texts import read_texts
from topt_vllm.model_identity import ModelIdentity, identify


def capture(model: str, dataset: tuple[str, ...], seq_len: int, device: str | None = None) -> CapturedCache:
    """K and V of every full-attention layer over the first tokens of a text, and the last token's query.

    Args:
        model: Folder or hub id.
        dataset: Text files, JSONL files, or hub datasets, as for calibrating.
        seq_len: Tokens.
        device: As for calibrating.

    Raises:
        CalibrationError: The model or the text can't be read, isn't supported, or is too short.
    """
    tokens, text = _tokens(model, dataset, seq_len)
    weights = load_model(CalibrationOptions(model, dataset, Path(), device=device))
    identity = _identify(weights, model, seq_len)
    layers: dict[int, CapturedLayer] = {}
    scales: set[tuple[float, float]] = set()

    def keep(call: LayerCall) -> None:
        parts = (call.query[:, -1], call.key, call.value)
        layers[call.layer] = CapturedLayer(*(part.to("cpu", torch.bfloat16, copy=True) for part in parts))
        scales.add((call.scale, call.softcap))

    with torch.inference_mode(), captured(weights, identity, keep):
        weights(input_ids=torch.tensor([tokens], device=weights.device), use_cache=False)
    if len(scales) != 1:
        raise CalibrationError(
            f"{model}: layers differ in (scale, softcap), {sorted(scales)}; such models can't be captured"
        )
    scale, softcap = scales.pop()
    return CapturedCache(identity, text, seq_len, scale, softcap, layers)


def _tokens(model: str, dataset: tuple[str, ...], seq_len: int) -> tuple[list[int], str]:
    """The first tokens of the text, with those that the tokenizer puts before it, and the text's name."""
    if seq_len < 1:
        raise CalibrationError(f"--seq-len is {seq_len}; it must be at least 1")
    documents, sources = read_texts(dataset, seq_len)
    tokens = load_tokenizer(model)("".join(documents), verbose=False)["input_ids"]
    if len(tokens) < seq_len:
        raise CalibrationError(
            f"the text has {len(tokens)} tokens; --seq-len is {seq_len}. Add text or lower it"
        )
    return tokens[:seq_len], ", ".join(source.name for source in sources)


def _identify(weights: torch.nn.Module, model: str, seq_len: int) -> ModelIdentity:
    limit = getattr(weights.config.get_text_config(), "max_position_embeddings", None)
    if limit is not None and seq_len > limit:
        raise CalibrationError(f"--seq-len is {seq_len}, but the model's context is {limit} tokens")
    try:
        identity = identify(weights.config, Path(model.rstrip("/")).name)
    except ValueError as error:
        raise CalibrationError(str(error)) from error
    if not can_be_captured(weights):
        raise CalibrationError(
            f"{model}: transformers' {type(weights).__name__} does not call its AttentionInterface, through which "
            "the cache is seen; this architecture can't be captured"
        )
    if len(identity.sliding_window_layers) == identity.num_layers:
        raise CalibrationError(f"{model}: every layer has a sliding window; there is no cache to capture")
    return identity
