"""Next-token predictions of some rows, compared with those of dense attention."""

import math
from collections.abc import Iterator
from dataclasses import dataclass, fields
from typing import Any

import torch
from transformers.modeling_outputs import BaseModelOutputWithPast

# Logits held at once, [rows, vocabulary]: 16 MiB in float32, which stays in a CPU's cache.
_LOGITS = 1 << 22
# Dense predictions kept from run to run: 256 MiB in float32.
_KEPT = 1 << 26


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


@dataclass(frozen=True)
class Comparison:
    """Each row by itself.

    Attributes:
        dense: float32 [R], loss under dense attention (nats).
        loss: float32 [R], loss under the other one.
        kl: float32 [R], divergence of its distribution from the dense one (nats).
        agree: bool [R], whether both like the same token best.
    """

    dense: torch.Tensor
    loss: torch.Tensor
    kl: torch.Tensor
    agree: torch.Tensor

    def losses(self) -> Losses:
        """The means."""
        nll = (self.loss.double() - self.dense.double()).mean().item()
        return Losses(nll, self.kl.double().mean().item(), self.agree.double().mean().item())


def joined(parts: list[Comparison]) -> Comparison:
    """The rows of several comparisons as one."""
    return Comparison(*(torch.cat([getattr(part, f.name) for part in parts]) for f in fields(Comparison)))


def compared(dense: torch.Tensor, found: torch.Tensor, targets: torch.Tensor) -> Comparison:
    """Log probabilities [r, vocabulary] under dense attention and another one; targets int64 [r]."""
    wanted = targets[:, None]
    # Terms are differences of numbers alike, so that small divergences keep their digits.
    divergence = dense.exp().mul_(dense - found).sum(dim=-1)
    return Comparison(
        dense=-dense.gather(1, wanted)[:, 0].cpu(),
        loss=-found.gather(1, wanted)[:, 0].cpu(),
        kl=divergence.cpu(),
        agree=(dense.argmax(dim=-1) == found.argmax(dim=-1)).cpu(),
    )


class Head:
    """The part of a model behind its decoder."""

    def __init__(self, model: Any) -> None:
        """
        Args:
            model: A transformers causal language model.
        """
        self._model = model

    def log_probabilities(self, inputs: torch.Tensor, hidden: torch.Tensor) -> torch.Tensor:
        """float32 [r, vocabulary]; through the model's own head, whatever it does to the logits.

        Args:
            inputs: int64 [1, r], tokens of the rows.
            hidden: [1, r, hidden size], what the decoder made of them.
        """
        name = self._model.base_model_prefix
        decoder = getattr(self._model, name)
        setattr(self._model, name, _Given(hidden))
        try:
            logits = self._model(input_ids=inputs, use_cache=False).logits
        finally:
            setattr(self._model, name, decoder)
        return torch.log_softmax(logits[0].float(), dim=-1)


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
        self._head = Head(model)
        self._inputs = inputs
        self._targets = targets
        self._dense = dense
        vocabulary = model.config.get_text_config().vocab_size
        self._step = max(1, _LOGITS // vocabulary)
        self._keeps = len(targets) * vocabulary <= _KEPT
        self._kept: dict[int, torch.Tensor] = {}
        total = 0.0
        for part in self._parts():
            found = self._dense_log_probabilities(part)
            total -= float(found.gather(1, targets[part, None]).double().sum())
        self.dense_nll = total / len(targets)

    def compare(self, hidden: torch.Tensor) -> Comparison:
        """What other hidden states [1, R, hidden size] of the same rows predict."""
        return joined(
            [
                compared(
                    self._dense_log_probabilities(part),
                    self._log_probabilities(hidden, part),
                    self._targets[part],
                )
                for part in self._parts()
            ]
        )

    def _log_probabilities(self, hidden: torch.Tensor, part: slice) -> torch.Tensor:
        return self._head.log_probabilities(self._inputs[:, part], hidden[:, part])

    def _dense_log_probabilities(self, part: slice) -> torch.Tensor:
        """Of the dense pass."""
        if part.start in self._kept:
            return self._kept[part.start]
        found = self._log_probabilities(self._dense, part)
        if self._keeps:
            self._kept[part.start] = found
        return found

    def _parts(self) -> Iterator[slice]:
        for start in range(0, len(self._targets), self._step):
            yield slice(start, min(start + self._step, len(self._targets)))


class _Given(torch.nn.Module):
    """Stands in for a decoder whose output is known."""

    def __init__(self, hidden: torch.Tensor) -> None:
        super().__init__()
        self._hidden = hidden

    def forward(self, *_: Any, **__: Any) -> BaseModelOutputWithPast:
        return BaseModelOutputWithPast(last_hidden_state=self._hidden)
