"""The rules of a threshold table that types can't say."""

import math
from collections.abc import Callable
from itertools import pairwise
from pathlib import Path

from topt_vllm.table_schema import ThresholdTable, ThresholdTableError


def check(table: ThresholdTable, path: Path) -> None:
    """What types can't say: order, counts and finiteness."""

    def require(condition: bool, key: str, problem: str) -> None:
        if not condition:
            raise ThresholdTableError(f"{path}: {key}: {problem}")

    lengths, model = table.lengths, table.model
    require(
        lengths[0] > 0 and all(a < b for a, b in pairwise(lengths)),
        "lengths",
        f"must be positive and strictly ascending, got {lengths}",
    )
    _check_names(table, require)
    expected = [layer for layer in range(model.num_layers) if layer not in model.sliding_window_layers]
    for b, budget in enumerate(table.budgets):
        key = f"budgets[{b}]"
        unknown = sorted(set(budget.dense_layers) - set(expected))
        require(
            not unknown, f"{key}.dense_layers", f"layers {unknown} are not among the full-attention layers"
        )
        found = [entry.layer for entry in budget.layers]
        require(found == expected, f"{key}.layers", f"layers {expected} expected in this order, got {found}")
        for position, entry in enumerate(budget.layers):
            for name, rows, width in (("law", entry.law, 2), ("theta", entry.theta, len(lengths))):
                where = f"{key}.layers[{position}].{name}"
                require(
                    len(rows) == model.num_query_heads,
                    where,
                    f"{model.num_query_heads} query heads expected, got {len(rows)}",
                )
                for head, row in enumerate(rows):
                    require(
                        len(row) == width, f"{where}[{head}]", f"{width} numbers expected, got {len(row)}"
                    )
                    require(
                        all(math.isfinite(number) for number in row),
                        f"{where}[{head}]",
                        f"must be finite, got {row}",
                    )


def _check_names(table: ThresholdTable, require: Callable[[bool, str, str], None]) -> None:
    """Every budget can be chosen by exactly one k or name, and the last one is the default that was meant."""
    for b, budget in enumerate(table.budgets):
        require(
            (budget.k is None) != (budget.name is None) and budget.name != "",
            f"budgets[{b}]",
            f"either k or name is needed, got k {budget.k} and name {budget.name!r}",
        )
    ks = [budget.k for budget in table.budgets if budget.k is not None]
    require(all(a < b for a, b in pairwise(ks)), "budgets", f"k must be strictly ascending, got {ks}")
    names = [budget.key for budget in table.budgets[len(ks) :]]
    require(
        all(isinstance(name, str) for name in names),
        "budgets",
        f"those with a k come first, got {[budget.key for budget in table.budgets]}",
    )
    require(len(set(names)) == len(names), "budgets", f"names must differ, got {names}")
