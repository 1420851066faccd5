"""Top-Theta behind a K screen, as ``k_screen`` of the server has it (:mod:`topt_vllm.attention.screen`).

Idea: a 4-bit copy of K tells which keys can't reach θ; K of the others isn't read.
Rule: Top-Theta's, of candidates: keys whose score by plane one, plus the margin, reaches θ for some head of the
group, and the newest. Their scores are exact (``int4``) or what both planes say (``int4+4``); those of the others
are plane one's, in the softmax too. Rows of few keys read K in full.
Compensation: Top-Theta's.
Parameter: Top-Theta's; format, margin and the shortest context are fixed.
"""

from dataclasses import dataclass, replace

import torch

from topt_vllm.attention.screen import ScreenFormat, ScreenTransform
from topt_vllm.replay.rule import Rows, visible
from topt_vllm.replay.screening import ScreenedKeys, candidates
from topt_vllm.replay.top_theta import TopTheta

# float16 beside a row's codes: its step, and for hard bounds its error.
_BESIDE = 2


@dataclass(frozen=True)
class ScreenedTopTheta(TopTheta):
    """Top-Theta in one layer with a screen.

    Attributes:
        transform: What is calibrated of the layer's K.
        format: Of the screen.
        margin: Standard deviations of plane one's error; None for a hard bound.
        min_seq_len: As that of :class:`topt_vllm.attention.common.KeyScreen`.
    """

    transform: ScreenTransform
    format: ScreenFormat
    margin: float | None
    min_seq_len: int = 0

    def prepare(self, key: torch.Tensor) -> ScreenedKeys:
        return ScreenedKeys.of(self.transform, key)

    def see(self, rows: Rows) -> Rows:
        keys: ScreenedKeys = rows.shared
        # A θ of −inf isn't screened.
        theta = self.theta(rows).masked_fill(~self._screened(rows), -torch.inf)
        seen, upper = keys.scores(rows, self.margin)
        found = candidates(rows, upper, theta)
        found[:, torch.arange(len(rows.contexts), device=found.device), rows.contexts - 1] = True
        better = rows.scores
        if self.format == "int4+4":
            # Where a head keeps everything, its group isn't screened.
            unscreened = rows.by_group(theta).isneginf().any(dim=1, keepdim=True)
            better = torch.where(
                unscreened[..., None], rows.by_group(rows.scores), rows.by_group(keys.refined(rows))
            ).flatten(0, 1)
        scores = torch.where(found[:, None], rows.by_group(better), rows.by_group(seen)).flatten(0, 1)
        return replace(rows, scores=scores.masked_fill_(~visible(rows), -torch.inf), candidates=found)

    def keep(self, rows: Rows) -> torch.Tensor:
        assert rows.candidates is not None
        # A margin of 0 or so lets rounding tell a survivor from a candidate.
        return (rows.by_group(super().keep(rows)) & rows.candidates[:, None]).flatten(0, 1)

    def k_rows_read(self, rows: Rows) -> float:
        """Plane one of all keys, and of candidates K itself or plane two; K in full in rows of few keys."""
        assert rows.candidates is not None
        full = 2.0 * rows.query.shape[-1]
        beside = _BESIDE if self.margin is not None else 2 * _BESIDE
        of_candidates = 1.0 if self.format == "int4" else 0.25
        screened = self._screened(rows)
        pairs = rows.num_kv_heads * int(rows.contexts[screened].sum())
        found = int(rows.candidates[:, screened].sum())
        return rows.pairs - pairs + pairs * (0.25 + beside / full) + of_candidates * found

    def _screened(self, rows: Rows) -> torch.Tensor:
        return rows.contexts > self.min_seq_len
