"""What the engines are asked: the model's table, prompts and rows of the built-in text, engine arguments."""

from dataclasses import dataclass
from importlib import resources
from typing import Any, cast

from topt_vllm.attention.api import load_implementation, require
from topt_vllm.attention.screen import ScreenFormat
from topt_vllm.config import NO_THRESHOLDS, TopThetaConfig
from topt_vllm.replay.model import load_tokenizer, read_config
from topt_vllm.table.command import lacks_key_statistics
from topt_vllm.table.identity import ModelIdentity, identify
from topt_vllm.table.schema import ThresholdTable
from topt_vllm.table.search import find_table
from topt_vllm.table.words import name_of_model
from topt_vllm.verify.checks import CheckError
from topt_vllm.verify.engine import Forced, Request
from topt_vllm.verify.installation import device_type

# Rows in a batch of four: a step costs little more than that of one row.
_SEQUENCES, _ROWS = 4, 48
_DECODED = _SEQUENCES * _ROWS
_CONTEXT = 1536
_ANSWER = 24
# Room for every prompt in float32, and then some for pages that are rounded up.
_CACHE_SLACK = 4
_MIN_CACHE = 256 << 20
_FREE_SHARE = 0.01


@dataclass(frozen=True)
class Model:
    """What is known of the model without its weights.

    Attributes:
        name: Folder or hub id.
        identity: For the table.
        max_length: Longest context (tokens).
        tokens: Of the built-in text, with what the tokenizer puts before a text.
        trust_remote_code: Whether to run code that comes with the model.
    """

    name: str
    identity: ModelIdentity
    max_length: int
    tokens: list[int]
    trust_remote_code: bool = False


def no_table() -> dict[str, Any]:
    """Settings for θ = −inf in our own kernel.

    On GPUs it has to be named: ``auto`` may leave layers without thresholds to the platform's kernel, and stock
    vLLM would be compared with itself.
    """
    named = {"implementation": "triton"} if device_type() == "cuda" else {}
    return {"thresholds": NO_THRESHOLDS, **named}


def read_model(name: str, trust_remote_code: bool = False) -> Model:
    """Configuration and tokenizer.

    Raises:
        ReplayError: The model can't be read.
    """
    config = read_config(name, trust_remote_code)
    text = resources.files("topt_vllm.verify").joinpath("text.txt").read_text(encoding="utf-8")
    tokens = load_tokenizer(name, trust_remote_code)(text, verbose=False)["input_ids"]
    longest = getattr(config.get_text_config(), "max_position_embeddings", None) or len(tokens)
    identity = identify(config, name_of_model(name), None)
    return Model(name, identity, longest, tokens, trust_remote_code)


def read_table(
    model: Model, thresholds: str | None, k_screen: str | None = None
) -> tuple[ThresholdTable | None, str]:
    """The table that a server would use (None for θ = −inf), and what it is in words.

    Raises:
        ThresholdTableError: There is none, or it is broken or another model's.
        CheckError: It knows nothing of the keys that a K screen copies.
        ValueError: The kernel here has no such K screen.
    """
    found = find_table(TopThetaConfig(thresholds=thresholds), model.identity, model.name, None)
    if found is None:
        return None, "θ = −inf was asked for; nothing is skipped, so nothing more is checked"
    table, path = found
    if k_screen is not None:
        require(load_implementation("auto", device_type())[1], screen=cast(ScreenFormat, k_screen))
        if table.key_statistics is None:
            raise CheckError(lacks_key_statistics(model.name, path))
    budget = table.budget(None)
    quality = f"; {budget.quality.sentence()}" if budget.quality is not None else ""
    lengths = f"{table.lengths[0]} to {table.lengths[-1]} tokens"
    return (
        table,
        f"{path}, budget {budget.key} (its last, a server's default), calibrated at {lengths}{quality}",
    )


def forced_text(model: Model, table: ThresholdTable) -> Forced:
    """Which rows of the built-in text are decoded: the last of a context in which the table skips.

    Raises:
        CheckError: Text or context are too short for that.
    """
    limit = min(len(model.tokens), model.max_length - 1) - _DECODED
    context = min(max(_CONTEXT, table.lengths[0]), limit)
    if context < table.lengths[0]:
        raise CheckError(
            f"the table skips from {table.lengths[0]} tokens on, but the built-in text and the model's context "
            f"leave {limit} before the rows to decode; measure with topt-vllm evaluate on a longer text"
        )
    return Forced(model.tokens[: context + _DECODED], context, _ROWS)


def plain_request(model: Model, toptheta: dict[str, Any] | None) -> Request:
    """Greedy answers to prompts of mixed lengths; through TOPTHETA with these settings, or stock vLLM's backend."""
    ids = model.tokens[: model.max_length - _ANSWER]
    prompts = [ids[:1], ids[:16], ids[100:200], ids[:400]]
    arguments = _arguments(model, 400 + _ANSWER, "raw_logits", toptheta)
    # The plugin has to reach a core that is started as a server starts it.
    return Request(arguments, prompts, _ANSWER, separate_core=toptheta is not None)


def forced_request(
    model: Model, forced: Forced, thresholds: str | None, k_screen: str | None = None
) -> Request:
    """The built-in text, decoded with the table, and with a K screen where a format is named."""
    asked = {"thresholds": thresholds, "k_screen": k_screen}
    settings = {name: value for name, value in asked.items() if value is not None}
    arguments = _arguments(model, len(forced.tokens) + 1, "raw_logprobs", settings)
    return Request(arguments, [], forced=forced, separate_core=False)


def _arguments(
    model: Model, length: int, logprobs_mode: str, toptheta: dict[str, Any] | None
) -> dict[str, Any]:
    identity = model.identity
    token_bytes = 2 * 4 * identity.num_layers * identity.num_kv_heads * identity.head_dim
    arguments: dict[str, Any] = {
        "model": model.name,
        "max_model_len": min(length, model.max_length),
        "kv_cache_memory_bytes": max(_MIN_CACHE, _CACHE_SLACK * length * token_bytes),
        # With that, vLLM's GPU workers (0.31 to 0.33) only ask whether this share is free when they start. The
        # default's may be held by a server, or still by the engine before.
        "gpu_memory_utilization": _FREE_SHARE,
        "max_num_seqs": 4,
        # Chunks bound the memory of prefilled log-probabilities: float32 [chunk, vocabulary].
        "max_num_batched_tokens": 512,
        "enforce_eager": True,
        "logprobs_mode": logprobs_mode,
        "seed": 0,
        "trust_remote_code": model.trust_remote_code,
    }
    if toptheta is not None:
        arguments |= {"attention_backend": "TOPTHETA", "additional_config": {"toptheta": toptheta}}
    return arguments
