"""Next-token predictions of some rows, compared with those of dense attention."""

import math
from collections.abc import Iterator
from dataclasses import dataclass, fields

import torch

from topt_vllm.replay.causal_lm import CausalLM

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


class Predictions:
    """The next tokens of some rows, and what dense attention makes of them.

    Attributes:
        dense_losses: float64 [R], of each row under dense attention (nats).
    """

    def __init__(
        self, model: CausalLM, inputs: torch.Tensor, targets: torch.Tensor, dense: torch.Tensor
    ) -> None:
        """
        Args:
            model: One that has made the hidden states.
            inputs: int64 [1, R], tokens of the rows.
            targets: int64 [R], the tokens after them.
            dense: [1, R, hidden size], the decoder's output under dense attention.
        """
        self._model = model
        self._inputs = inputs
        self._targets = targets
        self._dense = dense
        vocabulary = model.model.config.get_text_config().vocab_size
        self._step = max(1, _LOGITS // vocabulary)
        self._keeps = len(targets) * vocabulary <= _KEPT
        self._kept: dict[int, torch.Tensor] = {}
        losses = [
            -self._dense_log_probabilities(part).gather(1, targets[part, None])[:, 0].double().cpu()
            for part in self._parts()
        ]
        self.dense_losses = torch.cat(losses)

    @property
    def dense_nll(self) -> float:
        """Mean loss under dense attention (nats)."""
        return self.dense_losses.mean().item()

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
        return self._model.log_probabilities(self._inputs[:, part], hidden[:, part])

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
