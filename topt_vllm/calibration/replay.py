"""What skipping costs: the last rows of a sequence run again with sparse layers, after a dense prefill.

The dense pass is made once; each run repeats only the last rows, from the first sparse layer on.
"""

import math
from typing import Any, Protocol

import torch

from topt_vllm.calibration.dense_pass import DensePass, SparseAttention
from topt_vllm.calibration.model import Subject
from topt_vllm.calibration.options import CalibrationError
from topt_vllm.calibration.predictions import Comparison, Losses, Predictions
from topt_vllm.calibration.scores import LayerCall, attend


class Selector(Protocol):
    """Chooses V rows in some layers; :class:`~topt_vllm.calibration.quality.ThresholdTally` is one.

    The softmax runs over all keys, and the mean of V stands in for what isn't chosen.
    """

    @property
    def layers(self) -> list[int]: ...

    def select(
        self, layer: int, scores: torch.Tensor, probabilities: torch.Tensor, rows: torch.Tensor, part: slice
    ) -> torch.Tensor: ...


class Replay:
    """One sequence, its dense pass, and any number of runs of its last rows.

    Attributes:
        length: Rows of the sequence.
        first: The first row that is run again.
        rows: int64 [count], these rows; row i has context i + 1.
    """

    def __init__(
        self,
        model: Any,
        subject: Subject,
        sequence: list[int],
        count: int,
        dense: DensePass | None = None,
    ) -> None:
        """Makes the dense pass.

        Args:
            model: A transformers causal language model.
            subject: What is known about it.
            sequence: Tokens; the last one is only predicted.
            count: Rows to run again, less than the sequence has.
            dense: A pass over a sequence that starts with this one, with :func:`replayed_rows` among its spans;
                None to make one.

        Raises:
            CalibrationError: The model has no next-token scores at these rows.
        """
        span = replayed_rows(len(sequence), count)
        self._span = span
        self._dense = dense or DensePass(model, subject, sequence[:-1], (span,))
        self.length, self.first = span.stop, span.start
        self.rows = torch.arange(span.start, span.stop)
        tokens = torch.tensor([sequence], device=model.device)
        self._inputs = tokens[:, span.start : span.stop]
        with torch.inference_mode():
            self._predictions = Predictions(
                model, self._inputs, tokens[0, span.start + 1 :], self._dense.hidden(span)
            )
        if not math.isfinite(self.dense_nll):
            raise CalibrationError(
                f"dense attention predicts the held-back text with a loss of {self.dense_nll}; "
                "the weights are broken or --dtype is too narrow for this model"
            )

    @property
    def dense_nll(self) -> float:
        """Mean negative log likelihood under dense attention (nats)."""
        return self._predictions.dense_nll

    def run(self, selector: Selector) -> Losses:
        """Runs the last rows with the selector's layers sparse."""
        return self.compare(_Selecting(selector)).losses()

    def compare(self, attention: SparseAttention) -> Comparison:
        """Runs the last rows with any other attention in some layers."""
        with torch.inference_mode():
            return self._predictions.compare(
                self._dense.decode(self._inputs, self.first, attention, self._span)
            )


def replayed_rows(length: int, count: int) -> range:
    """Rows that a :class:`Replay` of ``length`` tokens runs again."""
    return range(length - 1 - count, length - 1)


class _Selecting:
    """A selector's attention."""

    def __init__(self, selector: Selector) -> None:
        self._selector = selector
        self.layers = selector.layers

    def attend(self, call: LayerCall) -> torch.Tensor:
        return attend(call, lambda *chunk: self._selector.select(call.layer, *chunk))
