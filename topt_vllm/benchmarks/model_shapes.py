"""Shapes of known models for engines with dummy weights: a configuration is all that vLLM then needs."""

import json
from pathlib import Path
from typing import Any

_LLAMA = {
    "architectures": ["LlamaForCausalLM"],
    "model_type": "llama",
    "hidden_act": "silu",
    "rms_norm_eps": 1e-5,
    "rope_parameters": {"rope_theta": 500000.0, "rope_type": "default"},
    "head_dim": 128,
    "vocab_size": 128256,
    "tie_word_embeddings": False,
    # More than those models were trained for, so that no context is refused.
    "max_position_embeddings": 1 << 18,
    "bos_token_id": 1,
    "eos_token_id": 2,
    "dtype": "bfloat16",
}
_QWEN3 = _LLAMA | {
    "architectures": ["Qwen3ForCausalLM"],
    "model_type": "qwen3",
    "attention_bias": False,
    "use_sliding_window": False,
    "vocab_size": 151936,
    "rms_norm_eps": 1e-6,
    "rope_parameters": {"rope_theta": 1000000.0, "rope_type": "default"},
}


def _sizes(layers: int, hidden: int, intermediate: int, heads: int, kv_heads: int) -> dict[str, int]:
    return {
        "num_hidden_layers": layers,
        "hidden_size": hidden,
        "intermediate_size": intermediate,
        "num_attention_heads": heads,
        "num_key_value_heads": kv_heads,
    }


SHAPES: dict[str, dict[str, Any]] = {
    "llama-8b": _LLAMA | _sizes(32, 4096, 14336, 32, 8),
    "llama-1b": _LLAMA | _sizes(16, 2048, 8192, 32, 8) | {"head_dim": 64, "tie_word_embeddings": True},
    "qwen3-8b": _QWEN3 | _sizes(36, 4096, 12288, 32, 8),
    "qwen3-0.6b": _QWEN3 | _sizes(28, 1024, 3072, 16, 8) | {"tie_word_embeddings": True},
    "smollm2-135m": _LLAMA
    | _sizes(30, 576, 1536, 9, 3)
    | {"head_dim": 64, "vocab_size": 49152, "tie_word_embeddings": True},
}


def write_checkpoint(shape: str, folder: Path) -> Path:
    """A model's folder with a configuration and nothing else, named after the shape.

    Args:
        shape: Key of :data:`SHAPES`.
        folder: Where to make it.
    """
    path = folder / shape
    path.mkdir()
    (path / "config.json").write_text(json.dumps(SHAPES[shape], indent=1))
    return path


def has_weights(folder: Path) -> bool:
    """Whether a model's folder holds weights, and not a configuration alone."""
    return any(next(folder.glob(pattern), None) for pattern in ("*.safetensors", "*.bin", "*.pt", "*.gguf"))
