"""What skipping costs: the last rows of a sequence run again with sparse layers, after a dense prefill.

That is what decoding does: the prompt's K and V come from dense attention, the decoded rows' from sparse ones. The
dense pass is made once; each run repeats only the last rows, from the first sparse layer on.
"""

import math
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from typing import Any, Protocol

import torch
from transformers.integrations.sdpa_attention import sdpa_attention_forward

from topt_vllm.calibration.capture import selected
from topt_vllm.calibration.model import Subject
from topt_vllm.calibration.options import CalibrationError
from topt_vllm.calibration.predictions import Losses, Predictions
from topt_vllm.calibration.scores import LayerCall, attend


class Selector(Protocol):
    """Chooses V rows in some layers; :class:`~topt_vllm.calibration.quality.ThresholdTally` is one."""

    @property
    def layers(self) -> list[int]: ...

    def select(
        self, layer: int, scores: torch.Tensor, probabilities: torch.Tensor, rows: torch.Tensor, part: slice
    ) -> torch.Tensor: ...


class Replay:
    """One sequence, its dense pass, and any number of runs of its last rows."""

    def __init__(self, model: Any, subject: Subject, sequence: list[int], count: int) -> None:
        """Makes the dense pass.

        Args:
            model: A transformers causal language model.
            subject: What is known about it.
            sequence: Tokens; the last one is only predicted.
            count: Rows to run again, less than the sequence has.

        Raises:
            CalibrationError: The model has no next-token scores at these rows.
        """
        self._decoder = model.base_model
        self._subject = subject
        tokens = torch.tensor([sequence], device=model.device)
        inputs = tokens[:, :-1]
        self.length = inputs.shape[1]
        self.first = self.length - count
        self.rows = torch.arange(self.first, self.length)
        self._inputs = inputs[:, self.first :]
        self._prefix: dict[int, tuple[torch.Tensor, torch.Tensor]] = {}
        self._layer_outputs: dict[int, Any] = {}
        self._layers = _decoder_layers(self._decoder, subject.identity.num_layers)
        with torch.inference_mode(), self._recording(), selected(self._decoder, self._record):
            hidden = self._decoder(input_ids=inputs, use_cache=False)[0]
            self._predictions = Predictions(
                model, self._inputs, tokens[0, self.first + 1 :], hidden[:, self.first :].clone()
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
        first = min(selector.layers, default=self._subject.identity.num_layers)

        def attention(module: torch.nn.Module, *tensors: Any, **kwargs: Any) -> tuple[torch.Tensor, None]:
            return self._attend(selector, module, *tensors, **kwargs)

        positions = self.rows.to(self._inputs.device)[None]
        with torch.inference_mode(), self._skipping(first), selected(self._decoder, attention):
            output = self._decoder(input_ids=self._inputs, position_ids=positions, use_cache=False)
            return self._predictions.compare(output[0])

    def _record(
        self,
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
        self._prefix[layer] = key[0, :, : self.first].clone(), value[0, :, : self.first].clone()
        if softcap:
            call = self._call(layer, query[0], key[0], value[0], scaling, softcap, 0)
            return attend(call, None).transpose(0, 1).unsqueeze(0), None
        return sdpa_attention_forward(module, query, key, value, attention_mask, scaling=scaling, **kwargs)

    def _attend(
        self,
        selector: Selector,
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
        before_key, before_value = self._prefix[layer]
        call = self._call(
            layer,
            query[0],
            torch.cat([before_key, key[0]], dim=1),
            torch.cat([before_value, value[0]], dim=1),
            scaling,
            softcap,
            self.first,
        )
        if layer in selector.layers:
            out = attend(call, lambda *chunk: selector.select(layer, *chunk))
        elif softcap:
            out = attend(call, None)
        else:
            mask = call.visible(self.rows.to(query.device))[None, None]
            both = call.key[None], call.value[None]
            # The mask says all: the rows are the last of the sequence, which is_causal can't express.
            kwargs = {**kwargs, "is_causal": False}
            return sdpa_attention_forward(module, query, *both, mask, scaling=scaling, **kwargs)
        return out.transpose(0, 1).unsqueeze(0), None

    def _call(
        self,
        layer: int,
        query: torch.Tensor,
        key: torch.Tensor,
        value: torch.Tensor,
        scaling: float | None,
        softcap: float | None,
        first: int,
    ) -> LayerCall:
        windowed = layer in self._subject.identity.sliding_window_layers
        return LayerCall(
            layer=layer,
            query=query,
            key=key,
            value=value,
            scale=query.shape[-1] ** -0.5 if scaling is None else scaling,
            softcap=softcap or 0.0,
            first=first,
            window=self._subject.window if windowed else 0,
        )

    @contextmanager
    def _recording(self) -> Iterator[None]:
        """Keeps what every decoder layer gives for the last rows, so that runs can start behind it."""

        def keep(index: int) -> Callable[..., None]:
            def hook(_: torch.nn.Module, __: Any, output: Any) -> None:
                hidden = output if isinstance(output, torch.Tensor) else output[0]
                last = hidden[:, self.first :].clone()
                self._layer_outputs[index] = last if isinstance(output, torch.Tensor) else (last, *output[1:])

            return hook

        with ExitStack() as stack:
            for index, layer in enumerate(self._layers):
                handle = layer.register_forward_hook(keep(index))
                stack.callback(handle.remove)
            yield

    @contextmanager
    def _skipping(self, count: int) -> Iterator[None]:
        """Within it, the first ``count`` decoder layers give what they gave in the dense pass."""
        with ExitStack() as stack:
            for index, layer in enumerate(self._layers[:count]):
                before = layer.__dict__.get("forward")
                layer.forward = lambda *_, index=index, **__: self._layer_outputs[index]
                stack.callback(_restore_forward, layer, before)
            yield


def _decoder_layers(decoder: Any, count: int) -> list[torch.nn.Module]:
    """The decoder's layers; [] where they can't be told, so that runs start at the first."""
    lists = [m for m in decoder.modules() if isinstance(m, torch.nn.ModuleList) and len(m) == count]
    return list(lists[0]) if len(lists) == 1 else []


def _restore_forward(layer: torch.nn.Module, before: Any) -> None:
    if before is None:
        del layer.forward
    else:
        layer.forward = before
