"""A small valid threshold table, and the tiny model that it would belong to."""

from pathlib import Path
from typing import Any

from topt_vllm.table.file import dump
from topt_vllm.table.identity import ModelIdentity, identify
from topt_vllm.table.schema import (
    SCHEMA_VERSION,
    Budget,
    KeyStatistics,
    LayerKeys,
    LayerThresholds,
    Producer,
    Provenance,
    Quality,
    Spread,
    TextSource,
    ThresholdTable,
)

LENGTHS = [256, 512, 1024]


def make_identity(**changes: Any) -> ModelIdentity:
    """Three layers, the second with a sliding window; four query heads over two KV heads."""
    facts: dict[str, Any] = {
        "id": "tiny",
        "revision": None,
        "architecture": "LlamaForCausalLM",
        "num_layers": 3,
        "num_query_heads": 4,
        "num_kv_heads": 2,
        "head_dim": 16,
        "sliding_window_layers": [1],
        "fingerprint": "sha256:" + "0" * 64,
    }
    return ModelIdentity(**facts | changes)


def make_table(
    identity: ModelIdentity | None = None,
    ks: tuple[int, ...] = (64, 128),
    lengths: list[int] | None = None,
    dense_layers: tuple[int, ...] = (0,),
) -> ThresholdTable:
    """A table whose θ of (layer, head, length) can be told apart: −layer − head/10 − length index/100 − k/1000."""
    identity = identity or make_identity()
    lengths = lengths or LENGTHS
    return ThresholdTable(
        schema_version=SCHEMA_VERSION,
        producer=Producer(name="topt-vllm", version="0"),
        model=identity,
        calibration=Provenance(
            data=[TextSource(name="play.txt", sha256="ab" * 32)],
            num_samples=2,
            tokens=2 * lengths[-1],
            max_seq_length=lengths[-1],
            seed=0,
            options={"sigma": 0.0, "dtype": "float32"},
            libraries={"torch": "2"},
            date="2026-01-31",
        ),
        lengths=lengths,
        budgets=[_budget(identity, k, lengths, list(dense_layers)) for k in ks],
    )


def make_key_statistics(identity: ModelIdentity) -> KeyStatistics:
    """Those of normal numbers: keys of mean 0 and deviation 1 in every channel."""
    heads, channels = identity.num_kv_heads, identity.head_dim
    return KeyStatistics(
        seed=0,
        layers=[
            LayerKeys(layer=layer, mean=[[0.0] * channels] * heads, scale=[[1.0] * channels] * heads)
            for layer in range(identity.num_layers)
            if layer in identity.full_layers
        ],
    )


def save_flat_table(config: Any, path: Path, theta: float) -> Path:
    """One θ (scaled logits) for all heads of a model's layers that attend, at contexts of 64 to 4096 tokens."""
    identity = identify(config, "tiny")
    table = make_table(identity, ks=(64,), lengths=[64, 4096], dense_layers=())
    heads = identity.num_query_heads
    flat = {"law": [[theta, 0.0]] * heads, "theta": [[theta] * 2] * heads}
    budget = table.budgets[0]
    layers = [layer.model_copy(update=flat) for layer in budget.layers]
    changed = table.model_copy(update={"budgets": [budget.model_copy(update={"layers": layers})]})
    dump(changed, path, force=True)
    return path


def _budget(identity: ModelIdentity, k: int, lengths: list[int], dense_layers: list[int]) -> Budget:
    layers = [
        LayerThresholds(
            layer=layer,
            law=[[0.5, -0.125] for _ in range(identity.num_query_heads)],
            theta=[
                [round(-layer - head / 10 - i / 100 - k / 1000, 4) for i in range(len(lengths))]
                for head in range(identity.num_query_heads)
            ],
        )
        for layer in range(identity.num_layers)
        if layer in identity.full_layers
    ]
    quality = Quality(
        kept_over_k=Spread(p5=0.5, p50=1.0, p95=2.0),
        v_rows_read=0.25,
        dropped_mass=0.03,
        tokens=lengths[-1],
        rows=16,
        loss_pct=0.5,
        kl=0.01,
        agreement=0.95,
        layer_rows_read=[0.25] * identity.num_layers,
    )
    return Budget(k=k, dense_layers=dense_layers, quality=quality, layers=layers)
