"""Tiny configurations of the families of models that people serve, and of what can't be calibrated."""

from dataclasses import dataclass, field
from typing import Any

import transformers
from tiny_models import SMALL, WINDOWS
from transformers import PretrainedConfig

FULL, SLIDING, LINEAR = "full_attention", "sliding_attention", "linear_attention"

PLAIN = {name: value for name, value in SMALL.items() if name != "head_dim"}
# All heads have a K and V of their own.
MULTI_HEAD = {name: value for name, value in PLAIN.items() if name != "num_key_value_heads"}
EXPERTS = {"num_experts_per_tok": 2, "moe_intermediate_size": 16}
DELTA_NET = {
    "linear_num_key_heads": 2,
    "linear_num_value_heads": 4,
    "linear_key_head_dim": 8,
    "linear_value_head_dim": 8,
    "layer_types": [LINEAR, FULL, FULL],
}
VISION = {"hidden_size": 32, "intermediate_size": 32, "num_hidden_layers": 1, "num_attention_heads": 2}
# Of the Qwen models, which turn a channel by one of three positions.
QWEN_VISION = {"depth": 1, "hidden_size": 32, "num_heads": 2, "intermediate_size": 32}
MROPE = {"rope_type": "default", "rope_theta": 10000.0, "mrope_section": [2, 1, 1]}
MAMBA = {
    "mamba_n_heads": 8,
    "mamba_d_head": 8,
    "mamba_d_state": 8,
    "mamba_n_groups": 1,
    "mamba_chunk_size": 16,
}
# With it vLLM 0.32's Mamba-2 fails on CPUs: it looks for states at the ends of chunks, and has those of sequences.
NO_PREFIX_CACHING = {"enable_prefix_caching": False}
GEMMA4 = {
    **SMALL,
    "sliding_window": 32,
    "global_head_dim": 16,
    "hidden_size_per_layer_input": 4,
    "vocab_size_per_layer_input": 257,
}


@dataclass(frozen=True)
class Family:
    """A model that can be calibrated.

    Attributes:
        config: Its configuration.
        full: Layers that get thresholds.
        free: Layers without attention.
        quick: Whether its round trip through the command line belongs to the fast loop.
        alike: Whether it differs from others in its forward pass only, so that the fast loop leaves it out.
        engine: More arguments of its engines.
    """

    config: PretrainedConfig
    full: tuple[int, ...] = (0, 1, 2)
    free: tuple[int, ...] = ()
    quick: bool = False
    alike: bool = False
    engine: dict[str, Any] = field(default_factory=dict)


FAMILIES = {
    "llama": Family(transformers.LlamaConfig(**SMALL)),
    "mixtral": Family(
        transformers.MixtralConfig(
            **SMALL, num_local_experts=3, num_experts_per_tok=2, output_router_logits=True
        )
    ),
    "qwen3": Family(transformers.Qwen3Config(**SMALL), alike=True),
    "qwen3 moe": Family(transformers.Qwen3MoeConfig(**SMALL, **EXPERTS, num_experts=4), alike=True),
    "qwen3-next": Family(
        transformers.Qwen3NextConfig(
            **SMALL, **EXPERTS, **DELTA_NET, num_experts=4, shared_expert_intermediate_size=16
        ),
        full=(1, 2),
        free=(0,),
        quick=True,
    ),
    "qwen3.5": Family(
        transformers.Qwen3_5TextConfig(**SMALL, **DELTA_NET), full=(1, 2), free=(0,), alike=True
    ),
    "gpt-oss": Family(
        transformers.GptOssConfig(
            **SMALL | {"num_hidden_layers": 2},
            sliding_window=32,
            layer_types=[SLIDING, FULL],
            num_local_experts=4,
            num_experts_per_tok=2,
        ),
        full=(1,),
        quick=True,
    ),
    "gpt2": Family(transformers.GPT2Config(n_embd=32, n_layer=3, n_head=4, n_positions=2048, vocab_size=257)),
    # The output of its decoder is projected once more.
    "opt": Family(
        transformers.OPTConfig(
            hidden_size=32,
            ffn_dim=32,
            num_hidden_layers=3,
            num_attention_heads=4,
            vocab_size=257,
            max_position_embeddings=2048,
            word_embed_proj_dim=16,
        )
    ),
    "gpt-neox": Family(transformers.GPTNeoXConfig(**MULTI_HEAD), alike=True),
    "gemma2": Family(
        transformers.Gemma2Config(
            **SMALL,
            **WINDOWS,
            attn_logit_softcapping=2.0,
            query_pre_attn_scalar=16,
            final_logit_softcapping=3.0,
        ),
        full=(1,),
    ),
    "gemma3": Family(
        transformers.Gemma3TextConfig(**SMALL, **WINDOWS, final_logit_softcapping=3.0), full=(1,), alike=True
    ),
    # Layers attend to the K and V of earlier ones.
    "gemma3n": Family(
        transformers.Gemma3nTextConfig(
            **SMALL | {"num_hidden_layers": 4},
            sliding_window=32,
            layer_types=[SLIDING, FULL] * 2,
            num_kv_shared_layers=2,
            hidden_size_per_layer_input=4,
            vocab_size_per_layer_input=257,
            laurel_rank=4,
            activation_sparsity_pattern=[0.0] * 4,
        ),
        full=(1, 3),
    ),
    # Full layers have larger heads, and fewer of K and V.
    "gemma4": Family(
        transformers.Gemma4TextConfig(
            **GEMMA4,
            layer_types=[SLIDING, FULL, FULL],
            num_global_key_value_heads=1,
            attention_k_eq_v=True,
            final_logit_softcapping=3.0,
        ),
        full=(1, 2),
        quick=True,
    ),
    "gemma4, shared K and V": Family(
        transformers.Gemma4TextConfig(
            **GEMMA4 | {"num_hidden_layers": 4}, layer_types=[SLIDING, FULL] * 2, num_kv_shared_layers=2
        ),
        full=(1, 3),
    ),
    "phi-3": Family(transformers.Phi3Config(**PLAIN, sliding_window=4096, pad_token_id=0)),
    "granite": Family(
        transformers.GraniteConfig(
            **PLAIN, logits_scaling=4.0, embedding_multiplier=3.0, attention_multiplier=0.3
        ),
        alike=True,
    ),
    "granite hybrid": Family(
        transformers.GraniteMoeHybridConfig(
            **PLAIN,
            **MAMBA,
            num_local_experts=2,
            num_experts_per_tok=1,
            shared_intermediate_size=16,
            layer_types=[LINEAR, FULL, LINEAR],
        ),
        full=(1,),
        free=(0, 2),
        alike=True,
        engine=NO_PREFIX_CACHING,
    ),
    "falcon-h1": Family(
        transformers.FalconH1Config(**SMALL, **MAMBA, mamba_d_ssm=64), engine=NO_PREFIX_CACHING
    ),
    "nemotron-h": Family(
        transformers.NemotronHConfig(
            **SMALL,
            **EXPERTS,
            layers_block_type=["mamba", "moe", "attention", "mlp"],
            mamba_num_heads=8,
            mamba_head_dim=8,
            ssm_state_size=8,
            n_groups=1,
            chunk_size=16,
            n_routed_experts=4,
            moe_shared_expert_intermediate_size=16,
        ),
        full=(2,),
        free=(0, 1, 3),
        engine=NO_PREFIX_CACHING,
    ),
    "jamba": Family(
        transformers.JambaConfig(
            **PLAIN,
            attn_layer_period=2,
            attn_layer_offset=1,
            num_experts=2,
            mamba_d_state=4,
            mamba_dt_rank=4,
            use_mamba_kernels=False,
        ),
        full=(1,),
        free=(0, 2),
        alike=True,
    ),
    "olmo2": Family(transformers.Olmo2Config(**PLAIN), alike=True),
    "olmo3": Family(transformers.Olmo3Config(**PLAIN, **WINDOWS), full=(1,), alike=True),
    "cohere": Family(transformers.CohereConfig(**PLAIN, logit_scale=0.25), alike=True),
    "cohere2": Family(
        transformers.Cohere2Config(**SMALL, **WINDOWS, logit_scale=0.25), full=(1,), alike=True
    ),
    "exaone4": Family(transformers.Exaone4Config(**SMALL, **WINDOWS), full=(1,), alike=True),
    "starcoder2": Family(transformers.Starcoder2Config(**PLAIN), alike=True),
    "nemotron": Family(transformers.NemotronConfig(**SMALL), alike=True),
    "smollm3": Family(transformers.SmolLM3Config(**SMALL, pad_token_id=0), alike=True),
    "glm4": Family(transformers.Glm4Config(**SMALL, pad_token_id=0), alike=True),
    "lfm2": Family(
        transformers.Lfm2Config(**PLAIN, layer_types=["conv", FULL, FULL]), full=(1, 2), free=(0,), alike=True
    ),
    # Models that take images or sound too, as language models.
    "qwen2.5-vl": Family(
        transformers.Qwen2_5_VLConfig(
            text_config={**PLAIN, "rope_parameters": MROPE},
            vision_config={**QWEN_VISION, "out_hidden_size": 32},
        )
    ),
    "qwen3-vl": Family(
        transformers.Qwen3VLConfig(
            text_config={**SMALL, "rope_parameters": MROPE},
            vision_config={**QWEN_VISION, "out_hidden_size": 32, "deepstack_visual_indexes": [0]},
        ),
        alike=True,
    ),
    "gemma3, images": Family(
        transformers.Gemma3Config(
            text_config={**SMALL, **WINDOWS},
            vision_config={**VISION, "image_size": 28, "patch_size": 14},
            mm_tokens_per_image=4,
        ),
        full=(1,),
    ),
    "mistral3": Family(
        transformers.Mistral3Config(
            text_config={**SMALL, "model_type": "mistral"},
            vision_config={**VISION, "model_type": "pixtral", "image_size": 28, "patch_size": 14},
        ),
        alike=True,
    ),
    "internvl": Family(
        transformers.InternVLConfig(
            text_config={**PLAIN, "model_type": "qwen2"},
            vision_config={**VISION, "image_size": [28, 28], "patch_size": [14, 14]},
        ),
        alike=True,
    ),
    "voxtral": Family(
        transformers.VoxtralConfig(text_config={**SMALL, "model_type": "llama"}, audio_config=VISION),
        alike=True,
    ),
    # V is smaller than K; layers with a window have more heads of both, and sinks.
    "mimo v2": Family(
        transformers.MiMoV2FlashConfig(**SMALL, **EXPERTS, **WINDOWS, v_head_dim=6, n_routed_experts=4),
        full=(1,),
    ),
}

# They differ from the above in feed-forward layers, norms or names of weights alone: served, and not in the suite.
MORE = {
    "qwen2": Family(transformers.Qwen2Config(**PLAIN)),
    "qwen2 moe": Family(
        transformers.Qwen2MoeConfig(**PLAIN, **EXPERTS, num_experts=4, shared_expert_intermediate_size=16)
    ),
    "gemma": Family(transformers.GemmaConfig(**SMALL)),
    "ministral 3": Family(transformers.Ministral3Config(**SMALL)),
    "granite moe": Family(transformers.GraniteMoeConfig(**PLAIN, num_local_experts=4, num_experts_per_tok=2)),
    "olmoe": Family(transformers.OlmoeConfig(**PLAIN, num_experts=4, num_experts_per_tok=2)),
    "exaone moe": Family(
        transformers.ExaoneMoeConfig(**SMALL, **EXPERTS, **WINDOWS, num_experts=4), full=(1,)
    ),
    "lfm2 moe": Family(
        transformers.Lfm2MoeConfig(
            **PLAIN, **EXPERTS, num_experts=4, num_dense_layers=1, layer_types=["conv", FULL, FULL]
        ),
        full=(1, 2),
        free=(0,),
    ),
    "glm": Family(transformers.GlmConfig(**SMALL, pad_token_id=0)),
    "glm4 moe": Family(
        transformers.Glm4MoeConfig(
            **SMALL, **EXPERTS, n_routed_experts=4, first_k_dense_replace=1, use_qk_norm=True
        )
    ),
    "ernie 4.5": Family(transformers.Ernie4_5Config(**SMALL)),
    "ernie 4.5 moe": Family(
        transformers.Ernie4_5_MoeConfig(
            **PLAIN,
            moe_intermediate_size=16,
            moe_num_experts=4,
            moe_k=2,
            moe_num_shared_experts=1,
            moe_layer_start_index=1,
        )
    ),
    "hunyuan": Family(transformers.HunYuanDenseV1Config(**SMALL)),
    "hunyuan moe": Family(transformers.HunYuanMoEV1Config(**SMALL, num_experts=4, moe_topk=2)),
    "seed-oss": Family(transformers.SeedOssConfig(**SMALL)),
    "dots1": Family(
        transformers.Dots1Config(
            **SMALL,
            **EXPERTS,
            n_routed_experts=4,
            n_shared_experts=1,
            n_group=1,
            topk_group=1,
            first_k_dense_replace=1,
        )
    ),
    "apertus": Family(transformers.ApertusConfig(**PLAIN)),
    "arcee": Family(transformers.ArceeConfig(**SMALL)),
    "afmoe": Family(
        transformers.AfmoeConfig(**SMALL, **EXPERTS, **WINDOWS, num_experts=4, num_dense_layers=1), full=(1,)
    ),
    "stablelm": Family(transformers.StableLmConfig(**PLAIN)),
}
SERVED = FAMILIES | MORE

# vLLM's CPU attention has heads of 32 channels and more, and those of the tests have 8.
_WIDTHS = ("head_dim", "hidden_size", "n_embd", "word_embed_proj_dim", "v_head_dim")
_FACTOR = 4
_LINEAR = {"linear_key_head_dim": 128, "linear_value_head_dim": 128}
_GEMMA4 = {"global_head_dim": 64}
_MROPE = {"rope_parameters": {**MROPE, "mrope_section": [8, 4, 4]}}
_OTHERS: dict[str, dict[str, Any]] = {
    "qwen3-next": _LINEAR,
    "qwen3.5": _LINEAR,
    "gemma4": _GEMMA4 | {"num_global_key_value_heads": 1},
    "gemma4, shared K and V": _GEMMA4,
    "qwen2.5-vl": _MROPE,
    "qwen3-vl": _MROPE,
    # Convolutions have a multiple of 32 channels: those of the heads and twice those of the states.
    "granite hybrid": {"mamba_n_heads": 32, "mamba_d_state": 16},
    "falcon-h1": {"mamba_d_state": 16},
    # Experts without a gate run on GPUs alone.
    "nemotron-h": {"ssm_state_size": 16, "layers_block_type": ["mamba", "mlp", "attention", "mlp"]},
    # What follows is in the configurations of their checkpoints, and not in transformers' own.
    "afmoe": {"score_func": "sigmoid", "route_norm": True, "n_group": 1, "topk_group": 1},
    "mimo v2": {
        "hybrid_layer_pattern": [1, 0, 1],
        "moe_layer_freq": [0, 1, 1],
        "sliding_window_size": 32,
        "swa_num_attention_heads": 4,
        "swa_num_key_value_heads": 2,
        "swa_head_dim": 32,
        "swa_v_head_dim": 24,
        "add_swa_attention_sink_bias": True,
        "layernorm_epsilon": 1e-5,
    },
    "lfm2": {
        "conv_dim": 128,
        "block_dim": 128,
        "block_ff_dim": 32,
        "block_multiple_of": 32,
        "block_auto_adjust_ff_dim": False,
        "block_ffn_dim_multiplier": 1.0,
    },
}


def served_config(name: str) -> PretrainedConfig:
    """A family's configuration, large enough for vLLM's CPU kernels."""
    config = SERVED[name].config
    facts = config.to_dict()
    text = facts.get("text_config", facts)
    wide = {key: text[key] * _FACTOR for key in _WIDTHS if isinstance(text.get(key), int)}
    text |= wide | _OTHERS.get(name, {})
    if "vision_config" in facts and "out_hidden_size" in facts["vision_config"]:
        facts["vision_config"]["out_hidden_size"] = text["hidden_size"]
    for key in ("architectures", "transformers_version", "per_layer_config"):
        facts.pop(key, None)
    return type(config)(**facts)


# What can't be calibrated, and what the message says.
REFUSED = {
    "deepseek-v3": (
        transformers.DeepseekV3Config(**PLAIN | {"num_key_value_heads": 4}, kv_lora_rank=8),
        "has multi-head latent attention",
    ),
    "t5": (
        transformers.T5Config(d_model=32, d_ff=32, num_layers=1, num_heads=2),
        "is an encoder-decoder model",
    ),
    "bert": (transformers.BertConfig(**MULTI_HEAD), "BertLMHeadModel is an encoder"),
    "mamba": (
        transformers.MambaConfig(hidden_size=32, num_hidden_layers=2),
        "has no attention heads; .* state-space models have none",
    ),
    "granite, mamba layers alone": (
        transformers.GraniteMoeHybridConfig(**PLAIN, **MAMBA, layer_types=[LINEAR] * 3),
        "no layer has attention",
    ),
    "clip": (transformers.CLIPConfig(), "CLIPConfig has a text model inside"),
    "bloom": (
        transformers.BloomConfig(hidden_size=32, n_layer=1, n_head=2),
        "does not call its AttentionInterface",
    ),
    "diffllama": (transformers.DiffLlamaConfig(**SMALL), "attend twice for each token"),
    "jetmoe": (
        transformers.JetMoeConfig(
            hidden_size=32, num_hidden_layers=1, num_key_value_heads=2, kv_channels=8, vocab_size=257
        ),
        "routes each token to experts with query heads of their own",
    ),
    "inkling": (transformers.InklingTextConfig(num_hidden_layers=2), "adds a bias by position to the scores"),
    "mistral": (
        transformers.MistralConfig(**SMALL, sliding_window=8),
        "every layer has a sliding window; there is nothing to calibrate",
    ),
    "llama4": (
        transformers.Llama4TextConfig(
            **SMALL, attention_chunk_size=64, num_local_experts=2, moe_layers=[], no_rope_layers=[1, 0, 1]
        ),
        "layers of the kind chunked_attention attend within chunks",
    ),
    "zamba2": (
        transformers.Zamba2Config(
            **MULTI_HEAD,
            layers_block_type=["mamba", "hybrid", "mamba"],
            num_mem_blocks=1,
            mamba_d_state=8,
            n_mamba_heads=8,
            mamba_headdim=8,
            mamba_ngroups=1,
        ),
        "has no attention module of its own in layer 1",
    ),
}
