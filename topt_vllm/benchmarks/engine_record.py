"""What the engines of ``topt-vllm bench engine`` are, and what is made of their answers."""

import statistics
from dataclasses import dataclass, field
from typing import Any


@dataclass(frozen=True)
class Contender:
    """One engine of the comparison.

    Attributes:
        name: For people.
        toptheta: The plugin's settings; None for vLLM's own backend.
    """

    name: str
    toptheta: dict[str, Any] | None


@dataclass
class EngineTimes:
    """What one contender's engines said, over all rounds."""

    backend: str = ""
    steps: list[float] = field(default_factory=list)
    prefills: list[float] = field(default_factory=list)
    starts: list[float] = field(default_factory=list)
    totals: dict[str, float] | None = None

    def add(self, result: dict[str, Any]) -> None:
        """Includes one engine's result."""
        self.backend = result["backend"]
        self.steps += result["ms_per_step"]
        self.prefills.append(result["prefill_seconds"])
        self.starts.append(result["start_seconds"])
        if result["totals"] is not None:
            known = self.totals or {}
            self.totals = {name: known.get(name, 0.0) + amount for name, amount in result["totals"].items()}

    def record(self, contender: Contender, stock: float, batch: int) -> dict[str, Any]:
        """All of it, beside the platform's milliseconds a step."""
        ms = statistics.median(self.steps)
        return {
            "name": contender.name,
            "backend": self.backend,
            "toptheta": contender.toptheta,
            "ms_per_step": ms,
            "ms_per_step_turns": self.steps,
            "tokens_per_second": 1e3 * batch / ms,
            "ratio_platform": stock / ms,
            "prefill_seconds": statistics.median(self.prefills),
            "start_seconds": statistics.median(self.starts),
            **_counted(self.totals),
        }


def _counted(totals: dict[str, float] | None) -> dict[str, Any]:
    """Shares of what the decode steps counted; V rows read are None without TOPTHETA."""
    if not totals or not totals["toptheta:v_rows_total"]:
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
