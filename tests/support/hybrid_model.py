"""A tiny Qwen3-Next: every fourth layer attends, the others keep a state of their own."""

from pathlib import Path

from tiny_models import save_model
from transformers import Qwen3NextConfig

FULL_LAYERS = [3, 7]


def config() -> Qwen3NextConfig:
    """Linear heads of 128 channels, as vLLM's CPU kernels want them."""
    return Qwen3NextConfig(
        architectures=["Qwen3NextForCausalLM"],
        hidden_size=64,
        intermediate_size=64,
        num_hidden_layers=8,
        num_attention_heads=4,
        num_key_value_heads=2,
        head_dim=64,
        vocab_size=257,
        max_position_embeddings=4096,
        linear_num_key_heads=1,
        linear_num_value_heads=2,
        linear_key_head_dim=128,
        linear_value_head_dim=128,
        num_experts=4,
        num_experts_per_tok=2,
        moe_intermediate_size=32,
        shared_expert_intermediate_size=32,
    )


def save_hybrid(folder: Path) -> Path:
    """With random weights."""
    return save_model(folder, config())
