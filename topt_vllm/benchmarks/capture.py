"""Runs a model once over a text and keeps what its attention layers saw, for replays of real caches."""

from typing import Any

import torch

from topt_vllm.benchmarks.cache_file import CapturedCache, CapturedLayer
from topt_vllm.replay.checkpoint import check_weights
from topt_vllm.replay.model import Subject, examine, load_causal_lm, load_tokenizer
from topt_vllm.replay.options import ReplayError
from topt_vllm.replay.scores import LayerCall
from topt_vllm.replay.texts import read_texts
from topt_vllm.replay.whole_pass import observed


def capture(
    model: str,
    dataset: tuple[str, ...],
    seq_len: int,
    device: str | None = None,
    trust_remote_code: bool = False,
) -> CapturedCache:
    """K and V of every full-attention layer over the first tokens of a text, and the last token's query.

    Args:
        model: Folder or hub id.
        dataset: Texts, as for calibrating.
        seq_len: Tokens.
        device: As for calibrating.
        trust_remote_code: Whether to run code that comes with the model.

    Raises:
        ReplayError: The model or the text can't be read, isn't supported, or is too short.
    """
    subject = examine(model, trust_remote_code=trust_remote_code)
    _check_context(subject, seq_len)
    check_weights(model)
    tokens, text = _tokens(load_tokenizer(model, trust_remote_code), dataset, seq_len)
    weights = load_causal_lm(model, device, "auto", trust_remote_code)
    layers: dict[int, CapturedLayer] = {}
    scales: set[tuple[float, float]] = set()

    def keep(call: LayerCall) -> None:
        if call.sinks is not None or call.key.shape[2] != call.value.shape[2]:
            what = "attention sinks" if call.sinks is not None else "heads of K and V of different sizes"
            raise ReplayError(f"{model}: it has {what}, for which a captured cache has no place")
        parts = (call.query[:, -1], call.key, call.value)
        layers[call.layer] = CapturedLayer(*(part.to("cpu", torch.bfloat16, copy=True) for part in parts))
        scales.add((call.scale, call.softcap))

    observed(weights, subject, tokens, keep)
    if len(scales) != 1:
        raise ReplayError(
            f"{model}: its layers have different (scale, softcap), {sorted(scales)}; such models can't be captured"
        )
    scale, softcap = scales.pop()
    return CapturedCache(subject.identity, text, seq_len, scale, softcap, layers)


def _check_context(subject: Subject, seq_len: int) -> None:
    if seq_len < 1:
        raise ReplayError(f"--seq-len is {seq_len}; it must be at least 1")
    if subject.context is not None and seq_len > subject.context:
        raise ReplayError(f"--seq-len is {seq_len}, but the model's context is {subject.context} tokens")


def _tokens(tokenizer: Any, dataset: tuple[str, ...], seq_len: int) -> tuple[list[int], str]:
    """The first tokens of the text, with those that the tokenizer puts before it, and the text's name."""
    documents, sources = read_texts(dataset, seq_len, stretches=1)
    tokens = tokenizer("".join(documents), verbose=False)["input_ids"]
    if len(tokens) < seq_len:
        raise ReplayError(f"the text has {len(tokens)} tokens; --seq-len is {seq_len}. Add text or lower it")
    return tokens[:seq_len], ", ".join(source.name for source in sources)
