"""Counters of a worker: what was read, what was dropped, what ran dense and why.

Layers add to plain tensors; a thread carries the sums to Prometheus once a second and to the log every ten. Under
tensor parallelism each rank counts its own query heads, its part of a KV head that several ranks hold, and only the
first rank counts rows: sums over the ranks are those of one rank alone.
"""

import atexit
import logging
import threading
from collections import Counter
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from functools import cache

import torch
from prometheus_client import REGISTRY, CollectorRegistry

from topt_vllm.attention.common import Stat
from topt_vllm.backend.exporter import COUNTERS, DROPPED_COUNT, DROPPED_SUM, Amounts, Exporter

logger = logging.getLogger("vllm.topt_vllm")

_EXPORT_SECONDS = 1.0
_LOG_EVERY = 10  # exports


@dataclass(frozen=True)
class LayerAccumulators:
    """What one layer of this rank adds up.

    Attributes:
        statistics: float64 [8] on the host, indexed by :class:`~topt_vllm.attention.common.Stat`.
        num_heads: Query heads of the layer on this rank.
        kv_replicas: Ranks that hold each of its KV heads.
        label: Its name in the metrics by layer.
    """

    statistics: torch.Tensor
    num_heads: int
    kv_replicas: float = 1.0
    label: str = ""


class Recorder:
    """All counters of one process."""

    def __init__(self, registry: CollectorRegistry = REGISTRY) -> None:
        self._layers: list[LayerAccumulators] = []
        self._fetches: list[Callable[[], None]] = []
        self._platform = [0.0] * len(Stat)
        self._platform_rows: Counter[str] = Counter()
        self._platform_heads = 0.0
        self._dense_rows: Counter[str] = Counter()
        self._rank, self._ranks = 0, 1
        self._per_layer = self._screened = False
        self._exporter = Exporter(registry)
        self._logged = self.amounts()
        self._stopped = threading.Event()
        self._thread = threading.Thread(target=self._run, name="toptheta-metrics", daemon=True)
        self._thread.start()
        # A thread that is inside torch while the interpreter goes down aborts the process.
        atexit.register(self.close)

    def close(self) -> None:
        """Exports what is left and ends the thread."""
        self._stopped.set()
        self._thread.join()

    def describe(
        self, table: Mapping[str, str], rank: int, ranks: int, per_layer: bool, screened: bool = False
    ) -> None:
        """Says what this process serves; call it before its layers are added.

        Args:
            table: Labels of the table's info metric.
            rank: This tensor-parallel rank.
            ranks: Tensor-parallel ranks.
            per_layer: Whether layers are exported one by one too.
            screened: Whether a K screen is on, which the log then has the rows of.
        """
        self._rank, self._ranks, self._per_layer, self._screened = rank, ranks, per_layer, screened
        self._exporter.set_table(table)

    def add_layer(self, layer: LayerAccumulators) -> None:
        """Includes a layer's accumulators from now on."""
        self._layers.append(layer)

    def on_settle(self, fetch: Callable[[], None]) -> None:
        """Has :meth:`settle` call this: it brings accumulators on the host up to what a device has counted."""
        self._fetches.append(fetch)

    def settle(self) -> None:
        """Fetches what devices have counted up to the last step.

        It waits for them, so no step may call it, nor another thread than the one that runs the steps.
        """
        for fetch in self._fetches:
            fetch()

    def count_dense_rows(self, reason: str, rows: int) -> None:
        """Counts decode rows that read every V row; the first of each reason is logged."""
        if rows == 0 or self._rank:
            return
        if reason not in self._dense_rows:
            logger.info("TOPTHETA: some rows read every V row, reason: %s", reason)
        self._dense_rows[reason] += rows

    def count_platform_rows(
        self, reason: str, lengths: torch.Tensor, num_heads: int, num_kv_heads: float, layers: int = 1
    ) -> None:
        """Counts decode rows that vLLM's own kernel serves.

        Args:
            reason: Why.
            lengths: int64 [rows] on the host, keys that each row attends to (tokens).
            num_heads: Query heads of a layer on this rank.
            num_kv_heads: KV heads of a layer on this rank, divided by the ranks that hold each.
            layers: Layers of that kind.
        """
        rows = len(lengths) * layers
        self.count_dense_rows(reason, rows)
        if not self._rank:
            self._platform_rows[reason] += rows
        keys = int(lengths.sum()) * layers
        added = {
            Stat.ROWS: 0 if self._rank else rows,
            Stat.ELEMENTS: keys * num_heads,
            Stat.KEPT_ELEMENTS: keys * num_heads,
            Stat.V_ROWS: keys * num_kv_heads,
            Stat.V_ROWS_READ: keys * num_kv_heads,
            Stat.K_ROWS_READ: keys * num_kv_heads,
            Stat.CANDIDATES: keys * num_kv_heads,
        }
        for stat, amount in added.items():
            self._platform[stat] += amount
        self._platform_heads += rows * num_heads

    def totals(self) -> dict[str, float]:
        """Sums since the process started, by sample name, with ``dense_rows:REASON`` entries.

        Those of them that vLLM's own kernel served are ``platform_rows:REASON``.
        """
        now = self.amounts()
        named = {f"{name}_total": now.sums[stat] for stat, (name, _) in COUNTERS.items()}
        named |= {DROPPED_SUM: now.sums[Stat.DROPPED_MASS], DROPPED_COUNT: now.head_rows}
        named["toptheta:decode_rows_total"] = now.sums[Stat.ROWS]
        named |= {f"dense_rows:{reason}": float(rows) for reason, rows in now.dense_rows.items()}
        return named | {
            f"platform_rows:{reason}": float(rows) for reason, rows in self._platform_rows.items()
        }

    def amounts(self) -> Amounts:
        """This rank's part of all sums since the process started."""
        layers = list(self._layers)
        own = torch.zeros(len(layers), len(Stat), dtype=torch.float64)
        if layers:
            torch.stack([layer.statistics for layer in layers], out=own)
        head_rows = self._platform_heads + sum(
            rows * layer.num_heads for rows, layer in zip(own[:, Stat.ROWS].tolist(), layers, strict=True)
        )
        replicas = torch.tensor([layer.kv_replicas for layer in layers], dtype=torch.float64)
        for stat in (Stat.V_ROWS, Stat.V_ROWS_READ, Stat.K_ROWS_READ, Stat.CANDIDATES):
            own[:, stat] /= replicas
        if self._rank:
            own[:, Stat.ROWS] = 0
        sums = own.sum(dim=0) + torch.tensor(self._platform, dtype=torch.float64)
        by_layer: dict[str, list[float]] = {}
        if self._per_layer:
            # A process that starts another engine has layers of the same names again.
            for layer, row in zip(layers, own.tolist(), strict=True):
                before = by_layer.get(layer.label, [0.0] * len(Stat))
                by_layer[layer.label] = [a + b for a, b in zip(before, row, strict=True)]
        # Last: a layer counts why it is dense before it decodes, so no row looks sparse for lack of a reason.
        return Amounts(sums.tolist(), head_rows, Counter(self._dense_rows), by_layer)

    def export(self) -> None:
        """Carries what was added since the last call to Prometheus."""
        self._exporter.export(self.amounts())

    def _run(self) -> None:
        exports = 0
        while not self._stopped.wait(_EXPORT_SECONDS):
            self.export()
            exports += 1
            if exports % _LOG_EVERY == 0:
                self._log()
        self.export()

    def _log(self) -> None:
        now = self.amounts()
        line = summary(now, self._logged, self._screened)
        if line is None:
            return
        self._logged = now
        heads = f" (heads of rank 0 of {self._ranks})" if self._ranks > 1 else ""
        logger.info("TOPTHETA: %s%s", line, heads)


def summary(now: Amounts, before: Amounts, screened: bool = False) -> str | None:
    """What an interval decoded, for the log, with rows of K where they are screened; None when it was nothing."""
    new = [a - b for a, b in zip(now.sums, before.sums, strict=True)]
    if new[Stat.ROWS] <= 0 or new[Stat.V_ROWS] <= 0:
        return None
    dense = now.dense_rows - before.dense_rows
    # Reasons are counted where a step begins, rows layer by layer: a step may be half in.
    rows_begun = max(new[Stat.ROWS], float(dense.total()))
    reasons = ", ".join(f"{reason} {rows / rows_begun:.1%}" for reason, rows in dense.most_common())
    of_k = ""
    if screened:
        of_k = f"K rows read: {new[Stat.K_ROWS_READ] / new[Stat.V_ROWS]:.1%}, "
        of_k += f"candidates: {new[Stat.CANDIDATES] / new[Stat.V_ROWS]:.1%}, "
    return (
        f"V rows read: {new[Stat.V_ROWS_READ] / new[Stat.V_ROWS]:.1%}, {of_k}"
        f"keys kept by a head: {new[Stat.KEPT_ELEMENTS] / new[Stat.ELEMENTS]:.1%}, "
        f"rows decoded (all layers): {new[Stat.ROWS]:.0f}, "
        f"dense: {dense.total() / rows_begun:.1%}" + (f" ({reasons})" if reasons else "")
    )


@cache
def recorder() -> Recorder:
    """The process's recorder; made on first use."""
    return Recorder()
