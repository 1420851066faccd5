"""What skipping costs: the last rows of a sequence run again with sparse layers, after a dense prefill.

The dense pass is made once; each run repeats only the last rows, from the first sparse layer on. Models with a
state are run as a whole each time.
"""

import math
from typing import Any

import torch

from topt_vllm.replay.attention import RuleAttention
from topt_vllm.replay.capture import Observer
from topt_vllm.replay.dense_pass import DensePass
from topt_vllm.replay.model import Subject
from topt_vllm.replay.options import ReplayError
from topt_vllm.replay.predictions import Comparison, Predictions
from topt_vllm.replay.whole_pass import dense_pass


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
        observe: Observer | None = None,
    ) -> None:
        """Makes the dense pass.

        Args:
            model: A transformers causal language model.
            subject: What is known about it.
            sequence: Tokens; the last one is only predicted.
            count: Rows to run again, less than the sequence has.
            dense: A pass over a sequence that starts with this one, with :func:`replayed_rows` among its spans;
                None to make one.
            observe: Is shown the layers without a window of the pass that is made.

        Raises:
            ReplayError: The model has no next-token scores at these rows.
        """
        span = replayed_rows(len(sequence), count)
        self._span = span
        self._dense = dense or dense_pass(model, subject, sequence[:-1], (span,), observe)
        self.length, self.first = span.stop, span.start
        self.rows = torch.arange(span.start, span.stop)
        tokens = torch.tensor([sequence], device=model.device)
        self._inputs = tokens[:, span.start : span.stop]
        with torch.inference_mode():
            self._predictions = Predictions(
                self._dense.model, self._inputs, tokens[0, span.start + 1 :], self._dense.hidden(span)
            )
        if not math.isfinite(self.dense_nll):
            raise ReplayError(
                f"dense attention predicts the held-back text with a loss of {self.dense_nll}; "
                "the weights are broken or --dtype is too narrow for this model"
            )

    @property
    def dense_nll(self) -> float:
        """Mean negative log likelihood under dense attention (nats)."""
        return self._predictions.dense_nll

    def compare(self, attention: RuleAttention) -> Comparison:
        """Runs the last rows with rules in some layers."""
        with torch.inference_mode():
            return self._predictions.compare(
                self._dense.decode(self._inputs, self.first, attention, self._span)
            )


def replayed_rows(length: int, count: int) -> range:
    """Rows that a :class:`Replay` of ``length`` tokens runs again."""
    return range(length - 1 - count, length - 1)
