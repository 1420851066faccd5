"""Attention under rules for a replay, and what it reads."""

from collections.abc import Mapping
from dataclasses import dataclass, field, fields
from threading import Lock

import torch

from topt_vllm.replay.model import Subject
from topt_vllm.replay.rule import Outcome, Rows, Rule, attend
from topt_vllm.replay.scores import LayerCall
from topt_vllm.table.schema import keys_asked


def _nothing() -> torch.Tensor:
    return torch.zeros((), dtype=torch.int64)


@dataclass
class Counts:
    """What was read by the decoded rows.

    All layers with attention count: dense ones read everything, those with a sliding window read their window and
    have no more.

    Attributes:
        v_rows: (KV head, key) pairs in context.
        v_rows_read: Pairs whose V row some head of the group keeps.
        elements: (query head, key) pairs in context.
        elements_kept: Pairs that the head's own rule keeps.
        dropped: Probability not multiplied with V, summed over query heads and rows of layers with a rule.
        sparse: (query head, row) pairs of layers with a rule.
        k_rows_read: K that is read, in rows of it; what a screen streams counts by its bytes, K being of 16 bits.
        layer_rows: int64 [layers], ``v_rows`` by layer.
        layer_candidates: int64 [layers], those of them that a K screen lets through; all without one.
    """

    v_rows: int = 0
    v_rows_read: int = 0
    elements: int = 0
    elements_kept: int = 0
    dropped: float = 0.0
    sparse: int = 0
    k_rows_read: float = 0.0
    layer_rows: torch.Tensor = field(default_factory=_nothing)
    layer_candidates: torch.Tensor = field(default_factory=_nothing)

    def add(self, other: "Counts") -> None:
        """Adds what another run counted."""
        for part in fields(self):
            setattr(self, part.name, getattr(self, part.name) + getattr(other, part.name))

    def shares(self) -> dict[str, float]:
        """``v_rows_read`` and ``elements_kept`` as shares, ``dropped_mass`` as a mean over query heads."""
        return {
            "v_rows_read": self.v_rows_read / self.v_rows,
            "elements_kept": self.elements_kept / self.elements,
            "dropped_mass": self.dropped / self.sparse if self.sparse else 0.0,
        }

    @property
    def candidates_by_layer(self) -> list[float]:
        """Share of the keys in context that a K screen lets through; 1 where a layer has none."""
        shares = self.layer_candidates.double() / self.layer_rows
        return torch.where(self.layer_rows > 0, shares, 1.0).tolist()

    @property
    def candidates(self) -> float:
        """The same over all layers."""
        return float(self.layer_candidates.sum()) / self.v_rows

    @property
    def kv_bytes_read(self) -> float:
        """Bytes read over those of all K and V in context, rows of K and V being of one size."""
        return (self.k_rows_read + self.v_rows_read) / (2 * self.v_rows)


class RuleAttention:
    """The attention of one run of a :class:`~topt_vllm.replay.replay.Replay`.

    Attributes:
        counts: Of the run, dense layers included.
        kept_over_k: Keys that a head keeps over those that the budget asks for, by layer: float32 [H, rows] of each
            part of the rows.
    """

    def __init__(
        self,
        subject: Subject,
        rules: Mapping[int, Rule],
        contexts: torch.Tensor,
        ks: Mapping[int, list[int]] | None = None,
    ) -> None:
        """
        Args:
            subject: The model.
            rules: By layer with full attention; a layer without one is dense.
            contexts: int64 [r], of the decoded rows.
            ks: Keys that each query head should keep, by layer, where a budget says so.

        Raises:
            ValueError: A rule for a layer that the model doesn't have or that hasn't full attention.
        """
        wrong = sorted(set(rules) - set(subject.full_layers))
        if wrong:
            raise ValueError(f"rules for layers {wrong}, which can't have one")
        self.kept_over_k: dict[int, list[torch.Tensor]] = {}
        self._rules = rules
        self._ks = ks or {}
        self._lock = Lock()
        self._v_rows = subject.v_rows(contexts)
        self._read = dict.fromkeys(rules, 0)
        heads, seen = subject.identity.num_query_heads, subject.keys_seen(contexts)
        dense = sum(self._v_rows) - sum(self._v_rows[layer] for layer in rules)
        layer_rows = torch.tensor(self._v_rows)
        candidates = layer_rows.clone()
        candidates[list(rules)] = 0
        self.counts = Counts(
            v_rows=sum(self._v_rows),
            v_rows_read=dense,
            elements=heads * sum(seen),
            elements_kept=heads * (sum(seen) - sum(seen[layer] for layer in rules)),
            sparse=heads * len(rules) * len(contexts),
            k_rows_read=dense,
            layer_rows=layer_rows,
            layer_candidates=candidates,
        )

    @property
    def layers(self) -> list[int]:
        """Layers that have a rule, ascending."""
        return sorted(self._rules)

    def attend(self, call: LayerCall) -> torch.Tensor:
        """Output of the decoded rows, [H, r, Dv]."""

        def count(rows: Rows, found: Outcome) -> None:
            with self._lock:
                self._read[call.layer] += found.read
                self.counts.v_rows_read += found.read
                self.counts.elements_kept += int(found.kept.sum())
                self.counts.dropped += found.dropped
                self.counts.k_rows_read += found.k_rows
                self.counts.layer_candidates[call.layer] += found.candidates
                if call.layer in self._ks:
                    asked = keys_asked(torch.tensor(self._ks[call.layer])[:, None], rows.contexts.cpu())
                    self.kept_over_k.setdefault(call.layer, []).append(found.kept.cpu() / asked)

        return attend(call, self._rules[call.layer], count)

    def layer_rows_read(self) -> list[float]:
        """Share of V rows read by every layer of the model, in order; 1 where it has none."""
        return [
            self._read[layer] / rows if layer in self._read else 1.0
            for layer, rows in enumerate(self._v_rows)
        ]
