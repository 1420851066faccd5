"""What two models must agree on to share a table."""

import pytest
from transformers import (
    AutoConfig,
    Gemma2Config,
    Gemma3Config,
    Gemma3TextConfig,
    LlamaConfig,
    MistralConfig,
    Qwen2Config,
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


def test_text_part_of_a_composite_model():
    text = Gemma3TextConfig(num_hidden_layers=7)
    assert identify(Gemma3Config(text_config=text), "m").fingerprint == identify(text, "m").fingerprint


def test_encoder_decoder_is_refused():
    with pytest.raises(ValueError, match="encoder-decoder"):
        identify(T5Config(), "m")
