"""Attention under rules for a replay, and what it reads."""

from collections.abc import Mapping
from dataclasses import dataclass, fields
from threading import Lock

import torch

from topt_vllm.calibration.scores import LayerCall, for_each_part
from topt_vllm.evaluation.rules.base import Rows, Rule, attend
from topt_vllm.table.identity import ModelIdentity
from topt_vllm.table.schema import keys_asked


@dataclass
class Counts:
    """What was read by the decoded rows.

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
    """The attention of one run of a :class:`~topt_vllm.calibration.replay.Replay`.

    Attributes:
        counts: Of the run, dense layers included.
        kept_over_k: Keys that a head keeps over those that the budget asks for: float32, of each part of the rows.
        head_ratios: The same by layer, [H, rows] of each part.
    """

    def __init__(
        self,
        identity: ModelIdentity,
        rules: Mapping[int, Rule],
        contexts: torch.Tensor,
        window: int,
        ks: Mapping[int, list[int]] | None = None,
    ) -> None:
        """
        Args:
            identity: Of the model.
            rules: By layer, without sliding-window layers; a layer without one is dense.
            contexts: int64 [r], of the decoded rows.
            window: Tokens that sliding-window layers attend to at most.
            ks: Keys that each query head should keep, by layer, where a budget says so.

        Raises:
            ValueError: A rule for a layer that the model doesn't have or that has a sliding window.
        """
        windowed = set(identity.sliding_window_layers)
        allowed = set(range(identity.num_layers)) - windowed
        if not set(rules) <= allowed:
            raise ValueError(f"rules for layers {sorted(set(rules) - allowed)}, which can't have one")
        self.kept_over_k: list[torch.Tensor] = []
        self.head_ratios: dict[int, list[torch.Tensor]] = {}
        self._rules = rules
        self._ks = ks or {}
        self._lock = Lock()
        full, heads = int(contexts.sum()), identity.num_query_heads
        dense = (len(allowed) - len(rules)) * full + len(windowed) * int(contexts.clamp(max=window).sum())
        total = dense + len(rules) * full
        self.counts = Counts(
            v_rows=identity.num_kv_heads * total,
            v_rows_read=identity.num_kv_heads * dense,
            elements=heads * total,
            elements_kept=heads * dense,
            sparse=heads * len(rules) * len(contexts),
        )

    @property
    def layers(self) -> list[int]:
        """Layers that have a rule, ascending."""
        return sorted(self._rules)

    def attend(self, call: LayerCall) -> torch.Tensor:
        """Output of the decoded rows, [H, r, Dv]."""
        rule = self._rules[call.layer]
        decoded = torch.arange(call.first, call.key.shape[1], device=call.query.device)
        out = call.query.new_empty(*call.query.shape[:2], call.value.shape[-1])
        shared = rule.prepare(call.key)

        def compute(part: slice) -> None:
            rows = rows_of(call, decoded[part], shared)
            found = attend(rule, rows, call.values[:, : rows.scores.shape[-1]], call.means[:, part])
            out[:, part] = found.out.to(out.dtype)
            with self._lock:
                self.counts.elements_kept += int(found.kept.sum())
                self.counts.v_rows_read += found.read
                self.counts.dropped += found.dropped
                if call.layer in self._ks:
                    asked = keys_asked(torch.tensor(self._ks[call.layer])[:, None], rows.contexts.cpu())
                    ratios = found.kept.cpu() / asked
                    self.kept_over_k.append(ratios.flatten())
                    self.head_ratios.setdefault(call.layer, []).append(ratios)

        if rule.in_order:
            for part in call.chunks(decoded):
                compute(part)
        else:
            for_each_part(compute, call, decoded)
        return out


def rows_of(call: LayerCall, rows: torch.Tensor, shared: object) -> Rows:
    """Some query rows of a call: int64 [r], ascending indices in the sequence.

    Args:
        call: The layer.
        rows: The rows.
        shared: What the rule has prepared for the layer's keys.
    """
    contexts = rows + 1
    query = call.query[:, rows - call.first].float()
    return Rows(call.layer, call.scores(rows), contexts, query, call.key.shape[0], shared)
