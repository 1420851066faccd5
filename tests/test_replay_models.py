"""Replays of models of many makes: their own forward passes, positions, heads and experts."""

import json
from pathlib import Path

import pytest
import torch
import transformers
from tiny_models import SMALL, save_model, save_text
from transformers import (
    CohereConfig,
    DeepseekV3Config,
    Gemma2Config,
    Gemma3TextConfig,
    GPT2Config,
    GPTNeoXConfig,
    GraniteConfig,
    Llama4TextConfig,
    LlamaConfig,
    MixtralConfig,
    OPTConfig,
    Qwen3MoeConfig,
    Qwen3NextConfig,
)

from topt_vllm.calibration.head_errors import output_projection
from topt_vllm.cli.main import main
from topt_vllm.replay.attention import RuleAttention
from topt_vllm.replay.model import examine, load_causal_lm
from topt_vllm.replay.options import ReplayError
from topt_vllm.replay.replay import Replay
from topt_vllm.replay.top_theta import TopTheta

TOKENS = torch.randint(0, 256, (121,), generator=torch.Generator().manual_seed(0))
ROWS = 40
PLAIN = {name: value for name, value in SMALL.items() if name != "head_dim"}
WINDOWS = {"sliding_window": 32, "layer_types": ["sliding_attention", "full_attention", "sliding_attention"]}
EXPERTS = {"num_experts_per_tok": 2, "moe_intermediate_size": 16}
GPT2 = GPT2Config(n_embd=32, n_layer=3, n_head=4, n_positions=2048, vocab_size=257)
# The output of its decoder is projected once more.
OPT = OPTConfig(
    hidden_size=32,
    ffn_dim=32,
    num_hidden_layers=3,
    num_attention_heads=4,
    vocab_size=257,
    max_position_embeddings=2048,
    word_embed_proj_dim=16,
)
MIXTRAL = MixtralConfig(**SMALL, num_local_experts=3, num_experts_per_tok=2, output_router_logits=True)
CONFIGS = {
    "llama": LlamaConfig(**SMALL),
    "qwen3 moe": Qwen3MoeConfig(**SMALL, **EXPERTS, num_experts=4),
    "mixtral": MIXTRAL,
    "deepseek": DeepseekV3Config(
        **PLAIN | {"num_key_value_heads": 4},
        **EXPERTS,
        n_routed_experts=4,
        n_group=1,
        topk_group=1,
        q_lora_rank=8,
        kv_lora_rank=8,
        qk_rope_head_dim=4,
        qk_nope_head_dim=4,
        v_head_dim=8,
        head_dim=4,
    ),
    "gpt2": GPT2,
    "opt": OPT,
    "gpt-neox": GPTNeoXConfig(**SMALL),
    "gemma2": Gemma2Config(
        **SMALL, **WINDOWS, attn_logit_softcapping=2.0, query_pre_attn_scalar=16, final_logit_softcapping=3.0
    ),
    "gemma3": Gemma3TextConfig(**SMALL, **WINDOWS, final_logit_softcapping=3.0),
    "granite": GraniteConfig(**PLAIN, logits_scaling=4.0, embedding_multiplier=3.0, attention_multiplier=0.3),
    "cohere": CohereConfig(**PLAIN, logit_scale=0.25),
}


def load(folder: Path, config: transformers.PretrainedConfig):
    return load_causal_lm(str(save_model(folder, config)), "cpu", "float32")


@pytest.mark.parametrize("config", CONFIGS.values(), ids=CONFIGS.keys())
def test_a_replay_that_skips_nothing_has_the_models_own_losses(tmp_path, config):
    """Dense, and with the first or the last layer attended by a rule that keeps everything."""
    model, subject = load(tmp_path, config), examine(str(tmp_path))
    replay = Replay(model, subject, TOKENS.tolist(), ROWS)
    # Where there is a softcap SDPA would drop it.
    model.set_attn_implementation("eager")
    with torch.inference_mode():
        logits = model(TOKENS[None, :-1], use_cache=False).logits[0, -ROWS:]
    expected = torch.nn.functional.cross_entropy(logits, TOKENS[-ROWS:], reduction="none")
    assert expected.std() > 1e-3
    for layers in ([], subject.full_layers[:1], subject.full_layers[-1:]):
        rules = dict.fromkeys(layers, TopTheta({}))
        found = replay.compare(RuleAttention(subject, rules, replay.rows + 1))
        torch.testing.assert_close(found.dense, expected, rtol=1e-5, atol=1e-5)
        torch.testing.assert_close(found.loss, expected, rtol=1e-5, atol=1e-5)
        assert found.kl.abs().max() < 1e-5


def test_a_pass_makes_one_row_of_logits(tmp_path):
    """Those of a long sequence are large, and only some rows' are asked for."""
    model = load(tmp_path, CONFIGS["llama"])
    seen = []
    model.lm_head.register_forward_pre_hook(lambda _, given: seen.append(given[0].shape[1]))
    Replay(model, examine(str(tmp_path)), TOKENS.tolist(), ROWS)
    assert seen == [1, ROWS]


@pytest.mark.parametrize(
    ("config", "message"),
    [
        (
            Llama4TextConfig(
                **SMALL, attention_chunk_size=64, num_local_experts=2, moe_layers=[], no_rope_layers=[1, 0, 1]
            ),
            "layer 0 attends with a mask that isn't its window's",
        ),
        (
            Qwen3NextConfig(
                **SMALL,
                **EXPERTS,
                num_experts=4,
                shared_expert_intermediate_size=16,
                linear_num_key_heads=2,
                linear_num_value_heads=4,
                linear_key_head_dim=8,
                linear_value_head_dim=8,
                layer_types=["linear_attention", "full_attention", "full_attention"],
            ),
            r"layers \[0\] don't call the AttentionInterface",
        ),
    ],
    ids=["chunks", "state"],
)
def test_layers_that_cannot_be_decoded_behind_a_dense_pass_are_named(tmp_path, config, message):
    """By the configuration, and where it says nothing, by what the pass has seen."""
    model = load(tmp_path, config)
    with pytest.raises(ReplayError, match=f"layers of the kind {config.layer_types[0]}"):
        examine(str(tmp_path))
    with pytest.raises(ReplayError, match=message):
        Replay(model, examine(str(tmp_path), decoded=False), TOKENS.tolist(), ROWS)


@pytest.mark.slow
@pytest.mark.parametrize("config", [GPT2, OPT, MIXTRAL], ids=["gpt2", "opt", "mixtral"])
def test_calibrate_and_evaluate(tmp_path, config):
    save_text(save_model(tmp_path, config) / "text.txt", 3700)
    model = ["--model", str(tmp_path), "--dataset", str(tmp_path / "text.txt"), "--device", "cpu"]
    budgets = ["--budget", "auto", "--k", "16", "--target-rows", "40"]
    assert main(["calibrate", *model, "--num-samples", "2", "--max-seq-length", "600", *budgets]) == 0
    out = tmp_path / "out.json"
    asked = ["--max-seq-length", "400", "--rows", "0.4", "--rules", "toptheta", "topk", "--k", "16"]
    assert main(["evaluate", *model, *asked, "--needles", "390", "--depths", "0.5", "--json", str(out)]) == 0
    assert len(json.loads(out.read_text())) == 6


def test_output_projection_of_gpt2_is_turned(tmp_path):
    """Its Conv1D multiplies from the other side."""
    model = load(tmp_path, GPT2)
    projection, heads = output_projection(model, 1, 32), torch.randn(5, 32)
    found = model.transformer.h[1].attn.c_proj
    torch.testing.assert_close(heads @ projection.T + found.bias, found(heads))


COMPRESSED = {
    "gptq": ({"quant_method": "gptq", "bits": 4}, "weights are compressed, and can't be read here: .*GPTQ"),
    "no method": ({"bits": 4}, "weights are compressed, and can't be read here: .*quant_method"),
}


@pytest.mark.parametrize(("quantisation", "message"), COMPRESSED.values(), ids=COMPRESSED.keys())
def test_compressed_weights_that_cannot_be_read_are_refused_before_they_are(
    tmp_path, monkeypatch, quantisation, message
):
    monkeypatch.setattr("transformers.quantizers.quantizer_gptq.is_optimum_available", lambda: False)
    LlamaConfig(**SMALL, quantization_config=quantisation).save_pretrained(tmp_path)
    with pytest.raises(ReplayError, match=message):
        examine(str(tmp_path))


def test_weights_that_are_lacking_are_not_made_up(tmp_path):
    """As where a checkpoint is compressed in a way that transformers doesn't know: its weights have other names."""
    model = transformers.AutoModelForCausalLM.from_config(LlamaConfig(**SMALL))
    kept = {name: tensor for name, tensor in model.state_dict().items() if "layers.1.mlp.up" not in name}
    model.save_pretrained(tmp_path, state_dict=kept)
    with pytest.raises(ReplayError, match=r"the weights lack model\.layers\.1\.mlp\.up_proj\.weight"):
        load_causal_lm(str(tmp_path), "cpu", "float32")
