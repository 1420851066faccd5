"""What thresholds do on text that they were not taken from.

The rule is the operator's with its default policy: group union, one recent token, no sinks, no minimum length.
The unfinished block that the server keeps dense is left out, for its size is the server's.
"""

import torch

from topt_vllm.attention.common import Thetas
from topt_vllm.calibration.statistics import DECIMALS
from topt_vllm.model_identity import ModelIdentity
from topt_vllm.thresholds import Quality, Spread


class HeldBackQuality:
    """Collects the quality of one budget over the layers of one sequence."""

    def __init__(
        self, identity: ModelIdentity, k: int, thetas: dict[int, Thetas], rows: torch.Tensor, window: int
    ) -> None:
        """
        Args:
            identity: Of the model.
            k: The budget.
            thetas: Of the sparse layers; the other full-attention layers count as dense.
            rows: int64 [R], ascending query rows to measure; row i has context i + 1.
            window: V rows that the layers without thresholds read at most (tokens).
        """
        self._identity = identity
        self._k = k
        self._thetas = {layer: _theta_by_row(entry, rows) for layer, entry in thetas.items()}
        self._contexts = int((rows + 1).sum())
        self._windows = int((rows + 1).clamp(max=window).sum())
        self._read = 0
        self._kept: list[torch.Tensor] = []
        self._dropped: list[torch.Tensor] = []

    def add(
        self, layer: int, scores: torch.Tensor, probabilities: torch.Tensor, rows: torch.Tensor, part: slice
    ) -> None:
        """Adds some rows of one layer; dense layers are ignored.

        Args:
            layer: Index in the model.
            scores: float32 [H, r, m], −inf where a row doesn't see a key.
            probabilities: float32 [H, r, m], their softmax.
            rows: int64 [r], the rows.
            part: Where they lie in the rows given at construction.
        """
        if layer not in self._thetas:
            return
        theta = self._thetas[layer][:, part].to(scores.device)
        kept = scores >= theta[..., None]
        kept |= torch.arange(scores.shape[-1], device=scores.device) == rows[:, None]
        num_kv_heads = self._identity.num_kv_heads
        read = kept.view(num_kv_heads, -1, *kept.shape[1:]).any(dim=1)
        used = read.repeat_interleave(kept.shape[0] // num_kv_heads, dim=0)
        dropped = probabilities.masked_fill(used, 0.0).sum(dim=-1)
        self._read += int(read.sum())
        self._kept.append(kept.sum(dim=-1).flatten().cpu())
        self._dropped.append(dropped.flatten().cpu())

    def result(self, tokens: int) -> Quality:
        """The quality; ``tokens`` is the length of the held-back sequence."""
        identity = self._identity
        windowed = len(identity.sliding_window_layers) * self._windows
        full = identity.num_layers - len(identity.sliding_window_layers)
        dense = (full - len(self._thetas)) * self._contexts
        total = identity.num_kv_heads * (full * self._contexts + windowed)
        read = self._read + identity.num_kv_heads * (dense + windowed)
        # quantile() refuses more than 16M numbers; sorting doesn't.
        kept = (torch.cat(self._kept).double() / self._k).sort().values
        p5, p50, p95 = (_rounded(kept[round(p * (len(kept) - 1))].item()) for p in (0.05, 0.5, 0.95))
        return Quality(
            kept_over_k=Spread(p5=p5, p50=p50, p95=p95),
            v_rows_read=_rounded(read / total),
            dropped_mass=_rounded(torch.cat(self._dropped).double().mean().item()),
            tokens=tokens,
        )


def _theta_by_row(thetas: Thetas, rows: torch.Tensor) -> torch.Tensor:
    """θ of each row at its own context, float32 [H, R]."""
    return torch.stack([thetas.at(n) for n in (rows + 1).tolist()], dim=1)


def _rounded(number: float) -> float:
    return round(number, DECIMALS)
