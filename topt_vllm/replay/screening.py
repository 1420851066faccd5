"""A K screen in a replay: what it says of many rows' scores at once (:mod:`topt_vllm.attention.screen`)."""

from dataclasses import dataclass

import torch

from topt_vllm.attention.reference import softcapped
from topt_vllm.attention.screen import (
    EncodedKeys,
    ScreenQueries,
    ScreenTransform,
    refined_scores,
    screen_scores,
)
from topt_vllm.replay.rule import Rows, visible
from topt_vllm.replay.scores import any_of_group


@dataclass(frozen=True)
class ScreenedKeys:
    """The K of one layer as a screen has it.

    Attributes:
        transform: Calibrated for the layer.
        keys: Codes of all of it.
    """

    transform: ScreenTransform
    keys: EncodedKeys

    @classmethod
    def of(cls, transform: ScreenTransform, key: torch.Tensor) -> "ScreenedKeys":
        """From K, [Hkv, n, D]."""
        transform = transform.to(key.device)
        return cls(transform, transform.encode(key))

    def scores(self, rows: Rows, margin: float | None) -> tuple[torch.Tensor, torch.Tensor]:
        """What plane one says of the rows' scores, and what the true ones hardly exceed: float32 [H, r, m].

        Args:
            rows: Of the layer.
            margin: Standard deviations; None for a hard bound.
        """
        found = screen_scores(self._queries(rows), self._keys(rows), margin, rows.scale)
        seen, upper = (_by_row(part, rows) for part in found)
        return seen, upper

    def refined(self, rows: Rows) -> torch.Tensor:
        """What both planes say of the rows' scores, float32 [H, r, m]."""
        return _by_row(refined_scores(self._queries(rows), self._keys(rows), rows.scale), rows)

    def _queries(self, rows: Rows) -> ScreenQueries:
        # Every row of every head counts as a head by itself; those of a group stay together.
        return self.transform.queries(rows.query.flatten(0, 1))

    def _keys(self, rows: Rows) -> EncodedKeys:
        m = rows.scores.shape[-1]
        return EncodedKeys(self.keys.codes[:, :m], self.keys.step[:, :m], self.keys.error[:, :m])


def candidates(rows: Rows, upper: torch.Tensor, theta: torch.Tensor) -> torch.Tensor:
    """Keys in context that, by plane one, may reach θ of some head of a group: bool [Hkv, r, m].

    Args:
        rows: The rows.
        upper: float32 [H, r, m], what scores hardly exceed; NaN where that isn't known.
        theta: float32 [H, r].
    """
    return any_of_group(rows.by_group(~(upper < theta[..., None]))) & visible(rows)


def _by_row(scores: torch.Tensor, rows: Rows) -> torch.Tensor:
    return softcapped(scores.unflatten(0, rows.query.shape[:2]), rows.softcap)
