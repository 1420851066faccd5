"""From scores to thresholds: moments of each row's k-th largest score, and the law they follow.

Per layer, query head and budget k, let s_k(n) be the k-th largest score of a row with context n, or the middle one
where n < 2k. Were scores normal with one mean and deviation at every n, s_k(n) would be a + b·z_k(n), where z_k(n)
is the normal quantile of the share of keys that lie below. Rows are sampled around each calibrated length L, and

* b: least squares over the rows of the two longest lengths. Scores aren't quite the same at every n, so the nearest
  rows say most of what comes; z_k takes care of how s_k bends at small n/k;
* θ(L) = mean of s_k(n) + b (z_k(L) − z_k(n)) over the rows of L. The correction by the slope keeps a one-sided
  sample, such as that of the longest length, from being biased;
* the law c0 + c1 ln n beyond the longest length: the chord of a + b·z_k, from θ there to four times that length.

Of two models' heads, calibrated at 2k and at 8k tokens, this kept 0.75 to 1.0 times k keys in the median row at
four times that length, where a line in ln n through all lengths kept 0.65 to 3.1.

Only sums are kept, so memory doesn't grow with the number of sequences.
"""

import math
from dataclasses import dataclass

import torch

from topt_vllm.calibration.options import ROWS_PER_LENGTH, CalibrationError
from topt_vllm.replay.scores import LayerCall, in_threads
from topt_vllm.table.schema import keys_asked

DECIMALS = 4

# The law is the chord up to so many times the longest calibrated length.
_LAW_REACH = 4


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
    """Sums over the rows of one layer, z = z_k(n) and y = s_k(n), from which its laws and thresholds follow.

    Args:
        ks: Budgets.
        num_heads: Query heads.
        lengths: Calibrated lengths, ascending.
    """

    def __init__(self, ks: tuple[int, ...], num_heads: int, lengths: list[int]) -> None:
        self._ks, self._lengths = torch.tensor(ks), torch.tensor(lengths)
        self._z = torch.zeros(3, len(ks), len(lengths), dtype=torch.float64)  # 1, z, z²
        self._y = torch.zeros(2, len(ks), num_heads, len(lengths), dtype=torch.float64)  # y, zy

    def add(self, sample: RowSample, values: torch.Tensor) -> None:
        """Adds rows; ``values`` is s_k, [K, H, R]."""
        z, y = deviations(self._ks[:, None], sample.rows + 1), values.cpu().double()
        self._z.index_add_(2, sample.length_of, torch.stack([torch.ones_like(z), z, z * z]))
        self._y.index_add_(3, sample.length_of, torch.stack([y, z[:, None] * y]))

    def fit(self, budget: int) -> Fit:
        """Law and thresholds of one budget."""
        z, y = self._z[:, budget], self._y[:, budget]
        slope = _slope(z[:, -2:].sum(dim=1), y[..., -2:].sum(dim=2))
        at = deviations(self._ks[budget], self._lengths)
        theta = y[0] / z[0] + slope[:, None] * (at - z[1] / z[0])
        longest = self._lengths[-1]
        beyond = deviations(self._ks[budget], longest * _LAW_REACH)
        c1 = slope * (beyond - at[-1]) / math.log(_LAW_REACH)
        return Fit(torch.stack([theta[:, -1] - c1 * longest.log(), c1], dim=1), theta)


def deviations(ks: torch.Tensor, contexts: torch.Tensor) -> torch.Tensor:
    """z_k(n), float64: by how many deviations the k-th largest of n normal scores lies above their middle.

    Args:
        ks: int64, keys; never more than half of the context are counted.
        contexts: int64, context lengths; broadcast against ``ks``.
    """
    return torch.special.ndtri(1 - keys_asked(ks, contexts).double() / contexts)


def _slope(z: torch.Tensor, y: torch.Tensor) -> torch.Tensor:
    """Least squares, [H], from the sums (1, z, z²) [3] and (y, zy) [2, H]; 0 where z hardly varies.

    Of rows that all have their middle score z is 0, or nearly so where their number of keys is odd.
    """
    (mean, square), (y_mean, product) = z[1:] / z[0], y / z[0]
    spread = square - mean * mean
    return (product - mean * y_mean) / spread if float(spread) > 1e-4 else torch.zeros_like(y_mean)
