"""What skipping costs: the last rows of a sequence run again with sparse layers, after a dense prefill.

That is what decoding does: the prompt's K and V come from dense attention, the decoded rows' from sparse ones. The
dense pass is made once; each run repeats only the last rows, from the first sparse layer on.
"""

import math
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from typing import Any, Protocol

import torch
from transformers.integrations.sdpa_attention import sdpa_attention_forward
from transformers.modeling_outputs import BaseModelOutputWithPast

from topt_vllm.calibration.capture import selected
from topt_vllm.calibration.model import Subject
from topt_vllm.calibration.options import CalibrationError
from topt_vllm.calibration.scores import LayerCall, attend

# Logits held at once, [rows, vocabulary]: 128 MiB in float32.
_LOGITS = 1 << 25


class Selector(Protocol):
    """Chooses V rows in some layers; :class:`~topt_vllm.calibration.quality.ThresholdTally` is one."""

    @property
    def layers(self) -> list[int]: ...

    def select(
        self, layer: int, scores: torch.Tensor, probabilities: torch.Tensor, rows: torch.Tensor, part: slice
    ) -> torch.Tensor: ...


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
        self._model = model
        self._decoder = model.base_model
        self._subject = subject
        tokens = torch.tensor([sequence], device=model.device)
        inputs = tokens[:, :-1]
        self.length = inputs.shape[1]
        self.first = self.length - count
        self.rows = torch.arange(self.first, self.length)
        self._inputs = inputs[:, self.first :]
        self._targets = tokens[0, self.first + 1 :]
        self._prefix: dict[int, tuple[torch.Tensor, torch.Tensor]] = {}
        self._layer_outputs: dict[int, Any] = {}
        self._dense_whole: torch.Tensor | None = None
        self._layers = _decoder_layers(self._decoder, subject.identity.num_layers)
        with torch.inference_mode(), self._recording(), selected(self._decoder, self._record):
            hidden = self._decoder(input_ids=inputs, use_cache=False)[0]
            self._dense = hidden[:, self.first :].clone()
            self._dense_nll = self._nll(self._dense)
        if not math.isfinite(self._dense_nll):
            raise CalibrationError(
                f"dense attention predicts the held-back text with a loss of {self._dense_nll}; "
                "the weights are broken or --dtype is too narrow for this model"
            )

    @property
    def dense_nll(self) -> float:
        """Mean negative log likelihood under dense attention (nats)."""
        return self._dense_nll

    def run(self, selector: Selector) -> Losses:
        """Runs the last rows with the selector's layers sparse."""
        first = min(selector.layers, default=self._subject.identity.num_layers)

        def attention(module: torch.nn.Module, *tensors: Any, **kwargs: Any) -> tuple[torch.Tensor, None]:
            return self._attend(selector, module, *tensors, **kwargs)

        positions = self.rows.to(self._inputs.device)[None]
        with torch.inference_mode(), self._skipping(first), selected(self._decoder, attention):
            output = self._decoder(input_ids=self._inputs, position_ids=positions, use_cache=False)
            return self._compare(output[0])

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

    def _compare(self, hidden: torch.Tensor) -> Losses:
        nll = kl = agreement = 0.0
        for part in self._parts():
            dense = self._dense_log_probabilities(part)
            found = self._log_probabilities(hidden, part)
            nll -= float(found.gather(1, self._targets[part, None]).double().sum())
            agreement += int((found.argmax(dim=-1) == dense.argmax(dim=-1)).sum())
            kl += float((dense.exp() * (dense - found)).sum(dtype=torch.float64))
        count = len(self._targets)
        return Losses(nll / count - self._dense_nll, kl / count, agreement / count)


class _Given(torch.nn.Module):
    """Stands in for a decoder whose output is known."""

    def __init__(self, hidden: torch.Tensor) -> None:
        super().__init__()
        self._hidden = hidden

    def forward(self, *_: Any, **__: Any) -> BaseModelOutputWithPast:
        return BaseModelOutputWithPast(last_hidden_state=self._hidden)


def _decoder_layers(decoder: Any, count: int) -> list[torch.nn.Module]:
    """The decoder's layers; [] where they can't be told, so that runs start at the first."""
    lists = [m for m in decoder.modules() if isinstance(m, torch.nn.ModuleList) and len(m) == count]
    return list(lists[0]) if len(lists) == 1 else []


def _restore_forward(layer: torch.nn.Module, before: Any) -> None:
    if before is None:
        del layer.forward
    else:
        layer.forward = before
