"""Online correction of thresholds: a slow integral controller of each query head's kept keys.

A calibrated θ keeps as many keys as its budget promises on text like the calibration's. On other text a head keeps
more or fewer. With one offset d per head, added to θ(n) at every length,

    d ← clip(d + GAIN · mean over rows of clip(ln(reached / asked), ±LARGEST_ERROR), ±BOUND)

after every ROWS decoded rows or more, of whatever requests. ``reached`` counts the keys of a row whose score is
θ(n) + d or more; ``asked`` is what the budget promises: k keys, but never more than half of the row's context. The
mean of logarithms aims at what θ is calibrated for, a row in the middle. All requests share the offsets: a request
carries no state, and the same traffic gives the same offsets. docs/design.md has the measurements.
"""

from collections.abc import Sequence
from typing import Any

import torch

from topt_vllm.attention.common import Thetas
from topt_vllm.table.schema import keys_asked

ROWS = 32
GAIN = 0.3  # scaled logits per unit of ln(reached / asked)
LARGEST_ERROR = 1.0
BOUND = 3.0  # scaled logits


class ThetaController:
    """The offsets of the query heads of one layer or of several, and their thresholds with them.

    It never reads a device's numbers back. ``[…]`` is [layers] for several layers, and nothing for one.

    Attributes:
        thetas: Thresholds plus the offsets; changed in place.
        offset: float32 […, H], scaled logits; changed in place.
    """

    def __init__(self, thetas: Thetas, keys: Sequence[Any], dense_up_to: int) -> None:
        """
        Args:
            thetas: As calibrated, theta float32 […, H, L] and law float32 […, H, 2].
            keys: Keys that each query head should keep, […, H].
            dense_up_to: Rows with a context of at most so many tokens are dense, and count for nothing.

        Raises:
            ValueError: Not as many numbers as heads.
        """
        heads = thetas.theta.shape[:-1]
        self._keys = torch.tensor(keys, device=thetas.theta.device)
        if self._keys.shape != heads:
            raise ValueError(f"keys has {len(self._keys)} entries; there are {heads[0]} heads or layers")
        self._calibrated = thetas
        self._dense_up_to = dense_up_to
        self._rows = 0
        self._errors = thetas.theta.new_zeros(heads)
        self._sparse_rows = thetas.theta.new_zeros(())
        self.thetas = Thetas(thetas.lengths, thetas.theta.clone(), thetas.law.clone())
        self.offset = thetas.theta.new_zeros(heads)

    def of_layers(self) -> list[Thetas]:
        """The thresholds of each of several layers; they change with :attr:`thetas`."""
        parts = zip(self.thetas.theta, self.thetas.law, strict=True)
        return [Thetas(self.thetas.lengths, theta, law) for theta, law in parts]

    def counters(self, rows: int) -> torch.Tensor:
        """Zeros int64 […, rows, H], where the operator counts keys that reach θ."""
        *layers, heads = self.offset.shape
        return torch.zeros(*layers, rows, heads, dtype=torch.int64, device=self.offset.device)

    def count(self, reached: torch.Tensor, contexts: torch.Tensor) -> None:
        """Takes what decoded rows reached; updates the offsets once enough rows have come.

        Args:
            reached: int64 […, rows, H], keys whose score is θ or more.
            contexts: int64 [rows], context length of each row (tokens).
        """
        contexts = contexts[:, None]
        sparse = contexts > self._dense_up_to
        ratio = reached / keys_asked(self._keys[..., None, :], contexts)
        errors = torch.log(ratio).clamp(-LARGEST_ERROR, LARGEST_ERROR)
        self._errors += torch.where(sparse, errors, 0.0).sum(dim=-2)
        self._sparse_rows += sparse.sum()
        self._rows += len(contexts)
        if self._rows >= ROWS:
            self._update()

    def _update(self) -> None:
        self.offset += GAIN * self._errors / self._sparse_rows.clamp(min=1.0)
        self.offset.clamp_(-BOUND, BOUND)
        torch.add(self._calibrated.theta, self.offset[..., None], out=self.thetas.theta)
        torch.add(self._calibrated.law[..., 0], self.offset, out=self.thetas.law[..., 0])
        self._rows = 0
        self._errors.zero_()
        self._sparse_rows.zero_()
