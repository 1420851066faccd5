"""What a budget kept, read and cost in a replay, as its table states it."""

import torch
from pydantic import ValidationError

from topt_vllm.calibration.options import CalibrationError
from topt_vllm.calibration.statistics import DECIMALS
from topt_vllm.replay.attention import RuleAttention
from topt_vllm.replay.predictions import Losses
from topt_vllm.replay.scores import percentiles
from topt_vllm.table.file import first_problem
from topt_vllm.table.schema import Quality, Spread


def quality(attention: RuleAttention, tokens: int, rows: int, losses: Losses) -> Quality:
    """What goes into the table.

    Args:
        attention: Of the run.
        tokens: Length of the held-back text.
        rows: Rows that were decoded.
        losses: Against dense attention.

    Raises:
        CalibrationError: Something isn't finite.
    """
    shares = attention.counts.shares()
    try:
        return Quality(
            kept_over_k=_spread([part for parts in attention.kept_over_k.values() for part in parts]),
            v_rows_read=_rounded(shares["v_rows_read"]),
            dropped_mass=_rounded(shares["dropped_mass"]),
            tokens=tokens,
            rows=rows,
            loss_pct=_rounded(losses.loss_pct),
            kl=round(losses.kl, DECIMALS + 2),
            agreement=_rounded(losses.agreement),
            layer_rows_read=[_rounded(share) for share in attention.layer_rows_read()],
        )
    except ValidationError as error:
        raise CalibrationError(f"measured on held-back text: quality.{first_problem(error)}") from None


def _spread(kept_over_k: list[torch.Tensor]) -> Spread | None:
    if not kept_over_k:
        return None
    p5, p50, p95 = map(_rounded, percentiles(torch.cat([part.flatten() for part in kept_over_k])))
    return Spread(p5=p5, p50=p50, p95=p95)


def _rounded(number: float) -> float:
    return round(number, DECIMALS)
