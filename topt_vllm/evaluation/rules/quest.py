"""Quest: the pages that could hold the best keys (arXiv 2406.10774).

Idea: a page's channelwise minimum and maximum of K bound every score in it: Σ_d max(q_d·min_d, q_d·max_d).
Rule: each query head keeps the pages of the highest bounds, among them always the newest one, and nothing else;
the softmax runs over their keys. Pages of 16 tokens, as published.
Parameter: the number of pages.
"""

from dataclasses import dataclass
from typing import ClassVar

import torch

from topt_vllm.replay.rule import Rows, Rule

PAGE = 16


@dataclass(frozen=True)
class Quest(Rule):
    """The top pages of each query head.

    Attributes:
        pages: How many, the newest included.
    """

    pages: int

    renormalise: ClassVar[bool] = True

    def prepare(self, key: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        """Channelwise minimum and maximum of each whole page, float32 [Hkv, D, pages]."""
        whole = key.shape[1] // PAGE
        pages = key[:, : whole * PAGE].float().unflatten(1, (whole, PAGE))
        low, high = pages.amin(dim=2), pages.amax(dim=2)
        return low.transpose(1, 2).contiguous(), high.transpose(1, 2).contiguous()

    def keep(self, rows: Rows) -> torch.Tensor:
        m = rows.scores.shape[-1]
        newest = (rows.contexts - 1) // PAGE
        page = torch.arange(-(-m // PAGE), device=rows.scores.device)
        bound = torch.nn.functional.pad(_bounds(rows), (0, 1), value=-torch.inf)[..., : len(page)]
        bound = bound.masked_fill(page > newest[:, None], -torch.inf)
        bound = bound.masked_fill(page == newest[:, None], torch.inf)
        count = min(self.pages, len(page))
        chosen = torch.zeros_like(bound, dtype=torch.bool)
        chosen.scatter_(-1, bound.topk(count, dim=-1).indices, True)
        return chosen.repeat_interleave(PAGE, dim=-1)[..., :m].logical_and_(rows.scores > -torch.inf)


def _bounds(rows: Rows) -> torch.Tensor:
    """Upper bounds on q·k of the whole pages, float32 [H, r, whole pages]; a softcap doesn't change their order."""
    whole = rows.scores.shape[-1] // PAGE
    low, high = (bound[..., :whole] for bound in rows.shared)
    query = rows.by_group(rows.query).flatten(1, 2)
    bounds = query.clamp(min=0) @ high + query.clamp(max=0) @ low
    return bounds.view(*rows.query.shape[:2], whole)
