"""The plugin's metrics in Prometheus' terms; nothing else here knows prometheus_client.

Its multiprocess mode takes them from the worker to the API server's /metrics: set PROMETHEUS_MULTIPROC_DIR to an
empty folder before the server starts. Each process has counter files of its own there, which outlive it, so a
worker that is started again goes on where the sum stood.
"""

import os
from collections import Counter
from collections.abc import Mapping
from contextlib import suppress
from dataclasses import dataclass, field
from pathlib import Path

import prometheus_client
from prometheus_client import REGISTRY, CollectorRegistry, multiprocess

from topt_vllm.attention.common import Stat

PREFIX = "toptheta:"

COUNTERS = {
    Stat.ELEMENTS: (f"{PREFIX}attention_elements", "(query head, key) pairs in context of decoded rows"),
    Stat.KEPT_ELEMENTS: (f"{PREFIX}attention_elements_kept", "Pairs that a query head's own rule kept"),
    Stat.V_ROWS: (f"{PREFIX}v_rows", "(KV head, key) pairs in context of decoded rows"),
    Stat.V_ROWS_READ: (f"{PREFIX}v_rows_read", "V rows read: pairs that some head of the GQA group kept"),
    Stat.K_ROWS_READ: (f"{PREFIX}k_rows_read", "(KV head, key) pairs whose K was read in full"),
    Stat.CANDIDATES: (
        f"{PREFIX}k_candidates",
        "(KV head, key) pairs that a K screen let through; all without one",
    ),
}
DROPPED_SUM, DROPPED_COUNT = f"{PREFIX}dropped_mass_sum", f"{PREFIX}dropped_mass_count"

TABLE_LABELS = ("name", "sha256", "budget", "model", "fingerprint")


@dataclass(frozen=True)
class Amounts:
    """Sums since a process started.

    Attributes:
        sums: By :class:`~topt_vllm.attention.common.Stat`.
        head_rows: Decoded rows times query heads, which dropped mass is counted over.
        dense_rows: Decoded rows that read every V row, by reason.
        by_layer: Sums of single layers, by label.
    """

    sums: list[float]
    head_rows: float
    dense_rows: Counter[str] = field(default_factory=Counter)
    by_layer: dict[str, list[float]] = field(default_factory=dict)


class _Sums(prometheus_client.Summary):
    """A summary that takes many observations at once, of which only sum and number are known."""

    def add(self, amount: float, observations: float) -> None:
        """Adds observations that sum to ``amount``."""
        self._sum.inc(amount)
        self._count.inc(observations)


class Exporter:
    """Turns sums into the increments that Prometheus' counters take."""

    def __init__(self, registry: CollectorRegistry = REGISTRY) -> None:
        _forget_gauges_of_dead_processes()
        self._counters = {
            stat: prometheus_client.Counter(name, text, registry=registry)
            for stat, (name, text) in COUNTERS.items()
        }
        self._dropped = _Sums(
            f"{PREFIX}dropped_mass",
            "Attention probability that a query head of a decoded row didn't multiply with V",
            registry=registry,
        )
        self._rows = prometheus_client.Counter(
            f"{PREFIX}decode_rows",
            "Decoded query rows, summed over layers; dense ones read every V row for a reason",
            ["mode", "reason"],
            registry=registry,
        )
        self._table = prometheus_client.Gauge(
            f"{PREFIX}table_info",
            "1 for the threshold table in force",
            TABLE_LABELS,
            multiprocess_mode="livemax",
            registry=registry,
        )
        self._by_layer = {
            stat: prometheus_client.Counter(
                f"{PREFIX}layer_{name}",
                f"As {PREFIX}{name}_total, of each layer that decodes with TOPTHETA",
                ["layer"],
                registry=registry,
            )
            for stat, name in ((Stat.V_ROWS, "v_rows"), (Stat.V_ROWS_READ, "v_rows_read"))
        }
        self._served: dict[str, str] | None = None
        self._exported = Amounts([0.0] * len(Stat), 0.0)
        self._sparse_rows = 0.0

    def set_table(self, labels: Mapping[str, str]) -> None:
        """Exports the table's identity; labels as ``TABLE_LABELS``."""
        if self._served is not None and self._served != labels:
            self._table.labels(**self._served).set(0)
        self._served = dict(labels)
        self._table.labels(**labels).set(1)

    def export(self, now: Amounts) -> None:
        """Carries what was added since the last call to prometheus_client."""
        before, self._exported = self._exported, now
        new = [max(0.0, a - b) for a, b in zip(now.sums, before.sums, strict=True)]
        for stat, counter in self._counters.items():
            counter.inc(new[stat])
        self._dropped.add(new[Stat.DROPPED_MASS], max(0.0, now.head_rows - before.head_rows))
        dense = now.dense_rows - before.dense_rows
        for reason, rows in dense.items():
            self._rows.labels("dense", reason).inc(rows)
        # The parts are read one after the other while layers add to them, so a step may be half in.
        sparse = max(self._sparse_rows, now.sums[Stat.ROWS] - now.dense_rows.total())
        self._rows.labels("sparse", "").inc(sparse - self._sparse_rows)
        self._sparse_rows = sparse
        for layer, sums in now.by_layer.items():
            if not sums[Stat.V_ROWS]:  # vLLM's kernel serves it
                continue
            old = before.by_layer.get(layer, [0.0] * len(Stat))
            for stat, counter in self._by_layer.items():
                counter.labels(layer).inc(max(0.0, sums[stat] - old[stat]))


def _forget_gauges_of_dead_processes() -> None:
    """Counters of a worker that died stay in the sum; the table that it served doesn't."""
    folder = os.environ.get("PROMETHEUS_MULTIPROC_DIR")
    if not folder:
        return
    for path in Path(folder).glob("gauge_live*_*.db"):
        pid = path.stem.rpartition("_")[2]
        if pid.isdecimal() and not Path("/proc", pid).exists():
            # Ranks start side by side, and another one may be quicker.
            with suppress(FileNotFoundError):
                multiprocess.mark_process_dead(int(pid), folder)
