"""The dense pass over models with a state, whose rows can't be decoded from K and V alone.

Their decoding is the whole sequence once more, in one forward pass: everything is causal, so the prompt's rows,
attended densely, come out as they did, and the rows behind them find the states that dense attention left. It costs
a pass over the prompt for every run.
"""

from dataclasses import replace
from typing import Any

import torch

from topt_vllm.replay.attention import RuleAttention
from topt_vllm.replay.capture import Asked, Observer, selected, whole_sequence
from topt_vllm.replay.dense_pass import DensePass
from topt_vllm.replay.model import Subject
from topt_vllm.replay.scores import LayerCall


class WholePass(DensePass):
    """Runs the tokens again."""

    def decode(
        self,
        inputs: torch.Tensor,
        first: int,
        attention: RuleAttention | None = None,
        span: range | None = None,
    ) -> torch.Tensor:
        """As :meth:`DensePass.decode`; ``span`` saves nothing here."""

        def function(asked: Asked) -> torch.Tensor:
            whole = asked.call(window=self.subject.window_of(asked.layer))
            if attention is None or asked.layer not in attention.layers:
                return whole_sequence(asked, whole)
            prompt = {name: getattr(whole, name)[:, :first] for name in ("query", "key", "value")}
            dense = whole_sequence(asked, replace(whole, **prompt))
            decoded = replace(whole, query=whole.query[:, first:], first=first)
            return torch.cat([dense, attention.attend(decoded).transpose(0, 1)[None]], dim=1)

        prompt = self._tokens[:, :first]
        with torch.inference_mode(), selected(self.model.model, function):
            runs = [self.model.hidden(torch.cat([prompt, row[None]], dim=1))[:, first:] for row in inputs]
        return torch.cat(runs)

    def _keep(self, call: LayerCall) -> None:
        """K and V aren't enough."""


def dense_pass(
    model: Any,
    subject: Subject,
    tokens: list[int],
    spans: tuple[range, ...] = (),
    observe: Observer | None = None,
) -> DensePass:
    """The dense pass of the model's kind; arguments as for :class:`DensePass`."""
    return (WholePass if subject.stateful else DensePass)(model, subject, tokens, spans, observe)


def observed(model: Any, subject: Subject, tokens: list[int], observe: Observer) -> None:
    """A dense pass of which nothing is kept: each layer without a window is shown to ``observe``, in order."""
    WholePass(model, subject, tokens, observe=observe)
