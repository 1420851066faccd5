"""Counters of a builder's layers: what the kernel adds up on the device, and what the host knows by itself.

Python doesn't run while a CUDA graph replays, so the host's part is counted where each step's metadata is built.
The thread that exports counters must not touch the device either: while another thread captures a graph, that would
end the capture. So the device's sums are copied to host memory on the step's stream, and nobody waits for them.
"""

import time
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import torch

from topt_vllm.attention.common import Stat
from topt_vllm.backend.metrics import LayerAccumulators, recorder
from topt_vllm.backend.rows import row_lengths

_COPY_SECONDS = 0.05


class DeviceStatistics:
    """Accumulators of some layers, and their sums on the host.

    Args:
        layers: As below.
        labels: Names of the layers in the metrics.
        num_heads: Query heads of each layer on this rank.
        kv_replicas: Ranks that hold each KV head.

    Attributes:
        layers: float64 [layers, slots, 7] on the device.
    """

    def __init__(
        self, layers: torch.Tensor, labels: Sequence[str], num_heads: int, kv_replicas: float
    ) -> None:
        self.layers = layers
        self._sums = layers.new_zeros(len(layers), len(Stat))
        self._host = torch.zeros(len(layers), len(Stat), dtype=torch.float64, pin_memory=layers.is_cuda)
        self._next_copy = 0.0
        for host, label in zip(self._host, labels, strict=True):
            recorder().add_layer(LayerAccumulators(host, num_heads, kv_replicas, label))
        recorder().on_settle(self._fetch)

    def reset(self) -> None:
        """Forgets what was counted so far; nothing waits for it."""
        self.layers.zero_()

    def publish(self) -> None:
        """Lets the host have the sums of the steps so far, at most twenty times a second; nothing waits for it."""
        now = time.monotonic()
        if now < self._next_copy:
            return
        self._next_copy = now + _COPY_SECONDS
        torch.sum(self.layers, dim=1, out=self._sums)
        self._host.copy_(self._sums, non_blocking=True)

    def _fetch(self) -> None:
        if self.layers.is_cuda:
            # Whatever streams the steps ran on.
            torch.cuda.synchronize(self.layers.device)
        self._host.copy_(self.layers.sum(dim=1))


@dataclass(frozen=True)
class PlatformLayer:
    """A layer that stays with the platform's kernel.

    Attributes:
        reason: Why its rows read every V row.
        window: Keys that a row sees at most; None for all.
        num_heads: Query heads on this rank.
        num_kv_heads: KV heads on this rank, divided by the ranks that hold each.
    """

    reason: str
    window: int | None
    num_heads: int
    num_kv_heads: float


class HostCounters:
    """What is known of a step without its scores: rows that read every V row, and why.

    Args:
        dense: Layers that the operator decodes with every row kept, by the reason.
        sparse: Layers with thresholds.
        platform: Layers that stay with the platform's kernel.
        dense_up_to: Longest context that is dense for being short (tokens).
    """

    def __init__(
        self, dense: Counter[str], sparse: int, platform: Counter[PlatformLayer], dense_up_to: int
    ) -> None:
        self._dense = dense
        self._sparse = sparse
        self._platform = platform
        self._dense_up_to = dense_up_to

    def count(self, query_start_loc: torch.Tensor, seq_lens: torch.Tensor | None) -> None:
        """Counts a step.

        Args:
            query_start_loc: int32 [S + 1] on the host, first query row of each request that decodes.
            seq_lens: int32 [S] on the host, their context lengths (tokens), where known. They are those before
                drafted tokens are rejected (async scheduling), so the counts are off by those few tokens.
        """
        for reason, layers in self._dense.items():
            recorder().count_dense_rows(reason, int(query_start_loc[-1]) * layers)
        if seq_lens is None or not ((self._sparse and self._dense_up_to) or self._platform):
            return
        lengths = row_lengths(query_start_loc, seq_lens)
        if self._sparse:
            short = int(np.count_nonzero(lengths.numpy() <= self._dense_up_to))
            recorder().count_dense_rows("short_context", short * self._sparse)
        for layer, layers in self._platform.items():
            seen = lengths if layer.window is None else lengths.clamp(max=layer.window)
            recorder().count_platform_rows(layer.reason, seen, layer.num_heads, layer.num_kv_heads, layers)
