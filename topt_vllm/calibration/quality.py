"""What thresholds keep, read and drop, counted row by row while a model attends with them.

The rule is the operator's with its default policy: group union, one recent token, no sinks, no minimum length.
The rows behind the last V sum, which the server keeps, are left out, for their number is the server's.
"""

import torch

from topt_vllm.attention.common import Thetas
from topt_vllm.calibration.predictions import Losses
from topt_vllm.calibration.scores import any_of_group, kept_by_theta, percentiles, true_per_row
from topt_vllm.calibration.statistics import DECIMALS
from topt_vllm.table.identity import ModelIdentity
from topt_vllm.table.schema import Quality, Spread, keys_asked


class ThresholdTally:
    """Selects by thresholds and counts what that does, over the sparse layers of one run."""

    def __init__(
        self,
        identity: ModelIdentity,
        ks: dict[int, list[int]],
        thetas: dict[int, Thetas],
        rows: torch.Tensor,
        window: int,
    ) -> None:
        """
        Args:
            identity: Of the model.
            ks: Keys that each query head should keep, by layer; {} where the budget doesn't say.
            thetas: Of the sparse layers; the other full-attention layers count as dense.
            rows: int64 [R], ascending query rows to measure; row i has context i + 1.
            window: V rows that the layers without thresholds read at most (tokens).
        """
        self._identity = identity
        self._ks = ks
        self._thetas = {layer: entry.at_each(rows + 1) for layer, entry in thetas.items()}
        self._contexts = int((rows + 1).sum())
        self._windows = int((rows + 1).clamp(max=window).sum())
        self._read = dict.fromkeys(thetas, 0)
        self._kept: list[torch.Tensor] = []
        self._dropped = 0.0
        self._counted = 0

    @property
    def layers(self) -> list[int]:
        """Layers that have thresholds, ascending."""
        return sorted(self._thetas)

    def select(
        self, layer: int, scores: torch.Tensor, probabilities: torch.Tensor, rows: torch.Tensor, part: slice
    ) -> torch.Tensor:
        """Which V rows the query heads of each group use, bool [Hkv, r, m]; counts them.

        Args:
            layer: Index in the model, one of ``layers``.
            scores: float32 [H, r, m], −inf where a row doesn't see a key.
            probabilities: float32 [H, r, m], their softmax.
            rows: int64 [r], the rows.
            part: Where they lie in the rows given at construction.
        """
        theta = self._thetas[layer][:, part].to(scores.device)
        kept = kept_by_theta(scores, theta, rows)
        read = any_of_group(kept.view(self._identity.num_kv_heads, -1, *kept.shape[1:]))
        self._read[layer] += int(true_per_row(read).sum())
        used = probabilities.view(len(read), -1, *read.shape[1:]) * read[:, None]
        self._dropped += float((1.0 - used.sum(dim=-1)).sum(dtype=torch.float64))
        self._counted += kept[..., 0].numel()
        if layer in self._ks:
            asked = keys_asked(torch.tensor(self._ks[layer])[:, None], rows.cpu() + 1)
            self._kept.append((true_per_row(kept).cpu() / asked).flatten())
        return read

    def layer_rows_read(self) -> list[float]:
        """Share of V rows read by every layer of the model, in order."""
        identity = self._identity
        pairs = identity.num_kv_heads * self._contexts
        shares = []
        for layer in range(identity.num_layers):
            if layer in identity.sliding_window_layers:
                shares.append(1.0)
            else:
                shares.append(self._read[layer] / pairs if layer in self._thetas else 1.0)
        return shares

    def rows_read(self) -> float:
        """Share of V rows read, all layers counted; a windowed layer has its window's rows and reads them."""
        identity = self._identity
        shares = self.layer_rows_read()
        weights = [
            self._windows if layer in identity.sliding_window_layers else self._contexts
            for layer in range(identity.num_layers)
        ]
        return sum(share * weight for share, weight in zip(shares, weights, strict=True)) / sum(weights)

    def quality(self, tokens: int, rows: int, losses: Losses) -> Quality:
        """What goes into the table.

        Args:
            tokens: Length of the held-back text.
            rows: Rows that were decoded.
            losses: Against dense attention.
        """
        return Quality(
            kept_over_k=self._spread(),
            v_rows_read=_rounded(self.rows_read()),
            dropped_mass=_rounded(self._dropped / self._counted if self._counted else 0.0),
            tokens=tokens,
            rows=rows,
            loss_pct=_rounded(losses.loss_pct),
            kl=round(losses.kl, DECIMALS + 2),
            agreement=_rounded(losses.agreement),
            layer_rows_read=[_rounded(share) for share in self.layer_rows_read()],
        )

    def _spread(self) -> Spread | None:
        if not self._kept:
            return None
        p5, p50, p95 = map(_rounded, percentiles(torch.cat(self._kept)))
        return Spread(p5=p5, p50=p50, p95=p95)


def _rounded(number: float) -> float:
    return round(number, DECIMALS)
