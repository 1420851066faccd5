"""Online correction of thresholds: a slow integral controller of each query head's kept keys.

A calibrated θ keeps as many keys as its budget promises on text like the calibration's. On other text a head keeps
more or fewer. With one offset d per head, added to θ(n) at every length,

    d ← clip(d + GAIN · mean over rows of clip(ln(reached / asked), ±LARGEST_ERROR), ±BOUND)

after every ROWS decoded rows or more, of whatever requests. ``reached`` counts the keys of a row whose score is
θ(n) + d or more; ``asked`` is what the budget promises: k keys, but never more than half of the row's context. The
mean of logarithms aims at what θ is calibrated for, a row in the middle. All requests share the offsets: a request
carries no state, and the same traffic gives the same offsets. docs/design.md has the measurements.
"""

import torch

from topt_vllm.attention.common import Thetas
from topt_vllm.table.schema import keys_asked

ROWS = 32
GAIN = 0.3  # scaled logits per unit of ln(reached / asked)
LARGEST_ERROR = 1.0
BOUND = 3.0  # scaled logits


class ThetaController:
    """The offsets of one layer's query heads, and its thresholds with them.

    Attributes:
        thetas: The layer's thresholds plus the offsets; changed in place.
        offset: float32 [H], scaled logits.
    """

    def __init__(self, thetas: Thetas, keys: list[int], dense_up_to: int) -> None:
        """
        Args:
            thetas: As calibrated.
            keys: Keys that each query head should keep.
            dense_up_to: Rows with a context of at most so many tokens are dense, and count for nothing.

        Raises:
            ValueError: Not as many numbers as heads.
        """
        num_heads = thetas.theta.shape[0]
        if len(keys) != num_heads:
            raise ValueError(f"keys has {len(keys)} entries; there are {num_heads} heads")
        self._keys = torch.tensor(keys)
        self._calibrated = thetas
        self._dense_up_to = dense_up_to
        self._waiting: list[tuple[torch.Tensor, torch.Tensor]] = []
        self._rows = 0
        self.thetas = Thetas(thetas.lengths, thetas.theta.clone(), thetas.law.clone())
        self.offset = torch.zeros(num_heads)

    def counters(self, rows: int) -> torch.Tensor:
        """Zeros int64 [rows, H], where the operator counts keys that reach θ."""
        return torch.zeros(rows, len(self.offset), dtype=torch.int64)

    def count(self, reached: torch.Tensor, contexts: torch.Tensor) -> None:
        """Takes what decoded rows reached; updates the offsets once enough rows have come.

        Args:
            reached: int64 [rows, H], keys whose score is θ or more.
            contexts: int64 [rows], context length of each row (tokens).
        """
        self._waiting.append((reached, contexts))
        self._rows += len(contexts)
        if self._rows >= ROWS:
            self._update(*(torch.cat(parts) for parts in zip(*self._waiting, strict=True)))
            self._waiting.clear()
            self._rows = 0

    def _update(self, reached: torch.Tensor, contexts: torch.Tensor) -> None:
        sparse = contexts > self._dense_up_to
        if not sparse.any():
            return
        ratio = reached[sparse] / keys_asked(self._keys, contexts[sparse, None])
        error = torch.log(ratio).clamp(-LARGEST_ERROR, LARGEST_ERROR).mean(dim=0)
        self.offset = (self.offset + GAIN * error).clamp(-BOUND, BOUND)
        torch.add(self._calibrated.theta, self.offset[:, None], out=self.thetas.theta)
        torch.add(self._calibrated.law[:, 0], self.offset, out=self.thetas.law[:, 0])
