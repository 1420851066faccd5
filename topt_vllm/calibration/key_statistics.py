"""What a K screen has to know of the keys: mean and scale of every channel, from sums over calibration tokens.

With rows of K divided by s before they are rotated, and those of Q multiplied by it, the error of a score is least
where s² is the ratio of K's deviation to Q's size, channel by channel:  s = (var(k) / E[q²])^(1/4).
"""

import torch

from topt_vllm.calibration.options import CalibrationError
from topt_vllm.table.schema import KeyStatistics, LayerKeys

# First tokens of a sequence: their keys are like no others.
SKIPPED_TOKENS = 4
# A channel may be constant, or unused by the queries: of the mean over channels, what it counts as at least.
_FLOOR = 1e-4
_DIGITS = 5


def key_sums(query: torch.Tensor, key: torch.Tensor) -> torch.Tensor:
    """Sums over one sequence: number, values and squares of K, and of Q over its group.

    Args:
        query: [H, any number of rows, D].
        key: [Hkv, n, D].

    Returns:
        float64 [6, Hkv, D].
    """
    keys, queries = _sums(key[:, SKIPPED_TOKENS:]), _sums(query)
    return torch.cat([keys, queries.unflatten(1, (len(key), -1)).sum(dim=2)]).cpu()


def _sums(rows: torch.Tensor) -> torch.Tensor:
    """Head by head, for all of them in float64 may be large: [heads, n, D] to [3, heads, D]."""
    found = []
    for head in rows:
        wide = head.double()
        total = wide.sum(dim=0)
        found.append(torch.stack([torch.full_like(total, len(wide)), total, wide.square().sum(dim=0)]))
    return torch.stack(found, dim=1)


def key_statistics(sums: dict[int, torch.Tensor], seed: int) -> KeyStatistics:
    """What goes into the table.

    Args:
        sums: By layer, of all sequences together.
        seed: Of the rotation's signs.

    Raises:
        CalibrationError: K or Q of a layer isn't finite.
    """
    return KeyStatistics(seed=seed, layers=[_layer(layer, found) for layer, found in sorted(sums.items())])


def _layer(layer: int, sums: torch.Tensor) -> LayerKeys:
    if not bool(sums.isfinite().all()):
        raise CalibrationError(
            f"layer {layer}: its keys or queries aren't finite; the weights are broken or --dtype is too narrow "
            "for this model"
        )
    count, total, squares, queries, _, query_squares = sums
    mean = total / count
    variance, power = _floored(squares / count - mean.square()), _floored(query_squares / queries)
    scale = (variance / power) ** 0.25
    scale /= scale.log().mean(dim=-1, keepdim=True).exp()
    return LayerKeys(layer=layer, mean=_rounded(mean), scale=_rounded(scale))


def _floored(by_channel: torch.Tensor) -> torch.Tensor:
    least = _FLOOR * by_channel.mean(dim=-1, keepdim=True)
    return by_channel.maximum(least.clamp(min=torch.finfo(torch.float32).tiny))


def _rounded(numbers: torch.Tensor) -> list[list[float]]:
    # Adding 0.0 turns −0.0 into 0.0, which would make two equal tables differ.
    return [[float(f"{number:.{_DIGITS}g}") + 0.0 for number in row] for row in numbers.tolist()]
