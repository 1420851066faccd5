"""How far thresholds can be told beyond the lengths that they were calibrated at."""

import torch

from topt_vllm.calibration.statistics import deviations
from topt_vllm.table.schema import Budget, LayerThresholds

_FEWEST_LENGTHS = 3


def held_out_error(budget: Budget, lengths: list[int]) -> tuple[float, float] | None:
    """Tells θ at the longest length from the two before, as the law of a table that ended there would.

    Args:
        budget: Of the table.
        lengths: Of the table.

    Returns:
        Root mean square and 95th percentile of the absolute error over query heads of sparse layers, scaled logits;
        None where fewer than two lengths would be left, or no layer is sparse with known keys a head.
    """
    ks = budget.ks()
    layers = [entry for entry in budget.layers if entry.layer in ks]
    if len(lengths) < _FEWEST_LENGTHS or not layers:
        return None
    errors = [_errors(entry, torch.tensor(ks[entry.layer]), torch.tensor(lengths[-3:])) for entry in layers]
    error = torch.cat(errors).abs().sort().values
    return error.square().mean().sqrt().item(), error[round(0.95 * (len(error) - 1))].item()


def _errors(entry: LayerThresholds, ks: torch.Tensor, lengths: torch.Tensor) -> torch.Tensor:
    """Of each query head, [H]."""
    before, last, longest = torch.tensor(entry.theta, dtype=torch.float64)[:, -3:].unbind(dim=1)
    z = deviations(ks[:, None], lengths)
    apart = z[:, 1] - z[:, 0]
    # Middle scores, whose z is 0 or nearly so, say nothing of a slope.
    slope = torch.where(apart > 0.01, (last - before) / apart, 0)
    return last + slope * (z[:, 2] - z[:, 1]) - longest
