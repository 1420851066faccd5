"""Scores of tasks beside dense attention's, and their table for people."""

import math
from typing import Any

import torch

from topt_vllm.evaluation.options import NO_SCREEN
from topt_vllm.evaluation.records import known, or_nan, target_of

# Share of exact answers by dense attention from which a task counts by them.
_ABLE = 0.3
_MEASURES = {"exact": "exact", "retrieval": "retrieved", "margin": "margin"}


def scores(answers: list[dict[str, Any]]) -> dict[str, Any]:
    """What a record says about a task: means, dense attention's, and the paired differences.

    Where dense attention hardly ever answers exactly, exact answers under a rule are chance; then margins are
    compared.
    """
    found: dict[str, Any] = {"cases": len(answers)}
    for name, measure in _MEASURES.items():
        ours, dense = (
            torch.tensor([float(answer[f"{measure}{suffix}"]) for answer in answers], dtype=torch.float64)
            for suffix in ("", "_dense")
        )
        difference = ours - dense
        error = difference.std() / math.sqrt(len(answers)) if len(answers) > 1 else torch.tensor(math.nan)
        values = {"": ours.mean(), "_dense": dense.mean(), "_difference": difference.mean()}
        values["_difference_se"] = error
        found |= {f"{name}{suffix}": known(value.item()) for suffix, value in values.items()}
    return found | {"judged_by": "exact" if found["exact_dense"] >= _ABLE else "margin"}


def summary(records: list[dict[str, Any]]) -> str:
    """For each rule, target and screen a table of tasks by length; empty without tasks."""
    tables: dict[str, dict[str, dict[int, str]]] = {}
    for record in records:
        if "task" in record:
            rows = tables.setdefault(_title(record), {})
            rows.setdefault(record["task"], {})[record["context"]] = _cell(record)
    lengths = sorted({record["context"] for record in records if "task" in record})
    lines = []
    for title, rows in tables.items():
        lines += ["", title, f"{'':<16}" + "".join(f"{f'{length} tokens':<28}" for length in lengths)]
        lines += [
            f"{task:<16}" + "".join(f"{cells[length]:<28}" for length in lengths)
            for task, cells in rows.items()
        ]
    note = (
        f"dense → rule: exact answers; where dense attention gives fewer than {_ABLE:.0%}, the right answer's lead "
        "over the likeliest wrong one (nats; ± of the difference)"
    )
    return "\n".join(line.rstrip() for line in (*lines, "", note)) if lines else ""


def _title(record: dict[str, Any]) -> str:
    screen = f", K screen {record['k_screen']}" if record["k_screen"] != NO_SCREEN else ""
    return f"{record['rule']} at {target_of(record)}{screen}"


def _cell(record: dict[str, Any]) -> str:
    if record["judged_by"] == "exact":
        return f"exact {record['exact_dense']:.0%} → {record['exact']:.0%}"
    error = or_nan(record["margin_difference_se"])
    return f"margin {record['margin_dense']:+.2f} → {record['margin']:+.2f} (±{error:.2f})"
