#!/usr/bin/env python3
"""Writes tables that the code and measurements know better than people: what TOPTHETA refuses, in docs/features.md;
models with a table and the families that scripts/serve_families.py has served, in docs/models.md.

Usage: scripts/docs_tables.py [--write | --check]    without either, the tables are printed
"""

import argparse
import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any
from unittest.mock import patch

import torch
from vllm.platforms import current_platform
from vllm.platforms.interface import DeviceCapability
from vllm.plugins import load_general_plugins
from vllm.v1.attention.backends.registry import AttentionBackendEnum
from vllm.v1.attention.selector import AttentionSelectorConfig

from topt_vllm.backend import compat
from topt_vllm.table.file import load

ROOT = Path(__file__).parent.parent
DOCS = ROOT / "docs"
FEATURES, MODELS, OUTCOMES = DOCS / "features.md", DOCS / "models.md", DOCS / "model_families.json"
HOPPER = DeviceCapability(9, 0)

PLAIN: dict[str, Any] = {
    "head_size": 64,
    "dtype": torch.bfloat16,
    "kv_cache_dtype": "auto",
    "block_size": None,
    "use_mla": False,
    "has_sink": False,
    "use_sparse": False,
    "use_mm_prefix": False,
    "use_per_head_quant_scales": False,
    "attn_type": "decoder",
}
ASKED: dict[str, dict[str, Any]] = {
    "plain decoder layers": {},
    "multi-head latent attention (MLA)": {"use_mla": True},
    "attention sinks": {"has_sink": True},
    "cross attention": {"attn_type": "encoder_decoder"},
    "encoder layers": {"attn_type": "encoder_only"},
    "attention that is not causal": {"use_non_causal": True},
    "full attention among multimodal tokens": {"use_mm_prefix": True},
    "fp8 scales per head": {"use_per_head_quant_scales": True},
    "decode context parallelism": {"use_dcp": True},
    "prefill context parallelism": {"use_pcp": True},
    "batch invariance": {"use_batch_invariant": True},
}


def on_cpu(options: dict[str, Any]) -> str:
    """What the CPU platform answers when such a layer is made."""
    config = AttentionSelectorConfig(**options)
    try:
        chosen = current_platform.get_attn_backend_cls(AttentionBackendEnum[compat.BACKEND_NAME], config)
    except ValueError as refusal:
        if "TOPTHETA can't serve this model here" not in str(refusal):
            raise
        return "refused"
    return "yes" if chosen == compat.BACKEND_PATH else "vLLM's own backend"


def on_gpu(options: dict[str, Any]) -> str:
    """What the class for CUDA answers."""
    from vllm.v1.attention.backends import flash_attn

    from topt_vllm.backend.hosts.flash import FlashTopThetaBackend

    # As where FlashAttention 3 is installed, whatever machine this runs on.
    with patch.multiple(
        flash_attn,
        create=True,
        is_flash_attn_varlen_func_available=lambda: True,
        flash_attn_supports_sinks=lambda: True,
    ):
        reasons = FlashTopThetaBackend.validate_configuration(**options, device_capability=HOPPER)
    return "refused" if reasons else "yes"


def layers() -> Iterator[str]:
    """Kinds of layers and options, and what becomes of them."""
    load_general_plugins()
    yield "| layers and options | on CPU | on CUDA |"
    yield "|---|---|---|"
    for name, options in ASKED.items():
        yield f"| {name} | {on_cpu(PLAIN | options)} | {on_gpu(PLAIN | options)} |"


def models() -> Iterator[str]:
    """Shipped tables with the quality that each states of its own held-back text."""
    yield "| model | layers (windowed) | query / KV heads, D | budget | V rows read | Δ perplexity |"
    yield "|---|---|---|---|---|---|"
    for path in sorted((ROOT / "configs").glob("*.yaml")):
        table = load(path)
        model = table.model
        shape = f"{model.num_layers} ({len(model.sliding_window_layers)})"
        heads = f"{model.num_query_heads} / {model.num_kv_heads}, {model.head_dim}"
        for budget in table.budgets:
            quality = budget.quality
            if quality is not None:
                key = f"`{budget.key}`" if budget.k is None else f"k={budget.k}"
                read, loss = f"{quality.v_rows_read:.1%}", f"{quality.loss_pct:+.2f} %"
                yield f"| {model.id} | {shape} | {heads} | {key} | {read.replace('%', ' %')} | {loss} |"


def _outcomes() -> dict[str, Any]:
    found: dict[str, Any] = json.loads(OUTCOMES.read_text(encoding="utf-8"))
    return found


def families() -> Iterator[str]:
    """Families that were served, and what came of it."""
    columns = ("calibrate", "evaluate", "stock", "dense", "sparse", "vllm")
    yield "| family | architecture | `calibrate` | `evaluate` | stock vLLM | θ = −inf | its table | vLLM |"
    yield "|---|---|---|---|---|---|---|---|"
    for name, found in _outcomes()["families"].items():
        # What fails in stock vLLM fails behind it, and is said once.
        cells = [
            "–" if found[column] == found["stock"] != "yes" and column != "stock" else found[column]
            for column in columns
        ]
        yield f"| {name} | {found['architecture']} | {' | '.join(cells)} |"


def refused() -> Iterator[str]:
    """Families that can't be calibrated, and what the command says."""
    yield "| family | `calibrate` says |"
    yield "|---|---|"
    for name, words in _outcomes()["refused"].items():
        yield f"| {name} | {words} |"


FILES = {
    FEATURES: {"layers": layers},
    MODELS: {"models": models, "families": families, "refused": refused},
}


def rendered(path: Path) -> str:
    """A file with its generated tables as they should be."""
    text = path.read_text(encoding="utf-8")
    for name, make in FILES[path].items():
        begin, end = f"<!-- generated: {name} -->\n", "<!-- end -->"
        before, found, rest = text.partition(begin)
        if not found:
            raise SystemExit(f"{path.name} has no line {begin!r}")
        text = before + begin + "\n".join(make()) + "\n" + end + rest.partition(end)[2]
    return text


def main() -> None:
    """Prints the tables, writes them into their files, or fails where those have others."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").partition("\n\n")[0])
    parser.add_argument("--write", action="store_true", help="write them into their files")
    parser.add_argument("--check", action="store_true", help="fail where a file has others")
    args = parser.parse_args()
    for path, tables in FILES.items():
        if args.write:
            path.write_text(rendered(path), encoding="utf-8")
        elif args.check:
            if rendered(path) != path.read_text(encoding="utf-8"):
                raise SystemExit(f"{path.name} is out of date; run scripts/docs_tables.py --write")
        else:
            for make in tables.values():
                print("\n".join([*make(), ""]))


if __name__ == "__main__":
    main()
