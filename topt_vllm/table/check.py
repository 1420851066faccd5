"""The rules of a threshold table that types can't say."""

import math
import reprlib
from collections.abc import Iterator
from itertools import pairwise
from pathlib import Path
from typing import Any

from topt_vllm.attention.common import LONGEST_CONTEXT
from topt_vllm.table.schema import (
    Budget,
    KeyStatistics,
    LayerThresholds,
    ThresholdTable,
    ThresholdTableError,
)

# Thresholds are float32 where they are used.
_MAX_THETA = 3.4e38
# What is divided by: smaller ones have no inverse in float32, or are 0 there.
_MIN_SCALE = 2.0**-126
_MAX_LAYERS = 10_000

_SHORT = reprlib.Repr()
_SHORT.maxlevel, _SHORT.maxlist, _SHORT.maxstring = 2, 12, 80

# Key path and what is wrong there.
_Problems = Iterator[tuple[str, str]]


def clipped(value: Any) -> str:
    """``repr`` of a value from a table, short enough for a message whatever the file holds."""
    return _SHORT.repr(value)[:400]


def check(table: ThresholdTable, path: Path) -> None:
    """What types can't say: order, counts and finiteness.

    Raises:
        ThresholdTableError: The first rule that is broken.
    """
    # Lazy, so what a rule presupposes was checked by those before it.
    for key, problem in _problems(table):
        raise ThresholdTableError(f"{path}: {key}: {problem}")


def _problems(table: ThresholdTable) -> _Problems:
    lengths, model = table.lengths, table.model
    if lengths[0] <= 0 or not _ascending(lengths):
        yield "lengths", f"must be positive and strictly ascending, got {clipped(lengths)}"
    if lengths[-1] > LONGEST_CONTEXT:
        yield "lengths", f"must be at most {LONGEST_CONTEXT}, got {lengths[-1]}"
    if model.num_layers > _MAX_LAYERS:
        yield "model.num_layers", f"must be at most {_MAX_LAYERS}, got {model.num_layers}"
    for name in ("sliding_window_layers", "attention_free_layers"):
        layers = getattr(model, name)
        if not _ascending(layers) or not set(layers) <= set(range(model.num_layers)):
            problem = f"must be ascending and among {model.num_layers} layers, got {clipped(layers)}"
            yield f"model.{name}", problem
    both = sorted({*model.sliding_window_layers} & {*model.attention_free_layers})
    if both:
        yield "model.attention_free_layers", f"layers {clipped(both)} have a sliding window, so they attend"
    if not model.full_layers:
        yield "model", f"one of {model.num_layers} layers must have full attention, or nothing has thresholds"
    for name, value in table.calibration.options.items():
        if isinstance(value, float) and not math.isfinite(value):
            yield f"calibration.options.{name[:80]}", f"must be finite, got {value}"
    yield from _names(table)
    expected = model.full_layers
    for b, budget in enumerate(table.budgets):
        yield from _budget(budget, f"budgets[{b}]", expected, model.num_query_heads, len(lengths))
        for name in ("layer_rows_read", "layer_candidates"):
            shares = getattr(budget.quality, name, None)
            if shares is not None and len(shares) != model.num_layers:
                problem = f"{model.num_layers} layers expected, got {clipped(shares)}"
                yield f"budgets[{b}].quality.{name}", problem
    if table.key_statistics is not None:
        yield from _keys(table.key_statistics, expected, model.num_kv_heads, model.head_dim)


def _ascending(numbers: list[int]) -> bool:
    return all(a < b for a, b in pairwise(numbers))


def _names(table: ThresholdTable) -> _Problems:
    """Every budget can be chosen by exactly one k or name, and the last one is the default that was meant."""
    for b, budget in enumerate(table.budgets):
        if (budget.k is None) == (budget.name is None) or budget.name == "":
            got = f"k {budget.k} and name {clipped(budget.name)}"
            yield f"budgets[{b}]", f"either k or name is needed, got {got}"
        if budget.name is not None and not (len(budget.name) <= 80 and budget.name.isprintable()):
            problem = f"up to 80 printable characters expected, got {clipped(budget.name)}"
            yield f"budgets[{b}].name", problem
        if budget.name is not None and budget.name.isdigit():
            # Settings and options take it for a k.
            yield f"budgets[{b}].name", f"a number is no name, got {clipped(budget.name)}"
    ks = [budget.k for budget in table.budgets if budget.k is not None]
    if not _ascending(ks):
        yield "budgets", f"k must be strictly ascending, got {clipped(ks)}"
    names = [budget.key for budget in table.budgets[len(ks) :]]
    if not all(isinstance(name, str) for name in names):
        yield "budgets", f"those with a k come first, got {clipped([budget.key for budget in table.budgets])}"
    if len(set(names)) != len(names):
        yield "budgets", f"names must differ, got {clipped(names)}"


def _budget(budget: Budget, key: str, expected: list[int], num_heads: int, num_lengths: int) -> _Problems:
    unknown = sorted(set(budget.dense_layers) - set(expected))
    if unknown:
        yield f"{key}.dense_layers", f"layers {clipped(unknown)} are not among the full-attention layers"
    if len(set(budget.dense_layers)) != len(budget.dense_layers):
        yield f"{key}.dense_layers", f"layers must differ, got {clipped(budget.dense_layers)}"
    found = [entry.layer for entry in budget.layers]
    if found != expected:
        problem = f"layers {clipped(expected)} expected in this order, got {clipped(found)}"
        yield f"{key}.layers", problem
    for position, entry in enumerate(budget.layers):
        yield from _layer(entry, f"{key}.layers[{position}]", num_heads, num_lengths)


def _keys(statistics: KeyStatistics, expected: list[int], num_kv_heads: int, head_dim: int) -> _Problems:
    found = [entry.layer for entry in statistics.layers]
    if found != expected:
        problem = f"layers {clipped(expected)} expected in this order, got {clipped(found)}"
        yield "key_statistics.layers", problem
    for position, entry in enumerate(statistics.layers):
        for name, rows in (("mean", entry.mean), ("scale", entry.scale)):
            key = f"key_statistics.layers[{position}].{name}"
            if [len(row) for row in rows] != [head_dim] * num_kv_heads:
                problem = f"{num_kv_heads} KV heads of {head_dim} numbers expected, got {clipped(rows)}"
                yield key, problem
            least = _MIN_SCALE if name == "scale" else -_MAX_THETA
            if not all(least < number < _MAX_THETA for row in rows for number in row):
                problem = "must be finite" + (" and above 0 in float32" if name == "scale" else "")
                yield key, f"{problem}, got {clipped(rows)}"


def _layer(entry: LayerThresholds, key: str, num_heads: int, num_lengths: int) -> _Problems:
    if entry.k is not None and (len(entry.k) != num_heads or min(entry.k) <= 0):
        yield f"{key}.k", f"{num_heads} positive numbers expected, got {clipped(entry.k)}"
    for name, rows, width in (("law", entry.law, 2), ("theta", entry.theta, num_lengths)):
        if len(rows) != num_heads:
            yield f"{key}.{name}", f"{num_heads} query heads expected, got {len(rows)}"
        for head, row in enumerate(rows):
            if len(row) != width:
                yield f"{key}.{name}[{head}]", f"{width} numbers expected, got {len(row)}"
            if not all(-_MAX_THETA < number < _MAX_THETA for number in row):
                yield f"{key}.{name}[{head}]", f"must be finite, got {clipped(row)}"
