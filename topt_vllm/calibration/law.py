"""How far the law θ(n) = c0 + c1 ln n can be trusted beyond the lengths that it was fitted to."""

import math
from dataclasses import dataclass

import torch

from topt_vllm.table.schema import Budget

_FEWEST_LENGTHS = 3


@dataclass(frozen=True)
class LawError:
    """Prediction of θ at the longest length from the shorter ones, over query heads of sparse layers.

    Attributes:
        rms: Root mean square, scaled logits.
        p95: 95th percentile of the absolute error, scaled logits.
    """

    rms: float
    p95: float


def held_out_error(budget: Budget, lengths: list[int]) -> LawError | None:
    """Fits the law to all lengths but the longest, and compares what it gives there.

    Args:
        budget: Of the table.
        lengths: Of the table.

    Returns:
        None where fewer than two lengths would be left, or no layer is sparse.
    """
    theta = [
        head for entry in budget.layers if entry.layer not in budget.dense_layers for head in entry.theta
    ]
    if len(lengths) < _FEWEST_LENGTHS or not theta:
        return None
    values = torch.tensor(theta, dtype=torch.float64)
    x = torch.tensor([math.log(length) for length in lengths], dtype=torch.float64)
    known, y = x[:-1] - x[:-1].mean(), values[:, :-1]
    slope = (y * known).sum(dim=1) / (known * known).sum()
    predicted = y.mean(dim=1) + slope * (x[-1] - x[:-1].mean())
    error = (predicted - values[:, -1]).abs().sort().values
    return LawError(rms=error.square().mean().sqrt().item(), p95=error[round(0.95 * (len(error) - 1))].item())
