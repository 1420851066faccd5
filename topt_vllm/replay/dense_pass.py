"""One dense pass over a sequence, kept so that parts of it can be decoded again behind a dense prompt.

That is what a server does: the prompt's K and V come from dense attention, the decoded rows' from whatever attends
to them.
"""

from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager, nullcontext
from functools import partial
from typing import Any

import torch

from topt_vllm.replay.attention import RuleAttention
from topt_vllm.replay.capture import (
    Asked,
    Observer,
    check_plain_causal,
    selected,
    visible_keys,
    whole_sequence,
)
from topt_vllm.replay.causal_lm import CausalLM, replaced
from topt_vllm.replay.long_contexts import attend_by_vllm
from topt_vllm.replay.model import Subject
from topt_vllm.replay.options import ReplayError
from topt_vllm.replay.rule import attend
from topt_vllm.replay.scores import LayerCall
from topt_vllm.table.layers import Heads


class DensePass:
    """K and V of every layer, and what the decoder's layers gave for chosen rows.

    Attributes:
        length: Rows of the pass (tokens).
        model: The model, and what follows its decoder.
        subject: What is known about it.
        cache: K and V of each layer, [Hkv, n, D] and [Hkv, n, Dv].
    """

    def __init__(
        self,
        model: Any,
        subject: Subject,
        tokens: list[int],
        spans: tuple[range, ...] = (),
        observe: Observer | None = None,
    ) -> None:
        """Makes the pass.

        Args:
            model: A transformers causal language model.
            subject: What is known about it.
            tokens: All of them are run.
            spans: Rows of later :class:`~topt_vllm.replay.replay.Replay` objects.
            observe: Is shown the layers without a window.

        Raises:
            ReplayError: A layer attends in a way that its configuration doesn't say.
        """
        self.length = len(tokens)
        self.model = CausalLM(model)
        self.subject = subject
        # Where layers attend to K and V of earlier ones, or states are handed on, all have to run.
        self._layers = (
            []
            if subject.shares_kv or subject.stateful
            else _decoder_layers(model, subject.identity.num_layers)
        )
        self.cache: dict[int, tuple[torch.Tensor, torch.Tensor]] = {}
        self._outputs: dict[tuple[range, int], Any] = {}
        self._checked: dict[int, torch.Tensor | None] = {}
        self._seen: set[int] = set()
        self._tokens = torch.tensor([tokens], device=model.device)
        record = partial(self._record, observe)
        with torch.inference_mode(), self._recording(spans), selected(model, record):
            hidden = self.model.hidden(self._tokens)
        del self._checked
        without = sorted(set(subject.attention_layers) - self._seen)
        if without:
            raise ReplayError(
                f"layers {without} don't call the AttentionInterface, so that nothing can be decoded behind what "
                "they have seen; such models are not supported"
            )
        self._hidden = {span: hidden[:, span.start : span.stop].clone() for span in spans}

    def hidden(self, span: range) -> torch.Tensor:
        """The decoder's dense output for one of the spans, [1, r, hidden size]."""
        return self._hidden[span]

    def decode(
        self,
        inputs: torch.Tensor,
        first: int,
        attention: RuleAttention | None = None,
        span: range | None = None,
    ) -> torch.Tensor:
        """The decoder's output for tokens that follow the first ``first`` ones of the pass.

        Args:
            inputs: int64 [B, r], continuations of equal length, each by itself.
            first: Tokens of the dense prompt.
            attention: Of its layers; None for dense attention.
            span: One of the spans, whose tokens ``inputs`` are: layers before the first sparse one, which can only
                give what they gave, aren't run.

        Returns:
            [B, r, hidden size].
        """
        sparse = attention.layers if attention is not None else []
        known = min(sparse, default=self.subject.identity.num_layers)
        skipping = nullcontext() if span is None else self._skipping(known, span)
        function = partial(self._attend, attention, first)
        with torch.inference_mode(), skipping, selected(self.model.model, function):
            return self.model.hidden(inputs, first)

    def _record(self, observe: Observer | None, asked: Asked) -> torch.Tensor:
        window = self.subject.window_of(asked.layer)
        call = asked.call(window=window)
        # Layers of a kind are given the same mask.
        known = asked.mask is None or asked.mask is self._checked.get(window)
        check_plain_causal(asked, call, None if known else visible_keys(asked.mask))
        self._check_call(call)
        self._checked[window] = asked.mask
        self._seen.add(call.layer)
        self._keep(call)
        if observe is not None and not window:
            observe(call)
        return whole_sequence(asked, call)

    def _check_call(self, call: LayerCall) -> None:
        """What later runs take for granted: one call, and the heads by which V rows are counted."""
        if call.layer in self._seen:
            raise ReplayError(
                f"layer {call.layer} attends more than once for each token; such models are not supported"
            )
        identity = self.subject.identity
        expected = Heads(identity.num_query_heads, self.subject.kv_heads_of(call.layer), identity.head_dim)
        found = Heads(call.query.shape[0], call.key.shape[0], call.query.shape[2])
        # Windowed layers may have other heads, of which only the number of V rows matters.
        if found.kv != expected.kv or (found != expected and not call.window):
            raise ReplayError(
                f"layer {call.layer} has {found}, but its configuration says {expected}; such models are not "
                "supported"
            )

    def _keep(self, call: LayerCall) -> None:
        """Keeps what later runs need of a layer."""
        self.cache[call.layer] = call.key.contiguous(), call.value.contiguous()

    def _attend(self, attention: RuleAttention | None, first: int, asked: Asked) -> torch.Tensor:
        window = self.subject.window_of(asked.layer)
        # Keys that even the first row no longer sees are left out.
        start = max(0, first - window + 1) if window else 0
        before = [tensor[:, start:first] for tensor in self.cache[asked.layer]]
        outputs = []
        for index in range(len(asked.query)):
            key = torch.cat([before[0], asked.key[index]], dim=1)
            value = torch.cat([before[1], asked.value[index]], dim=1)
            call = asked.call(index, key=key, value=value, first=first - start, window=window)
            outputs.append(attended(attention, asked, call))
        return torch.stack(outputs)

    @contextmanager
    def _recording(self, spans: tuple[range, ...]) -> Iterator[None]:
        """Keeps what every decoder layer gives for the spans, so that runs can start behind it."""

        def keep(index: int) -> Callable[..., None]:
            def hook(_: torch.nn.Module, __: Any, output: Any) -> None:
                hidden = output if isinstance(output, torch.Tensor) else output[0]
                if hidden.shape[:2] != (1, self.length):  # no rows of the sequence alone
                    return
                for span in spans:
                    part = hidden[:, span.start : span.stop].clone()
                    self._outputs[span, index] = (
                        part if isinstance(output, torch.Tensor) else (part, *output[1:])
                    )

            return hook

        with ExitStack() as stack:
            for index, layer in enumerate(self._layers):
                handle = layer.register_forward_hook(keep(index))
                stack.callback(handle.remove)
            yield

    @contextmanager
    def _skipping(self, count: int, span: range) -> Iterator[None]:
        """Within it, the first ``count`` decoder layers give what they gave in the dense pass."""
        with ExitStack() as stack:
            for index, layer in enumerate(self._layers[:count]):
                if (span, index) not in self._outputs:
                    break
                stack.enter_context(replaced(layer, self._outputs[span, index]))
            yield


def attended(attention: RuleAttention | None, asked: Asked, call: LayerCall) -> torch.Tensor:
    """Attention of the call's rows, [r, H, Dv].

    Args:
        attention: Of the layers that have a rule; None for dense attention everywhere.
        asked: What the layer asked for.
        call: The same of one sequence, with what lies before it.
    """
    if attention is not None and call.layer in attention.layers:
        return attention.attend(call).transpose(0, 1)
    if not call.plain:
        return attend(call, None).transpose(0, 1)
    by_vllm = attend_by_vllm(call)
    if by_vllm is not None:
        return by_vllm[0]
    rows = torch.arange(call.first, call.key.shape[1], device=call.query.device)
    tensors = call.query[None], call.key[None], call.value[None], call.visible(rows)[None, None]
    # The mask says all: the rows are the last of the sequence, which is_causal can't express.
    return asked.by_torch(*tensors, is_causal=False)[0]


def _decoder_layers(model: Any, count: int) -> list[torch.nn.Module]:
    """The decoder's layers; [] where they can't be told, so that runs start at the first."""
    lists = (
        m for m in model.get_decoder().modules() if isinstance(m, torch.nn.ModuleList) and len(m) == count
    )
    # Experts of a layer may be as many.
    layers = (m for m in lists if any(hasattr(part, "layer_idx") for part in m[0].modules()))
    return list(next(layers, ()))
