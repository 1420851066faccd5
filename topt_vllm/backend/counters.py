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

_COPY_SECONDS = 0.05


class DeviceCounters:
    """Accumulators of some layers, and their sums on the host.

    Args:
        layers: As below.
        labels: Names of the layers in the metrics.
        num_heads: Query heads of each layer on this rank.
        kv_replicas: Of each layer, ranks that hold each KV head.

    Attributes:
        layers: float64 [layers, slots, 8] on the device.
    """

    def __init__(
        self, layers: torch.Tensor, labels: Sequence[str], num_heads: int, kv_replicas: Sequence[float]
    ) -> None:
        self.layers = layers
        # What is on the host already, and isn't spread over slots, needs no copy.
        self._copies = layers.is_cuda or layers.shape[1] > 1
        self._sums = layers.new_zeros(len(layers), len(Stat))
        # What it was before what doesn't count.
        self._before = torch.zeros_like(layers)
        self._holding = False
        self._host = layers[:, 0]
        if self._copies:
            self._host = torch.zeros(len(layers), len(Stat), dtype=torch.float64, pin_memory=layers.is_cuda)
        self._next_copy = 0.0
        for host, label, replicas in zip(self._host, labels, kv_replicas, strict=True):
            recorder().add_layer(LayerAccumulators(host, num_heads, replicas, label))
        recorder().on_settle(self._fetch)

    def hold(self) -> None:
        """Has nothing count that the layers add from here to :meth:`release`."""
        if not self._holding:
            self._holding = True
            self._before.copy_(self.layers)

    def release(self) -> bool:
        """Ends that, if it was begun, and says whether it was; nothing waits for it."""
        held, self._holding = self._holding, False
        if held:
            self.layers.copy_(self._before)
        return held

    def publish(self) -> None:
        """Lets the host have the sums of the steps so far, at most twenty times a second; nothing waits for it."""
        now = time.monotonic()
        if not self._copies or now < self._next_copy:
            return
        self._next_copy = now + _COPY_SECONDS
        torch.sum(self.layers, dim=1, out=self._sums)
        self._host.copy_(self._sums, non_blocking=True)

    def _fetch(self) -> None:
        if self.layers.is_cuda:
            # Whatever streams the steps ran on.
            torch.cuda.synchronize(self.layers.device)
        # In it, for vLLM may have made the builder while it measured memory, in inference mode.
        with torch.inference_mode():
            if self._copies:
                self._host.copy_((self._before if self._holding else self.layers).sum(dim=1))


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

    def count(self, rows: int, lengths: torch.Tensor | None, warming: int = 0) -> None:
        """Counts a step.

        Args:
            rows: Decode rows.
            lengths: int64 [rows] on the host, their context lengths (tokens), where known. On GPUs they are those
                before drafted tokens are rejected (async scheduling), so the counts are off by those few tokens.
            warming: Of the rows that are long enough, those that are dense because thresholds aren't known yet.
        """
        for reason, layers in self._dense.items():
            recorder().count_dense_rows(reason, rows * layers)
        recorder().count_dense_rows("sift_warmup", warming * self._sparse)
        if lengths is None or not ((self._sparse and self._dense_up_to) or self._platform):
            return
        if self._sparse:
            short = int(np.count_nonzero(lengths.numpy() <= self._dense_up_to))
            recorder().count_dense_rows("short_context", short * self._sparse)
        for layer, layers in self._platform.items():
            seen = lengths if layer.window is None else lengths.clamp(max=layer.window)
            recorder().count_platform_rows(layer.reason, seen, layer.num_heads, layer.num_kv_heads, layers)
