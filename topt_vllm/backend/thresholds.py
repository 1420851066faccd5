"""Thresholds of the layers of one metadata builder: as calibrated, for drafts, by the traffic, or by request.

What changes them runs where a step's metadata is built: a CUDA graph is replayed without the layers' Python. Only
``policy: sift`` looks into single layers, and declares that no graph may hold them. Everything is on the cache's
device, and nothing that a step needs is read back.
"""

from collections.abc import Sequence
from typing import Any

import torch
from vllm.utils.torch_utils import async_tensor_h2d

from topt_vllm.adaptation import ThetaController
from topt_vllm.attention.common import DecodeArguments, RowThetas, Thetas
from topt_vllm.attention.quantiles import score_quantiles
from topt_vllm.backend import requests
from topt_vllm.sift import SiftLayer, SiftRequests, SiftSettings, SiftStep


class Thresholds:
    """Those of a builder's layers that decode with the operator, as they are.

    Args:
        thetas: Of each layer, on the cache's device; None for θ = −inf, or where each row has its own.
    """

    def __init__(self, thetas: Sequence[Thetas | None]) -> None:
        self.thetas = thetas

    def skips(self, layer: int) -> bool:
        """Whether a layer may skip rows at all."""
        return self.thetas[layer] is not None

    def of_rows(self, layer: int, step: Any, rows: int) -> Thetas | RowThetas | None:
        """θ of a step's first decode rows; ``step`` is what :meth:`before` gave. None for θ = −inf."""
        return self.thetas[layer]

    def reached(self, layer: int, rows: int) -> torch.Tensor | None:
        """int64 [rows, H], where the operator counts keys that reach θ; None where nobody asks."""
        return None

    def after(self, layer: int, step: Any, given: DecodeArguments) -> None:
        """Sees the decode rows of a step once they have attended; arguments as the operator's."""

    def before(self, common: Any, starts: torch.Tensor, lengths: torch.Tensor | None) -> Any:
        """Brings thresholds up to date for a step.

        Args:
            common: vLLM's batch.
            starts: int32 [S + 1] on the host, first query row of each sequence that decodes.
            lengths: int64 [rows] on the host, context length of each of their rows (tokens); None where unknown.

        Returns:
            What the step's metadata carries to the layers.
        """

    def of_drafts(self) -> Any:
        """As :meth:`before`, for a step that drafts."""

    def rows_before_known(self, step: Any, dense_up_to: int) -> int:
        """Rows of a step with longer contexts than that, which are dense for want of thresholds."""
        return 0

    def forget(self) -> None:
        """Forgets the rows that the layers saw since the last step, for they were none: a graph was captured."""


class DraftingThresholds(Thresholds):
    """For steps that draft (:mod:`topt_vllm.backend.drafting`); in those of the model every row is kept."""

    def of_drafts(self) -> bool:
        """True: the step drafts."""
        return True

    def of_rows(self, layer: int, step: bool | None, rows: int) -> Thetas | None:
        return self.thetas[layer] if step else None


class AdaptingThresholds(Thresholds):
    """Offsets that hold what each head keeps at what its budget promises (:mod:`topt_vllm.adaptation`).

    Args:
        thetas: Of each layer, as calibrated, on the cache's device; None for θ = −inf.
        keys: Keys that each query head should keep, of the layers that have thresholds.
        dense_up_to: Longest context that is dense for being short (tokens).
        max_rows: Most decode rows of a step.
    """

    def __init__(
        self, thetas: Sequence[Thetas | None], keys: Sequence[list[int]], dense_up_to: int, max_rows: int
    ) -> None:
        sparse = {layer: each for layer, each in enumerate(thetas) if each is not None}
        stacked = Thetas(
            next(iter(sparse.values())).lengths,
            torch.stack([each.theta for each in sparse.values()]),
            torch.stack([each.law for each in sparse.values()]),
        )
        self._controller = ThetaController(stacked, keys, dense_up_to)
        self._reached = self._controller.counters(max_rows)
        self._of_layer = dict(zip(sparse, self._reached, strict=True))
        self._rows = 0
        self._contexts: torch.Tensor | None = None
        moving = dict(zip(sparse, self._controller.of_layers(), strict=True))
        super().__init__([moving.get(layer) for layer in range(len(thetas))])

    def reached(self, layer: int, rows: int) -> torch.Tensor | None:
        return self._of_layer[layer][:rows] if layer in self._of_layer else None

    def before(self, common: Any, starts: torch.Tensor, lengths: torch.Tensor | None) -> None:
        """Takes what the last step's rows reached; rows of unknown length count for nothing."""
        if self._contexts is not None:
            self._controller.count(self._reached[:, : self._rows], self._contexts)
        self._reached[:, : self._rows].zero_()
        self._rows = int(starts[-1])
        # From pinned memory: the copy of any other may wait for the step before.
        self._contexts = None if lengths is None else async_tensor_h2d(lengths, self._reached.device)

    def forget(self) -> None:
        self._contexts = None
        self._rows = self._reached.shape[1]


class SiftingThresholds(Thresholds):
    """Those that each request finds in its first decoded rows (:mod:`topt_vllm.sift`).

    Args:
        sparse: Whether each layer takes part; the others are dense.
        num_heads: Query heads of a layer on this rank.
        settings: Of the policy.
        device: Of the cache.
    """

    def __init__(
        self, sparse: Sequence[bool], num_heads: int, settings: SiftSettings, device: torch.device
    ) -> None:
        super().__init__([None] * len(sparse))
        self._requests = SiftRequests(settings)
        requests.watch(self._requests)
        self._device = device
        self._laws = [SiftLayer(num_heads, settings, device) if each else None for each in sparse]

    def skips(self, layer: int) -> bool:
        return self._laws[layer] is not None

    def of_rows(self, layer: int, step: SiftStep | None, rows: int) -> RowThetas | None:
        laws = self._laws[layer]
        return None if step is None or laws is None else RowThetas(laws.thetas(step).theta[:rows])

    def after(self, layer: int, step: SiftStep | None, given: DecodeArguments) -> None:
        if (laws := self._laws[layer]) is not None and step is not None and step.recording:
            laws.record(step, score_quantiles(given, step.first_rows, laws.tau))

    def before(self, common: Any, starts: torch.Tensor, lengths: torch.Tensor | None) -> SiftStep | None:
        """The step's rows by request; None where their lengths or requests aren't known: then all are dense."""
        if lengths is None or (names := requests.of_batch(common, len(starts) - 1)) is None:
            return None
        step = self._requests.step(names, starts, lengths)
        return step.moved(lambda part: async_tensor_h2d(part, self._device))

    def rows_before_known(self, step: SiftStep | None, dense_up_to: int) -> int:
        return 0 if step is None else int((step.warm_contexts > dense_up_to).sum())
