"""Engines led through scenarios (scenario_engine.py): each configuration runs once per test session."""

from functools import cache
from pathlib import Path
from typing import Any

import engine_forks
from engine_runs import once

Scenarios = dict[str, dict[str, Any]]

STOCK: dict[str, Any] = {"attention_backend": "CPU_ATTN"}


def toptheta(**settings: Any) -> dict[str, Any]:
    """Engine arguments that choose TOPTHETA with these settings."""
    return {"attention_backend": "TOPTHETA", "additional_config": {"toptheta": settings}}


DENSE = toptheta(thresholds="none")
# A budget of the shipped tables without dense layers: whatever runs dense has another reason.
SPARSE = toptheta(budget="loss-1%")
SPARSE_BY_HEAD = toptheta(budget="loss-1%", group_keep="head")


def run(
    model: Path,
    backend: dict[str, Any],
    engine: dict[str, Any],
    scenarios: Scenarios,
    cpus: str = "nobind",
) -> dict[str, Any]:
    """What came of the scenarios, by name.

    Args:
        model: Folder.
        backend: Engine arguments that choose the attention backend.
        engine: Other engine arguments.
        scenarios: As ``scenario_engine.py`` reads them.
        cpus: Cores of each rank, as VLLM_CPU_OMP_THREADS_BIND has it. vLLM itself would leave one core idle.
    """
    # float32, so that rounding moves no token but where logits are equal to six digits. Other dtypes of the model
    # have their own tests.
    common = {"model": str(model), "dtype": "float32", "enforce_eager": True, "logprobs_mode": "raw_logits"}
    request = {
        "environment": {"VLLM_CPU_OMP_THREADS_BIND": cpus},
        "engine": common | backend | engine,
        "scenarios": scenarios,
    }
    return once(
        request, lambda: engine_forks.ask("scenario_engine", request, separate_core=False, timeout=1200)
    )


@cache
def tokens_of(model: Path, text: Path) -> list[int]:
    """A text's first tokens."""
    from transformers import AutoTokenizer

    tokenizer = AutoTokenizer.from_pretrained(model)
    ids: list[int] = tokenizer(text.read_text(), truncation=True, max_length=8000)["input_ids"]
    return ids


def sparse_rows(counted: dict[str, float], allowed: list[str]) -> float:
    """Decode rows that skipped; no row may be dense for a reason that is not allowed."""
    dense = {name.partition(":")[2]: rows for name, rows in counted.items() if name.startswith("dense_rows:")}
    assert not {reason: rows for reason, rows in dense.items() if rows and reason not in allowed}
    return counted["toptheta:decode_rows_total"] - sum(dense.values())
