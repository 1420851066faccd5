"""The dense pass over models with a state, whose rows can't be decoded from K and V alone.

Their decoding is the whole sequence once more, in one forward pass: everything is causal, so the prompt's rows,
attended densely, come out as they did, and the rows behind them find the states that dense attention left. It costs
a pass over the prompt for every run.
"""

from typing import Any

import torch

from topt_vllm.replay.attention import RuleAttention
from topt_vllm.replay.capture import selected, whole_sequence
from topt_vllm.replay.dense_pass import DensePass
from topt_vllm.replay.model import Subject
from topt_vllm.replay.scores import LayerCall


class WholePass(DensePass):
    """Keeps the tokens, and runs them again."""

    def __init__(
        self, model: Any, subject: Subject, tokens: list[int], spans: tuple[range, ...] = ()
    ) -> None:
        """Makes the pass; arguments as for :class:`DensePass`."""
        super().__init__(model, subject, tokens, spans)
        self._tokens = torch.tensor([tokens], device=model.device)

    def decode(
        self,
        inputs: torch.Tensor,
        first: int,
        attention: RuleAttention | None = None,
        span: range | None = None,
    ) -> torch.Tensor:
        """As :meth:`DensePass.decode`; ``span`` saves nothing here."""
        sparse = attention.layers if attention is not None else []

        def function(
            module: torch.nn.Module,
            query: torch.Tensor,
            key: torch.Tensor,
            value: torch.Tensor,
            attention_mask: torch.Tensor | None,
            scaling: float | None = None,
            softcap: float | None = None,
            **kwargs: Any,
        ) -> tuple[torch.Tensor, None]:
            layer = int(module.layer_idx)
            place = {"window": self.subject.window_of(layer), "sinks": kwargs.get("s_aux")}
            tensors = query[0], key[0], value[0]
            if attention is None or layer not in sparse:
                call = LayerCall.of(layer, *tensors, scaling, softcap, **place)
                return whole_sequence(module, call, attention_mask, scaling, kwargs), None
            prompted = query[0, :, :first], key[0, :, :first], value[0, :, :first]
            before = LayerCall.of(layer, *prompted, scaling, softcap, **place)
            mask = None if attention_mask is None else attention_mask[..., :first, :first]
            dense = whole_sequence(module, before, mask, scaling, kwargs)
            decoded = LayerCall.of(
                layer, query[0, :, first:], key[0], value[0], scaling, softcap, first=first, **place
            )
            return torch.cat([dense, attention.attend(decoded).transpose(0, 1)[None]], dim=1), None

        prompt = self._tokens[:, :first]
        with torch.inference_mode(), selected(self.model.model, function):
            runs = [self.model.hidden(torch.cat([prompt, row[None]], dim=1))[:, first:] for row in inputs]
        return torch.cat(runs)

    def _keep(self, call: LayerCall) -> None:
        """K and V aren't enough."""


def dense_pass(model: Any, subject: Subject, tokens: list[int], spans: tuple[range, ...] = ()) -> DensePass:
    """The dense pass of the model's kind; arguments as for :class:`DensePass`."""
    return (WholePass if subject.stateful else DensePass)(model, subject, tokens, spans)
