"""A model's attention under rules, through transformers' AttentionInterface.

The layers that have a rule compute their scores chunk by chunk, so no [H, n, n] tensor is made; the others, and
rows below the first context of the rules, run transformers' own SDPA. Every row attends as a decoded row would:
with its rule, to all tokens before it, which are in turn what sparse rows made of them.
"""

from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, fields
from typing import Any

import torch
from transformers.integrations.sdpa_attention import sdpa_attention_forward

from topt_vllm.calibration.capture import REFUSED, selected, visible_keys
from topt_vllm.calibration.options import CalibrationError
from topt_vllm.evaluation.rules.base import Rows, Rule, attend
from topt_vllm.model_identity import ModelIdentity

# Scores of one chunk, [H, rows, m]: 8 MiB in float32, so that what is made of them stays in a CPU's cache.
_CHUNK_ELEMENTS = 1 << 21


@dataclass
class Counts:
    """What was read, over rows whose context reaches the first one of the rules.

    All layers count: dense ones read everything, those with a sliding window read their window and have no more.

    Attributes:
        v_rows: (KV head, key) pairs in context.
        v_rows_read: Pairs whose V row some head of the group keeps.
        elements: (query head, key) pairs in context.
        elements_kept: Pairs that the head's own rule keeps.
        dropped: Probability not multiplied with V, summed over query heads and rows of layers with a rule.
        sparse: (query head, row) pairs of layers with a rule.
    """

    v_rows: int = 0
    v_rows_read: int = 0
    elements: int = 0
    elements_kept: int = 0
    dropped: float = 0.0
    sparse: int = 0

    def add(self, other: "Counts") -> None:
        """Adds what another run counted."""
        for field in fields(self):
            setattr(self, field.name, getattr(self, field.name) + getattr(other, field.name))

    def shares(self) -> dict[str, float]:
        """``v_rows_read`` and ``elements_kept`` as shares, ``dropped_mass`` as a mean over query heads."""
        return {
            "v_rows_read": self.v_rows_read / self.v_rows,
            "elements_kept": self.elements_kept / self.elements,
            "dropped_mass": self.dropped / self.sparse if self.sparse else 0.0,
        }


class RuleAttention:
    """The attention function of a run; see :func:`attending`."""

    def __init__(
        self, identity: ModelIdentity, rules: Mapping[int, Rule], first_context: int, window: int = 0
    ) -> None:
        """
        Args:
            identity: Of the model.
            rules: By layer, without sliding-window layers; a layer without one is dense.
            first_context: Rows with a shorter context are dense and not counted (tokens).
            window: Tokens that sliding-window layers attend to at most.

        Raises:
            ValueError: A rule for a layer that the model doesn't have or that has a sliding window.
        """
        allowed = set(range(identity.num_layers)) - set(identity.sliding_window_layers)
        if not set(rules) <= allowed:
            raise ValueError(f"rules for layers {sorted(set(rules) - allowed)}, which can't have one")
        self.counts = Counts()
        self._identity = identity
        self._rules = rules
        self._first = first_context
        self._window = window
        self._windowed = set(identity.sliding_window_layers)

    def __call__(
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
        layer = module.layer_idx
        m, count = key.shape[2], query.shape[2]
        contexts = torch.arange(m - count + 1, m + 1, device=query.device)
        rule = self._rules.get(layer)
        if layer not in self._windowed:
            _check_arguments(layer, m, kwargs)
        dense = count if rule is None else int((contexts < self._first).sum())
        scale = query.shape[-1] ** -0.5 if scaling is None else scaling
        out = query.new_empty(1, count, query.shape[1], value.shape[-1])
        if dense and not softcap:
            out[:, :dense] = _sdpa(module, query, key, value, attention_mask, dense, scaling, kwargs)
        elif dense:
            visible = None if attention_mask is None else visible_keys(attention_mask)
            for part, rows in _chunks(query, key, contexts[:dense], layer, scale, softcap, visible):
                weights = rows.by_group(torch.softmax(rows.scores, dim=-1)).flatten(1, 2)
                result = weights @ value[0, :, : rows.scores.shape[-1]].float()
                out[0, part] = result.view(query.shape[1], -1, value.shape[-1]).transpose(0, 1).to(out.dtype)
        self._count_dense(layer, contexts[:dense], query.shape[1], key.shape[1])
        if rule is not None and dense < count:
            self._sparse(rule, out, query[:, :, dense:], key, value, contexts[dense:], layer, scale, softcap)
        return out, None

    def _sparse(
        self,
        rule: Rule,
        out: torch.Tensor,
        query: torch.Tensor,
        key: torch.Tensor,
        value: torch.Tensor,
        contexts: torch.Tensor,
        layer: int,
        scale: float,
        softcap: float | None,
    ) -> None:
        counts, heads, kv_heads = self.counts, query.shape[1], key.shape[1]
        first = out.shape[1] - len(contexts)
        sums = value[0].float().cumsum(dim=1)
        for part, rows in _chunks(query, key, contexts, layer, scale, softcap, None):
            means = sums[:, rows.contexts - 1] / rows.contexts[:, None]
            found = attend(rule, rows, value[0, :, : rows.scores.shape[-1]], means)
            out[0, first + part.start : first + part.stop] = found.out.transpose(0, 1).to(out.dtype)
            counts.elements_kept += found.kept
            counts.v_rows_read += found.read
            counts.dropped += found.dropped
        context = int(contexts.sum())
        counts.elements += heads * context
        counts.v_rows += kv_heads * context
        counts.sparse += heads * len(contexts)

    def _count_dense(self, layer: int, contexts: torch.Tensor, heads: int, kv_heads: int) -> None:
        counted = contexts[contexts >= self._first]
        if layer in self._windowed:
            counted = counted.clamp(max=self._window)
        context = int(counted.sum())
        self.counts.elements += heads * context
        self.counts.elements_kept += heads * context
        self.counts.v_rows += kv_heads * context
        self.counts.v_rows_read += kv_heads * context


@contextmanager
def attending(
    model: Any, identity: ModelIdentity, rules: Mapping[int, Rule], first_context: int, window: int = 0
) -> Iterator[Counts]:
    """Within it, ``model`` attends under ``rules``; gives the counts, which grow with each forward pass.

    Args:
        model: A transformers model; run it with a batch of one sequence, with or without a cache.
        identity: Of the model.
        rules: By layer; {} for dense attention.
        first_context: Rows with a shorter context are dense and not counted (tokens).
        window: Tokens that sliding-window layers attend to at most.
    """
    attention = RuleAttention(identity, rules, first_context, window)
    with selected(model, attention):
        yield attention.counts


def _check_arguments(layer: int, m: int, kwargs: dict[str, Any]) -> None:
    refused = [name for name in REFUSED if kwargs.get(name) is not None]
    window = kwargs.get("sliding_window")
    if window is not None and window < m:
        refused.append(f"sliding_window={window}")
    if refused:
        raise CalibrationError(
            f"layer {layer} attends with {', '.join(refused)}, but its configuration says full causal attention; "
            "such models are not supported"
        )


def _sdpa(
    module: torch.nn.Module,
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    mask: torch.Tensor | None,
    dense: int,
    scaling: float | None,
    kwargs: dict[str, Any],
) -> torch.Tensor:
    """The first ``dense`` rows, [1, dense, H, Dv]; they see no key that only later rows see."""
    seen = key.shape[2] - query.shape[2] + dense
    if mask is not None:
        mask = mask[:, :, :dense, :seen]
    part = query[:, :, :dense], key[:, :, :seen], value[:, :, :seen]
    return sdpa_attention_forward(module, *part, mask, scaling=scaling, **kwargs)[0]


def _chunks(
    query: torch.Tensor,
    key: torch.Tensor,
    contexts: torch.Tensor,
    layer: int,
    scale: float,
    softcap: float | None,
    visible: torch.Tensor | None,
) -> Iterator[tuple[slice, Rows]]:
    """Rows [1, H, r, D] in parts whose scores fit in memory; ``visible`` bool [r, m] stands for plain causality."""
    start = 0
    while start < len(contexts):
        step = max(1, _CHUNK_ELEMENTS // (query.shape[1] * (int(contexts[start]) + 256)))
        part = slice(start, min(start + step, len(contexts)))
        yield part, rows_of(query[0], key[0], contexts, part, layer, scale, softcap, visible)
        start = part.stop


def rows_of(
    query: torch.Tensor,
    key: torch.Tensor,
    contexts: torch.Tensor,
    part: slice | torch.Tensor,
    layer: int,
    scale: float,
    softcap: float | None = None,
    visible: torch.Tensor | None = None,
) -> Rows:
    """Scores of some query rows: ``part`` of those in query [H, n, D], with contexts int64 [n], ascending.

    Args as in :class:`topt_vllm.calibration.scores.LayerCall`; key is [Hkv, m, D], and ``visible``, bool [n, m], is
    what rows see, None for all keys of their context.
    """
    chosen = contexts[part]
    m = int(chosen[-1])
    taken, keys = query[:, part].float().contiguous(), key[:, :m].float()
    scores = (taken.view(key.shape[0], -1, taken.shape[-1]) @ keys.transpose(1, 2)).mul_(scale)
    if softcap:
        scores.div_(softcap).tanh_().mul_(softcap)
    scores = scores.view(query.shape[0], len(chosen), m)
    unseen = torch.arange(m, device=key.device) >= chosen[:, None] if visible is None else ~visible[part, :m]
    scores.masked_fill_(unseen, float("-inf"))
    return Rows(layer, scores, chosen, taken, keys)
