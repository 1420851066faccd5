"""Next-token predictions of some rows, compared with those of dense attention."""

import math
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import torch
from transformers.modeling_outputs import BaseModelOutputWithPast

# Logits held at once, [rows, vocabulary]: 128 MiB in float32.
_LOGITS = 1 << 25


@dataclass(frozen=True)
class Losses:
    """Next-token predictions against dense attention's.

    Attributes:
        nll: Mean negative log likelihood of the text's own next token, minus dense attention's (nats).
        kl: Mean divergence from dense attention's distribution (nats).
        agreement: Share of rows with the same most likely token.
    """

    nll: float
    kl: float
    agreement: float

    @property
    def loss_pct(self) -> float:
        """Rise of perplexity, percent."""
        return 100 * math.expm1(self.nll)


class Predictions:
    """The next tokens of some rows, and what dense attention makes of them."""

    def __init__(self, model: Any, inputs: torch.Tensor, targets: torch.Tensor, dense: torch.Tensor) -> None:
        """
        Args:
            model: A transformers causal language model.
            inputs: int64 [1, R], tokens of the rows.
            targets: int64 [R], the tokens after them.
            dense: [1, R, hidden size], the decoder's output under dense attention.
        """
        self._model = model
        self._inputs = inputs
        self._targets = targets
        self._dense = dense
        self._dense_whole: torch.Tensor | None = None
        self.dense_nll = self._nll(dense)

    def _log_probabilities(self, hidden: torch.Tensor, part: slice) -> torch.Tensor:
        """float32 [r, vocabulary] of some rows; through the model's own head, whatever it does to the logits."""
        name = self._model.base_model_prefix
        stub = _Given(hidden[:, part])
        decoder = getattr(self._model, name)
        setattr(self._model, name, stub)
        try:
            logits = self._model(input_ids=self._inputs[:, part], use_cache=False).logits
        finally:
            setattr(self._model, name, decoder)
        return torch.log_softmax(logits[0].float(), dim=-1)

    def _dense_log_probabilities(self, part: slice) -> torch.Tensor:
        """Of the dense pass; kept from run to run where all of them take no more than one chunk's memory."""
        whole = slice(0, len(self._targets))
        if part != whole:
            return self._log_probabilities(self._dense, part)
        if self._dense_whole is None:
            self._dense_whole = self._log_probabilities(self._dense, whole)
        return self._dense_whole

    def _parts(self) -> Iterator[slice]:
        step = max(1, _LOGITS // self._model.config.get_text_config().vocab_size)
        for start in range(0, len(self._targets), step):
            yield slice(start, min(start + step, len(self._targets)))

    def _nll(self, hidden: torch.Tensor) -> float:
        total = 0.0
        for part in self._parts():
            found = self._log_probabilities(hidden, part)
            total -= float(found.gather(1, self._targets[part, None]).double().sum())
        return total / len(self._targets)

    def compare(self, hidden: torch.Tensor) -> Losses:
        """What other hidden states [1, R, hidden size] of the same rows predict."""
        nll = kl = agreement = 0.0
        for part in self._parts():
            dense = self._dense_log_probabilities(part)
            found = self._log_probabilities(hidden, part)
            nll -= float(found.gather(1, self._targets[part, None]).double().sum())
            agreement += int((found.argmax(dim=-1) == dense.argmax(dim=-1)).sum())
            kl += float((dense.exp() * (dense - found)).sum(dtype=torch.float64))
        count = len(self._targets)
        return Losses(nll / count - self.dense_nll, kl / count, agreement / count)


class _Given(torch.nn.Module):
    """Stands in for a decoder whose output is known."""

    def __init__(self, hidden: torch.Tensor) -> None:
        super().__init__()
        self._hidden = hidden

    def forward(self, *_: Any, **__: Any) -> BaseModelOutputWithPast:
        return BaseModelOutputWithPast(last_hidden_state=self._hidden)
