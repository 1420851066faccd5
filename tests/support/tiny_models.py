"""Tiny random models and texts on disk: whatever a test needs of transformers without a download."""

import random
from pathlib import Path
from typing import Any

import torch
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, processors
from transformers import Gemma2Config, Gemma3TextConfig, LlamaConfig, PreTrainedTokenizerFast, set_seed

from topt_vllm.replay.model import auto_class

SMALL = {
    "hidden_size": 32,
    "intermediate_size": 32,
    "num_hidden_layers": 3,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "head_dim": 8,
    "vocab_size": 257,
    "max_position_embeddings": 2048,
}
WINDOWS = {"sliding_window": 32, "layer_types": ["sliding_attention", "full_attention", "sliding_attention"]}
# Of each kind of attention that scores depend on.
KINDS = {
    "llama": LlamaConfig(**SMALL),
    "gemma2, softcap": Gemma2Config(**SMALL, **WINDOWS, attn_logit_softcapping=2.0, query_pre_attn_scalar=16),
    "gemma3, windows": Gemma3TextConfig(**SMALL, **WINDOWS),
}


def byte_tokenizer(add_bos: bool = False) -> PreTrainedTokenizerFast:
    """One token per byte; token 256 is BOS, put before a text with ``add_bos``."""
    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    vocabulary = {symbol: i for i, symbol in enumerate(alphabet)} | {"<s>": 256}
    tokenizer = Tokenizer(models.BPE(vocab=vocabulary, merges=[]))
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)
    tokenizer.decoder = decoders.ByteLevel()
    if add_bos:
        tokenizer.post_processor = processors.TemplateProcessing(
            single="<s> $A", special_tokens=[("<s>", 256)]
        )
    return PreTrainedTokenizerFast(tokenizer_object=tokenizer, bos_token="<s>")


def save_model(folder: Path, config: Any) -> Path:
    """A model with random weights, loud enough for its scores to differ, and its tokenizer."""
    set_seed(0)
    model = auto_class(config).from_config(config)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if any(part in name for part in ("q_proj", "k_proj", "c_attn")):
                parameter.mul_(20)
            elif "sinks" in name:
                parameter.normal_(std=3)
    model.save_pretrained(folder)
    byte_tokenizer().save_pretrained(folder)
    return folder


def save_text(path: Path, characters: int) -> Path:
    """Random words."""
    source = random.Random(0)
    path.write_text("".join(source.choices("abcdefgh ", k=characters)), encoding="utf-8")
    return path
