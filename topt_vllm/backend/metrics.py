"""Counters of a worker: what was read, what was dropped, what ran dense and why.

Layers add to plain tensors; a thread carries the sums to prometheus_client once a second and to the log every ten.
prometheus_client's multiprocess mode takes them from the worker to the API server's /metrics: set
PROMETHEUS_MULTIPROC_DIR to an empty folder before the server starts.
"""

import atexit
import logging
import threading
from collections import Counter
from functools import cache

import prometheus_client
import torch

from topt_vllm.attention.common import Stat, new_statistics

logger = logging.getLogger("vllm.topt_vllm")

_EXPORT_SECONDS = 1.0
_LOG_EVERY = 10  # exports

_COUNTERS = {
    Stat.ROWS: ("toptheta_decode_rows", "Decoded query rows, summed over layers"),
    Stat.ELEMENTS: ("toptheta_elements", "(query head, key) pairs in context of decoded rows"),
    Stat.KEPT_ELEMENTS: ("toptheta_kept_elements", "Pairs that a query head's own rule kept"),
    Stat.V_ROWS: ("toptheta_v_rows", "(KV head, key) pairs in context of decoded rows"),
    Stat.V_ROWS_READ: ("toptheta_v_rows_read", "V rows read: pairs that some head of the GQA group kept"),
    Stat.K_ROWS_READ: ("toptheta_k_rows_read", "(KV head, key) pairs whose K was read in full"),
    Stat.DROPPED_MASS: (
        "toptheta_dropped_mass",
        "Attention probability not multiplied with V, over query heads",
    ),
}


class Recorder:
    """All counters of one process."""

    def __init__(self) -> None:
        self._layers: list[torch.Tensor] = []
        self._platform = [0.0] * len(Stat)
        self._dense_rows: Counter[str] = Counter()
        self._exported = new_statistics()
        self._exported_dense: Counter[str] = Counter()
        self._logged = new_statistics()
        self._counters = {
            stat: prometheus_client.Counter(name, text) for stat, (name, text) in _COUNTERS.items()
        }
        self._dense_counter = prometheus_client.Counter(
            "toptheta_dense_rows", "Decoded rows that read every V row, summed over layers", ["reason"]
        )
        self._stopped = threading.Event()
        self._thread = threading.Thread(target=self._run, name="toptheta-metrics", daemon=True)
        self._thread.start()
        # A thread that is inside torch while the interpreter goes down aborts the process.
        atexit.register(self.close)

    def close(self) -> None:
        """Exports what is left and ends the thread."""
        self._stopped.set()
        self._thread.join()

    def add_layer(self, statistics: torch.Tensor) -> None:
        """Includes accumulators (float64 [7], on the host) from now on."""
        self._layers.append(statistics)

    def count_dense_rows(self, reason: str | None, rows: int) -> None:
        """Counts decode rows that read every V row; the first of each reason is logged."""
        if reason is None or rows == 0:
            return
        if reason not in self._dense_rows:
            logger.info("TOPTHETA: some rows read every V row, reason: %s", reason)
        self._dense_rows[reason] += rows

    def count_platform_rows(
        self, reason: str, lengths: torch.Tensor, num_heads: int, num_kv_heads: int, layers: int = 1
    ) -> None:
        """Counts decode rows that vLLM's own kernel serves.

        Args:
            reason: Why.
            lengths: int64 [rows] on the host, keys that each row attends to (tokens).
            num_heads: Query heads of a layer.
            num_kv_heads: KV heads of a layer.
            layers: Layers of that kind.
        """
        rows = len(lengths) * layers
        self.count_dense_rows(reason, rows)
        keys = int(lengths.sum()) * layers
        added = {
            Stat.ROWS: rows,
            Stat.ELEMENTS: keys * num_heads,
            Stat.KEPT_ELEMENTS: keys * num_heads,
            Stat.V_ROWS: keys * num_kv_heads,
            Stat.V_ROWS_READ: keys * num_kv_heads,
            Stat.K_ROWS_READ: keys * num_kv_heads,
        }
        for stat, amount in added.items():
            self._platform[stat] += amount

    def totals(self) -> dict[str, float]:
        """Sums since the process started, by counter name, and ``dense_rows:REASON`` entries."""
        sums = self._sums()
        named = {name: float(sums[stat]) for stat, (name, _) in _COUNTERS.items()}
        return named | {f"dense_rows:{reason}": float(rows) for reason, rows in self._dense_rows.items()}

    def export(self) -> None:
        """Carries what was added since the last call to prometheus_client."""
        sums = self._sums()
        for stat, counter in self._counters.items():
            counter.inc(max(0.0, float(sums[stat] - self._exported[stat])))
        self._exported = sums
        dense = Counter(self._dense_rows)
        for reason, rows in dense.items():
            self._dense_counter.labels(reason).inc(rows - self._exported_dense[reason])
        self._exported_dense = dense

    def _sums(self) -> torch.Tensor:
        platform = torch.tensor(self._platform, dtype=torch.float64)
        return torch.stack([platform, *self._layers]).sum(dim=0)

    def _run(self) -> None:
        exports = 0
        while not self._stopped.wait(_EXPORT_SECONDS):
            self.export()
            exports += 1
            if exports % _LOG_EVERY == 0:
                self._log()
        self.export()

    def _log(self) -> None:
        new = self._exported - self._logged
        if new[Stat.ROWS] <= 0:
            return
        self._logged = self._exported
        heads = max(1.0, float(new[Stat.ELEMENTS]))
        logger.info(
            "TOPTHETA: V rows read: %.1f%%, keys kept by a head: %.1f%%, rows decoded (all layers): %d",
            100 * float(new[Stat.V_ROWS_READ] / new[Stat.V_ROWS]),
            100 * float(new[Stat.KEPT_ELEMENTS]) / heads,
            int(new[Stat.ROWS]),
        )


@cache
def recorder() -> Recorder:
    """The process's recorder; made on first use."""
    return Recorder()
