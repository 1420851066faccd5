"""From scores to thresholds: moments of each row's k-th largest score, and the law they follow.

Per layer, query head and budget k, let s_k(n) be the k-th largest score of a row with context n. Rows are sampled
around each calibrated length L, and

* the law: c0 + c1 ln n, least squares over all rows, each length weighted equally;
* θ(L) = mean of s_k(n) + c1 (ln L − ln n) over the rows of L. The correction by the slope keeps a one-sided
  sample, such as that of the longest length, from being biased.

Only sums are kept, so memory doesn't grow with the number of sequences.
"""

import math
from dataclasses import dataclass

import torch

from topt_vllm.calibration.options import ROWS_PER_LENGTH, CalibrationError
from topt_vllm.replay.scores import LayerCall, in_threads
from topt_vllm.table.schema import keys_asked

DECIMALS = 4


@dataclass(frozen=True)
class RowSample:
    """Query rows to look at, ascending.

    Attributes:
        rows: int64 [R], indices; row i has context i + 1.
        length_of: int64 [R], index of the calibrated length that the row was drawn for.
    """

    rows: torch.Tensor
    length_of: torch.Tensor


def sample_rows(lengths: list[int], generator: torch.Generator) -> RowSample:
    """Draws rows around each length: n in (L/√2, L√2], as far as the sequence of ``lengths[-1]`` tokens goes."""
    rows, length_of = [], []
    for index, length in enumerate(lengths):
        first = math.floor(length / math.sqrt(2)) + 1
        last = min(math.floor(length * math.sqrt(2)), lengths[-1])
        chosen = torch.randperm(last - first + 1, generator=generator)[:ROWS_PER_LENGTH] + first - 1
        rows.append(chosen)
        length_of.append(torch.full_like(chosen, index))
    order = torch.cat(rows).argsort(stable=True)
    return RowSample(torch.cat(rows)[order], torch.cat(length_of)[order])


def kth_scores(call: LayerCall, rows: torch.Tensor, ks: tuple[int, ...]) -> torch.Tensor:
    """Each row's k-th largest score, float32 [K, H, rows]; of its middle one where k is more than half its context.

    Raises:
        CalibrationError: A score isn't a number.
    """
    wanted = torch.tensor(ks, device=call.query.device)
    rows = rows.to(call.query.device)
    _ = call.keys  # made before the threads need them

    def compute(part: slice) -> torch.Tensor:
        # Unseen keys come first; NaN counts as the largest, so a NaN anywhere in a row comes last.
        ordered = _sorted(call.scores(rows[part]))
        place = ordered.shape[-1] - keys_asked(wanted, rows[part, None] + 1)
        found = ordered.gather(-1, place.expand(ordered.shape[0], -1, -1))
        _require_numbers(torch.cat([ordered[..., -1:], found], dim=-1), call.layer)
        return found.permute(2, 0, 1)

    # numpy sorts on one core.
    parts = in_threads(compute, list(call.chunks(rows)), call.query.device)
    return torch.cat(parts, dim=2)


def _sorted(scores: torch.Tensor) -> torch.Tensor:
    """Ascending, in place on a CPU, where numpy's vectorised sort is ten times faster than torch's."""
    if scores.device.type != "cpu":
        return scores.sort(dim=-1).values
    scores.numpy().sort(axis=-1)
    return scores


def _require_numbers(found: torch.Tensor, layer: int) -> None:
    bad = ~torch.isfinite(found).all(dim=-1).all(dim=-1)
    if bool(bad.any()):
        head = int(bad.nonzero()[0])
        value = found[head][~torch.isfinite(found[head])][0].item()
        raise CalibrationError(
            f"layer {layer}, query head {head}: a score is {value}; "
            "the weights are broken or --dtype is too narrow for this model"
        )


@dataclass(frozen=True)
class Fit:
    """Thresholds of one layer and budget.

    Attributes:
        law: float64 [H, 2], (c0, c1).
        theta: float64 [H, L].
    """

    law: torch.Tensor
    theta: torch.Tensor

    def rounded(self) -> tuple[list[list[float]], list[list[float]]]:
        """Law and θ as the table holds them."""
        # Adding 0.0 turns −0.0 into 0.0, which would make two equal tables differ.
        law, theta = (torch.round(part, decimals=DECIMALS) + 0.0 for part in (self.law, self.theta))
        return law.tolist(), theta.tolist()


class KthScoreMoments:
    """Sums over the rows of one layer, x = ln n and y = s_k(n), from which its laws and thresholds follow."""

    def __init__(self, num_budgets: int, num_heads: int, lengths: list[int]) -> None:
        self._lengths = torch.tensor(lengths, dtype=torch.float64)
        self._x = torch.zeros(3, len(lengths), dtype=torch.float64)  # 1, x, x²
        self._y = torch.zeros(2, num_budgets, num_heads, len(lengths), dtype=torch.float64)  # y, xy

    def add(self, sample: RowSample, values: torch.Tensor) -> None:
        """Adds rows; ``values`` is s_k, [K, H, R]."""
        x, y = (sample.rows + 1).double().log(), values.cpu().double()
        self._x.index_add_(1, sample.length_of, torch.stack([torch.ones_like(x), x, x * x]))
        self._y.index_add_(3, sample.length_of, torch.stack([y, x * y]))

    def fit(self, budget: int) -> Fit:
        """Law and thresholds of one budget."""
        count, x, xx = self._x[0], self._x[1] / self._x[0], self._x[2] / self._x[0]
        y, xy = self._y[:, budget] / count
        spread = xx.mean() - x.mean() ** 2
        slope = torch.zeros_like(y[:, 0])
        if float(spread) > 1e-12:
            slope = (xy.mean(dim=1) - x.mean() * y.mean(dim=1)) / spread
        theta = y + slope[:, None] * (self._lengths.log() - x)
        c0 = y.mean(dim=1) - slope * x.mean()
        return Fit(torch.stack([c0, slope], dim=1), theta)
