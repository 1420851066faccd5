"""Counters of a builder's layers: what the kernel adds up on the device, and what the host knows by itself.

Python doesn't run while a CUDA graph replays, so the host's part is counted where each step's metadata is built.
The thread that exports counters must not touch the device either: while another thread captures a graph, that would
end the capture. So the device's sums are copied to host memory on the step's stream, and nobody waits for them.
"""

import time
from collections import Counter
from collections.abc import Sequence

import torch
from vllm.v1.attention.backend import CommonAttentionMetadata

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


class HostCounters:
    """What is known of a step without its scores: rows that read every V row, and why.

    Args:
        dense: Layers by the reason that makes them dense.
        sparse: Layers with thresholds.
        windows: Layers by (keys of the window, query heads, KV heads divided by the ranks that hold each).
        dense_up_to: Longest context that is dense for being short (tokens).
    """

    def __init__(
        self, dense: Counter[str], sparse: int, windows: Counter[tuple[int, int, float]], dense_up_to: int
    ) -> None:
        self._dense = dense
        self._sparse = sparse
        self._windows = windows
        self._dense_up_to = dense_up_to

    def count(self, common: CommonAttentionMetadata, num_decodes: int) -> None:
        """Counts a step.

        Args:
            common: The step's batch. Its context lengths on the host are those before drafted tokens are rejected
                (async scheduling), so the counts are off by those few tokens.
            num_decodes: Its first requests, which decode.
        """
        if not num_decodes:
            return
        starts = common.query_start_loc_cpu[: num_decodes + 1]
        for reason, layers in self._dense.items():
            recorder().count_dense_rows(reason, int(starts[-1]) * layers)
        lengths = common.seq_lens_cpu_upper_bound
        if lengths is None or not ((self._sparse and self._dense_up_to) or self._windows):
            return
        rows = row_lengths(starts, lengths[:num_decodes])
        short = int((rows <= self._dense_up_to).sum())
        recorder().count_dense_rows("short_context", short * self._sparse)
        for (window, num_heads, num_kv_heads), layers in self._windows.items():
            recorder().count_platform_rows(
                "sliding_window", rows.clamp(max=window), num_heads, num_kv_heads, layers
            )
