"""BLASST, in NVIDIA's libraries Skip-Softmax (arXiv 2512.12087).

Idea: while an online softmax walks over the keys, a tile far below the running maximum can't matter.
Rule: tiles of up to 16 query rows × 128 keys are walked from the oldest. A tile is skipped, its softmax and its V
with it, when exp(tile maximum − running maximum) < λ in each of its rows, the running maximum including the
tile's own. In decoding, a tile's rows are the query heads that share a KV head. What is skipped is missing from the
denominator too.
Parameter: the scale factor; λ = scale / n, at most 1, the paper's law for contexts of n tokens.
"""

import math
from dataclasses import dataclass
from typing import ClassVar

import torch

from topt_vllm.replay.rule import Rows, Rule

TILE_ROWS = 16
TILE_KEYS = 128


@dataclass(frozen=True)
class Blasst(Rule):
    """Tiles near the running maximum.

    Attributes:
        scale: λ times the context length.
    """

    scale: float

    union: ClassVar[bool] = True
    renormalise: ClassVar[bool] = True

    def keep(self, rows: Rows) -> torch.Tensor:
        m = rows.scores.shape[-1]
        padded = torch.nn.functional.pad(rows.scores, (0, -m % TILE_KEYS), value=-math.inf)
        tile_max = padded.unflatten(-1, (-1, TILE_KEYS)).amax(dim=-1)
        running = tile_max.cummax(dim=-1).values
        # With λ above 1 not even the maximum's own tile would be kept.
        threshold = (self.scale / rows.contexts).clamp(max=1.0).log()[:, None]
        near = rows.by_group((tile_max - running >= threshold) & (tile_max > -math.inf))
        by_rows = near.split(TILE_ROWS, dim=1)
        tiles = torch.cat([part.any(dim=1, keepdim=True).expand_as(part) for part in by_rows], dim=1)
        keep = tiles.flatten(0, 1).repeat_interleave(TILE_KEYS, dim=-1)[..., :m]
        return keep & (rows.scores > -math.inf)
