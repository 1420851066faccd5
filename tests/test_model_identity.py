"""What two models must agree on to share a table."""

import pytest
from transformers import (
    AutoConfig,
    Gemma2Config,
    Gemma3Config,
    Gemma3TextConfig,
    Gemma4Config,
    Gemma4TextConfig,
    LlamaConfig,
    MistralConfig,
    NemotronHConfig,
    Phi3Config,
    Qwen2Config,
    Qwen2MoeConfig,
    T5Config,
)

from topt_vllm.table.identity import identify

LLAMA = {
    "hidden_size": 64,
    "num_hidden_layers": 3,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "vocab_size": 100,
    "intermediate_size": 64,
}


def fingerprint(**changes: object) -> str:
    return identify(LlamaConfig(**LLAMA | changes), "m").fingerprint


def test_geometry_of_a_llama():
    identity = identify(LlamaConfig(**LLAMA, architectures=["LlamaForCausalLM"]), "m", "abc")
    assert (identity.id, identity.revision, identity.architecture) == ("m", "abc", "LlamaForCausalLM")
    assert (identity.num_layers, identity.num_query_heads, identity.num_kv_heads) == (3, 4, 2)
    assert identity.head_dim == 16
    assert identity.sliding_window_layers == []


@pytest.mark.parametrize(
    "change",
    [
        {"hidden_size": 128},
        {"num_hidden_layers": 4},
        {"num_key_value_heads": 4},
        {"vocab_size": 101},
        {"rope_parameters": {"rope_type": "default", "rope_theta": 500000.0}},
    ],
    ids=lambda change: next(iter(change)),
)
def test_what_changes_scores_changes_the_fingerprint(change):
    assert fingerprint(**change) != fingerprint()


@pytest.mark.parametrize(
    "change",
    [{"torch_dtype": "bfloat16"}, {"max_position_embeddings": 77}, {"use_cache": False}],
    ids=lambda change: next(iter(change)),
)
def test_what_leaves_scores_alone_leaves_the_fingerprint(change):
    assert fingerprint(**change) == fingerprint()


def test_whole_number_rope_base_is_the_same_as_a_fraction():
    whole, fraction = ({"rope_type": "default", "rope_theta": theta} for theta in (10000, 10000.0))
    assert fingerprint(rope_parameters=whole) == fingerprint(rope_parameters=fraction)


def test_saved_and_loaded_model_keeps_its_fingerprint(tmp_path):
    LlamaConfig(**LLAMA).save_pretrained(tmp_path)
    assert identify(AutoConfig.from_pretrained(tmp_path), "other name").fingerprint == fingerprint()


def test_layers_with_a_window():
    gemma = identify(Gemma3TextConfig(num_hidden_layers=7, sliding_window=8), "m")
    assert gemma.sliding_window_layers == [0, 1, 2, 3, 4, 6]
    assert identify(Gemma2Config(num_hidden_layers=4), "m").sliding_window_layers == [0, 2]
    mistral = MistralConfig(num_hidden_layers=2, sliding_window=8)
    assert identify(mistral, "m").sliding_window_layers == [0, 1]
    assert identify(MistralConfig(num_hidden_layers=2, sliding_window=None), "m").sliding_window_layers == []
    assert identify(Qwen2Config(num_hidden_layers=2), "m").sliding_window_layers == []


def test_a_window_as_long_as_the_context_is_none():
    for window, windowed in ((4095, [0, 1]), (4096, []), (262144, [])):
        phi = Phi3Config(num_hidden_layers=2, sliding_window=window, max_position_embeddings=4096)
        assert identify(phi, "m").sliding_window_layers == windowed


def test_no_window_written_as_0_is_the_same_as_none():
    """transformers has 0 for a Qwen2-MoE without windows, and vLLM makes None of it."""
    config = Qwen2MoeConfig(**LLAMA)
    assert config.sliding_window == 0
    calibrated = identify(config, "m")
    config.sliding_window = None
    assert identify(config, "m") == calibrated


def test_layers_without_attention():
    kinds = ["mamba", "moe", "attention", "mlp"]
    identity = identify(NemotronHConfig(layers_block_type=kinds), "m")
    assert identity.attention_free_layers == [0, 1, 3]
    assert (identity.full_layers, identity.sliding_window_layers) == ([2], [])
    assert identity.layers_text() == "4 layers, 3 of them without thresholds (no attention)"
    other = identity.model_copy(update={"attention_free_layers": [0, 1]})
    assert identity.difference(other) == "attention_free_layers: [0, 1, 3] against [0, 1]"
    # Tables of models that have none stay as they were.
    assert "attention_free_layers" not in identify(LlamaConfig(**LLAMA), "m").model_dump(exclude_unset=True)


def test_heads_are_those_of_layers_with_full_attention():
    text = Gemma4TextConfig(
        **LLAMA, head_dim=8, global_head_dim=32, num_global_key_value_heads=1, attention_k_eq_v=True
    )
    identity = identify(Gemma4Config(text_config=text), "m")
    assert (identity.num_query_heads, identity.num_kv_heads, identity.head_dim) == (4, 1, 32)
    assert (identity.full_layers, identity.sliding_window_layers) == ([2], [0, 1])
    assert identity.fingerprint != identify(Gemma4TextConfig(**LLAMA, head_dim=8), "m").fingerprint


def test_full_attention_with_different_heads_is_refused():
    uneven = LlamaConfig(**LLAMA, per_layer_config={1: {"num_key_value_heads": 4}})
    with pytest.raises(ValueError, match=r"layer 0 has .* 2 KV heads .* layer 1 has .* 4 KV heads"):
        identify(uneven, "m")


def test_text_part_of_a_composite_model():
    text = Gemma3TextConfig(num_hidden_layers=7)
    assert identify(Gemma3Config(text_config=text), "m").fingerprint == identify(text, "m").fingerprint


def test_encoder_decoder_is_refused():
    with pytest.raises(ValueError, match="encoder-decoder"):
        identify(T5Config(), "m")
