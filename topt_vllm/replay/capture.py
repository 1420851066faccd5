"""Looks into a transformers model's attention layers through transformers' AttentionInterface.

The model runs as it always does: the output of a layer is that of transformers' own SDPA function, or of vLLM's
kernel for long contexts. Only softcaps and attention sinks, which SDPA drops, are computed here.
"""

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch
from transformers import AttentionInterface, AttentionMaskInterface
from transformers.integrations.sdpa_attention import sdpa_attention_forward
from transformers.masking_utils import sdpa_mask

from topt_vllm.replay.long_contexts import attend_by_vllm
from topt_vllm.replay.options import ReplayError
from topt_vllm.replay.rule import attend
from topt_vllm.replay.scores import LayerCall

NAME = "toptheta_capture"

# Arguments that change the scores or the softmax in ways that a threshold on q·k knows nothing of.
_REFUSED = ("position_bias",)

# Query rows that a layer whose rows see few keys attends for at once.
_MASKED_ROWS = 1024

Observer = Callable[[LayerCall], None]


@dataclass(frozen=True)
class Asked:
    """What a layer asks of transformers' attention function.

    Attributes:
        module: The layer's attention.
        query: [B, H, r, D].
        key: [B, Hkv, n, D].
        value: [B, Hkv, n, Dv].
        mask: [1, 1 or H, r, n], boolean or additive; None for plain causal attention.
        scaling: Factor of q·k; None for D^-0.5.
        softcap: Logits softcap; None for none.
        more: Arguments by name that some models have.
    """

    module: Any
    query: torch.Tensor
    key: torch.Tensor
    value: torch.Tensor
    mask: torch.Tensor | None
    scaling: float | None
    softcap: float | None
    more: dict[str, Any]

    @property
    def layer(self) -> int:
        """Index in the model."""
        return int(self.module.layer_idx)

    @property
    def refused(self) -> list[str]:
        """What it asks for beside causal attention, masks and windows apart."""
        refused = [name for name in _REFUSED if self.more.get(name) is not None]
        causal = self.more.get("is_causal")
        if not (getattr(self.module, "is_causal", True) if causal is None else causal):
            refused.append("is_causal=False")
        return refused

    def call(self, index: int = 0, **instead: Any) -> LayerCall:
        """One sequence of the batch; ``instead`` are attributes of the call that aren't what was asked with."""
        given = {
            "query": self.query[index],
            "key": self.key[index],
            "value": self.value[index],
            "scale": self.query.shape[-1] ** -0.5 if self.scaling is None else self.scaling,
            "softcap": self.softcap or 0.0,
            "sinks": self.more.get("s_aux"),
        }
        return LayerCall(self.layer, **given | instead)

    def by_torch(self, *tensors: torch.Tensor | None, **instead: Any) -> torch.Tensor:
        """transformers' own attention of query, key, value and mask, [1, r, H, Dv], with arguments as asked for."""
        more = self.more | {"scaling": self.scaling} | instead
        return sdpa_attention_forward(self.module, *tensors, **more)[0]


Attention = Callable[[Asked], torch.Tensor]
"""What attends: its output is [B, r, H, Dv]."""


def can_be_captured(model: Any) -> bool:
    """Whether the model takes its attention from the AttentionInterface; a model on the meta device will do."""
    with selected(model, _never):
        return model.config.get_text_config()._attn_implementation == NAME


def _never(asked: Asked) -> torch.Tensor:
    raise AssertionError("the model isn't run")


@contextmanager
def selected(model: Any, attention: Attention) -> Iterator[None]:
    """Within it, ``model`` attends with the function ``attention``, which gets the masks of SDPA."""

    def function(
        module: torch.nn.Module,
        query: torch.Tensor,
        key: torch.Tensor,
        value: torch.Tensor,
        attention_mask: torch.Tensor | None,
        scaling: float | None = None,
        softcap: float | None = None,
        **more: Any,
    ) -> tuple[torch.Tensor, None]:
        asked = Asked(module, query, key, value, attention_mask, scaling, softcap, more)
        return attention(asked), None

    before = model.config._attn_implementation
    AttentionInterface.register(NAME, function)
    # None for plain causal attention, so no [n, n] tensor is made.
    AttentionMaskInterface.register(NAME, sdpa_mask)
    try:
        model.set_attn_implementation(NAME)
        yield
    finally:
        model.set_attn_implementation(before)
        AttentionInterface._global_mapping.pop(NAME)
        AttentionMaskInterface._global_mapping.pop(NAME)


def visible_keys(mask: torch.Tensor) -> torch.Tensor:
    """bool [n, n] from a mask [1, 1 or H, n, n], boolean or additive."""
    first = mask[0, 0]
    return first if first.dtype == torch.bool else first > torch.finfo(first.dtype).min / 2


def whole_sequence(asked: Asked, call: LayerCall) -> torch.Tensor:
    """Dense attention of a whole sequence, [1, n, H, Dv]: transformers' own, wherever it computes what is asked.

    Under a mask, rows are attended part by part, each with the keys that it sees: in a layer with a sliding window
    those are few, and all n × n pairs would cost many times as much.

    Args:
        asked: For the mask and further arguments.
        call: The sequence, or its first rows.
    """
    if not call.plain:
        return attend(call, None).transpose(0, 1).unsqueeze(0)
    query, key, value = call.query[None], call.key[None], call.value[None]
    if asked.mask is None:
        by_vllm = None if asked.refused else attend_by_vllm(call)
        return asked.by_torch(query, key, value, None) if by_vllm is None else by_vllm
    length = query.shape[2]
    mask = asked.mask[..., :length, :length]
    seen = visible_keys(mask)
    outputs = []
    for start in range(0, len(seen), _MASKED_ROWS):
        rows = slice(start, start + _MASKED_ROWS)
        indices = seen[rows].any(dim=0).nonzero()
        keys = slice(int(indices[0]), int(indices[-1]) + 1)
        tensors = query[:, :, rows], key[:, :, keys], value[:, :, keys], mask[:, :, rows, keys]
        outputs.append(asked.by_torch(*tensors))
    return torch.cat(outputs, dim=1)


def check_plain_causal(asked: Asked, call: LayerCall, mask: torch.Tensor | None) -> None:
    """Raises ReplayError where a row of a whole pass sees other keys than all up to its own, or its window.

    Args:
        asked: For further arguments.
        call: What the layer was called with.
        mask: bool [n, n]; None where the module says that it is causal.
    """
    refused = asked.refused
    window = asked.more.get("sliding_window")
    if window is not None and window < call.query.shape[1] and window != call.window:
        refused.append(f"sliding_window={window}")
    if asked.mask is not None and _has_biases(asked.mask):
        refused.append("a mask with biases, or one for each head")
    if mask is not None and not _sees_window(mask, call.window):
        refused.append("a mask that isn't its window's" if call.window else "a mask that isn't causal")
    if refused:
        kind = f"attention in a window of {call.window}" if call.window else "full causal attention"
        raise ReplayError(
            f"layer {call.layer} attends with {', '.join(refused)}, but its configuration says {kind}; "
            "such models are not supported"
        )


def _has_biases(mask: torch.Tensor) -> bool:
    """Whether a mask [1, 1 or H, n, n] says more than which keys are seen."""
    if mask.dtype == torch.bool:
        return mask.shape[1] > 1
    hidden = torch.finfo(mask.dtype).min / 2
    rows = mask[0, 0].split(_MASKED_ROWS)
    return mask.shape[1] > 1 or any(bool(((part != 0) & (part > hidden)).any()) for part in rows)


def _sees_window(mask: torch.Tensor, window: int) -> bool:
    """Whether each row of bool [n, n] sees its last ``window`` keys, or all for 0; part by part: n is large."""
    keys = torch.arange(mask.shape[1], device=mask.device)
    for rows in keys.split(_MASKED_ROWS):
        expected = keys <= rows[:, None]
        if window:
            expected &= keys > rows[:, None] - window
        if not torch.equal(mask[rows[0] : rows[-1] + 1], expected):
            return False
    return True
