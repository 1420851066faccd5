"""What the engines of ``topt-vllm bench engine`` are, and what is made of their answers."""

from collections import Counter
from dataclasses import dataclass, field
from statistics import median
from typing import Any


@dataclass(frozen=True)
class Contender:
    """One engine of the comparison.

    Attributes:
        name: For people.
        toptheta: The plugin's settings; None for vLLM's own backend.
        results: What its engines said, one entry per round.
    """

    name: str
    toptheta: dict[str, Any] | None
    results: list[dict[str, Any]] = field(default_factory=list)

    @property
    def steps(self) -> list[float]:
        """Milliseconds of a step, in every turn of every round."""
        return [ms for result in self.results for ms in result["ms_per_step"]]

    def record(self, stock: float, batch: int) -> dict[str, Any]:
        """All of it, beside the platform's milliseconds a step."""
        ms = median(self.steps)
        return {
            "name": self.name,
            "backend": self.results[-1]["backend"],
            "toptheta": self.toptheta,
            "ms_per_step": ms,
            "ms_per_step_turns": self.steps,
            "tokens_per_second": 1e3 * batch / ms,
            "ratio_platform": stock / ms,
            "prefill_seconds": median(result["prefill_seconds"] for result in self.results),
            "start_seconds": median(result["start_seconds"] for result in self.results),
            **_counted(self.results),
        }


def _counted(results: list[dict[str, Any]]) -> dict[str, Any]:
    """Shares of what the decode steps counted; V rows read are None without TOPTHETA."""
    totals: Counter[str] = Counter()
    for result in results:
        totals.update(result["totals"] or {})
    if not totals["toptheta:v_rows_total"]:
        return {"v_rows_read": None, "dense_rows": {}}
    rows = totals["toptheta:decode_rows_total"]
    dense = {
        name.removeprefix("dense_rows:"): amount / rows
        for name, amount in totals.items()
        if name.startswith("dense_rows:") and amount
    }
    return {
        "v_rows_read": totals["toptheta:v_rows_read_total"] / totals["toptheta:v_rows_total"],
        "dense_rows": dense,
    }
