"""A causal language model's own forward pass, without more of its logits than are asked for.

The model is never rebuilt from its parts: positions, masks, and what lies behind the decoder (projections, scales,
softcaps) are its own. Its decoder, the module that it calls for hidden states, is only listened to, or spoken for.
"""

from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from typing import Any

import torch
from transformers import Cache

from topt_vllm.replay.memory import give_back
from topt_vllm.replay.options import ReplayError


class CausalLM:
    """A transformers causal language model.

    Attributes:
        model: The model itself.
        device: Where tokens go.
    """

    def __init__(self, model: Any) -> None:
        self.model = model
        self.device = model.device
        # What a loss of routers asks for can't be had where layers aren't run.
        routed = hasattr(model.config.get_text_config(), "output_router_logits")
        self._plain = {"use_cache": False, **({"output_router_logits": False} if routed else {})}
        self._decoder: Any = None
        self._output: Any = None

    def hidden(self, tokens: torch.Tensor, first: int = 0) -> torch.Tensor:
        """What the decoder makes of tokens, [B, r, hidden size]; the head sees the last row only.

        Args:
            tokens: int64 [B, r].
            first: Tokens before them, whose K and V the attention function has to know.
        """
        if not first:
            give_back()
        found: list[torch.Tensor] = []
        with self._listening(found):
            self.model(input_ids=tokens, past_key_values=_Prompt(first) if first else None, **self._plain)
        if not found:
            raise ReplayError(
                f"{type(self.model).__name__} doesn't call its decoder; such models are not supported"
            )
        return found[0]

    def next_token(self, tokens: torch.Tensor, first: int) -> torch.Tensor:
        """Log probabilities of what follows one sequence: float32 [vocabulary]; arguments as for :meth:`hidden`."""
        logits = self.model(input_ids=tokens, past_key_values=_Prompt(first), **self._plain).logits
        return torch.log_softmax(logits[0, -1].float(), dim=-1)

    def log_probabilities(self, inputs: torch.Tensor, hidden: torch.Tensor) -> torch.Tensor:
        """Of the next token: float32 [r, vocabulary].

        Args:
            inputs: int64 [1, r], tokens of the rows.
            hidden: [1, r, hidden size], what :meth:`hidden` gave for them.
        """
        with replaced(self._decoder, _with_hidden(self._output, hidden)):
            logits = self.model(input_ids=inputs, **self._plain).logits
        return torch.log_softmax(logits[0].float(), dim=-1)

    @contextmanager
    def _listening(self, found: list[torch.Tensor]) -> Iterator[None]:
        """Takes what the decoder gives, and hands on its last row."""
        entered: list[torch.nn.Module] = []

        def enter(module: torch.nn.Module, *_: Any) -> None:
            entered.append(module)

        def leave(module: torch.nn.Module, _: Any, output: Any) -> Any:
            # Some models call their base model, others, such as OPT, the decoder inside it.
            if module is not entered[0]:
                return output
            found.append(output[0])
            self._decoder, self._output = module, _with_hidden(output, output[0][:, -1:].clone())
            return self._output

        with ExitStack() as stack:
            for module in {self.model.base_model, self.model.get_decoder()} - {self.model}:
                stack.callback(module.register_forward_pre_hook(enter).remove)
                stack.callback(module.register_forward_hook(leave).remove)
            yield


class _Prompt(Cache):
    """Tells a model how many tokens lie before its inputs, and holds none of them."""

    def __init__(self, length: int) -> None:
        super().__init__(layers=[])
        self._length = length

    def get_seq_length(self, layer_idx: int = 0) -> int:
        return self._length

    def get_mask_sizes(self, query_length: int, layer_idx: int) -> tuple[int, int]:
        return self._length + query_length, 0

    def update(self, key_states: torch.Tensor, value_states: torch.Tensor, *_: Any, **__: Any) -> Any:
        return key_states, value_states


@contextmanager
def replaced(module: torch.nn.Module, output: Any) -> Iterator[None]:
    """Within it, the module gives ``output``, whatever it is called with."""
    before = module.__dict__.get("forward")
    module.forward = lambda *_, **__: output
    try:
        yield
    finally:
        if before is None:
            del module.forward
        else:
            module.forward = before


def _with_hidden(output: Any, hidden: torch.Tensor) -> Any:
    """A decoder's output with other hidden states."""
    if isinstance(output, tuple):
        return hidden, *output[1:]
    return type(output)(**{**output, "last_hidden_state": hidden})
