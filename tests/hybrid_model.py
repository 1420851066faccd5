"""A tiny Qwen3-Next: every fourth layer attends, the others keep a state of their own; and tables for it."""

from pathlib import Path

from table_factory import make_table
from tiny_models import save_model
from transformers import Qwen3NextConfig

from topt_vllm.table.file import dump
from topt_vllm.table.identity import identify
from topt_vllm.table.schema import LayerThresholds

FULL_LAYERS = [3, 7]
NUM_HEADS = 4


def config() -> Qwen3NextConfig:
    """Linear heads of 128 channels, as vLLM's CPU kernels want them."""
    return Qwen3NextConfig(
        architectures=["Qwen3NextForCausalLM"],
        hidden_size=64,
        intermediate_size=64,
        num_hidden_layers=8,
        num_attention_heads=NUM_HEADS,
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


def save_table(path: Path, theta: float) -> Path:
    """One θ (scaled logits) for all heads of the layers that attend, at contexts of 64 to 4096 tokens."""
    lengths = [64, 4096]
    table = make_table(identify(config(), "hybrid"), ks=(64,), lengths=lengths, dense_layers=())
    layers = [
        LayerThresholds(layer=layer, law=[[theta, 0.0]] * NUM_HEADS, theta=[[theta] * 2] * NUM_HEADS)
        for layer in FULL_LAYERS
    ]
    budget = table.budgets[0].model_copy(update={"layers": layers})
    dump(table.model_copy(update={"budgets": [budget]}), path, force=True)
    return path
