"""What a calibration run is asked to do, and what can be refused before a model is touched."""

import math
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

from topt_vllm.calibration.search import Target
from topt_vllm.replay.options import DTYPES, ReplayError

SHORTEST_LENGTH = 256
ROWS_PER_LENGTH = 64
BUDGETS = ("k", "mass", "auto")


class CalibrationError(ReplayError):
    """A calibration that can't be run; the message says what to change."""


@dataclass(frozen=True)
class CalibrationOptions:
    """Options of ``topt-vllm calibrate``.

    Attributes:
        model: Folder or hub id.
        dataset: Text files, JSONL files (key ``text``), or hub datasets as ``name[:config[:split]]``.
        output: The table's path.
        num_samples: Sequences that thresholds are taken from; one more is held back.
        max_seq_length: Tokens of each sequence; None for the model's context, 8192 at most.
        ks: Budgets, keys per query head, ascending.
        budget: ``k``: those; ``mass``: ``masses`` instead; ``auto``: those and one for each target.
        masses: Budgets as shares of probability that a query head may drop, percent.
        max_loss: Targets of ``auto``: rise of perplexity, percent.
        target_rows: Targets of ``auto``: V rows read, all layers counted, percent.
        dense_layers: Layers to attend densely; None for layer 0 where it has thresholds.
        sigma: Standard deviations added to θ: above 0 keeps fewer keys, below 0 more.
        topk_at_calibration: Run the model with top-k attention, so that later layers see what sparse
            earlier layers produce.
        seed: Of the choice of query rows.
        device: ``cpu``, ``cuda``, ``cuda:N``, ``auto`` to spread over all GPUs; None for a GPU where there is one.
        dtype: Of the weights; ``auto`` for the checkpoint's own.
        force: Whether an existing output may be replaced.
        resume: Whether to go on where a killed run with the same options was.
    """

    model: str
    dataset: tuple[str, ...]
    output: Path
    num_samples: int = 4
    max_seq_length: int | None = None
    ks: tuple[int, ...] = (64, 128, 256)
    budget: Literal["k", "mass", "auto"] = "k"
    masses: tuple[float, ...] = (5.0,)
    max_loss: tuple[float, ...] = ()
    target_rows: tuple[float, ...] = ()
    dense_layers: tuple[int, ...] | None = None
    sigma: float = 0.0
    topk_at_calibration: bool = False
    seed: int = 0
    device: str | None = None
    dtype: str = "auto"
    force: bool = False
    resume: bool = False

    def __post_init__(self) -> None:
        if self.num_samples < 1:
            raise CalibrationError(f"--num-samples is {self.num_samples}; it must be at least 1")
        if not self.ks or min(self.ks) < 1 or list(self.ks) != sorted(set(self.ks)):
            raise CalibrationError(f"--k is {list(self.ks)}; different budgets of at least 1 are needed")
        if self.budget not in BUDGETS:
            raise CalibrationError(f"--budget is {self.budget!r}; allowed: {', '.join(BUDGETS)}")
        for name, percents in (
            ("--mass", self.masses),
            ("--max-loss", self.max_loss),
            ("--target-rows", self.target_rows),
        ):
            if any(not 0 < percent < 100 for percent in percents) or len(set(percents)) < len(percents):
                raise CalibrationError(
                    f"{name} is {list(percents)}; different percentages above 0 and below 100 are needed"
                )
        if (self.max_loss or self.target_rows) and self.budget != "auto":
            raise CalibrationError("--max-loss and --target-rows are targets of --budget auto; add it")
        if not math.isfinite(self.sigma):
            raise CalibrationError(f"--sigma is {self.sigma}; it must be finite")
        if self.dtype not in DTYPES:
            raise CalibrationError(f"--dtype is {self.dtype!r}; allowed: {', '.join(DTYPES)}")

    @property
    def targets(self) -> tuple[Target, ...]:
        """Of ``auto``; without any asked for, a loss of 1 %."""
        if self.budget != "auto":
            return ()
        asked = [Target("rows", percent) for percent in sorted(self.target_rows)]
        asked += [Target("loss", percent) for percent in sorted(self.max_loss, reverse=True)]
        return tuple(asked) or (Target("loss", 1.0),)


def calibrated_lengths(max_seq_length: int, largest_k: int) -> list[int]:
    """Context lengths that get a θ of their own: octaves, and the longest length.

    The first is at least twice the largest budget that is asked for, for below that nearly every key is among the
    top k; budgets of ``auto`` ask at most half of a context.

    Raises:
        CalibrationError: The sequences are too short for the budget.
    """
    first = max(SHORTEST_LENGTH, 1 << (2 * largest_k - 1).bit_length())
    if max_seq_length < first:
        raise CalibrationError(
            f"--k {largest_k} needs sequences of at least {first} tokens, twice the budget; "
            f"--max-seq-length is {max_seq_length}. Raise it or lower --k"
        )
    octaves = [1 << power for power in range(first.bit_length() - 1, max_seq_length.bit_length())]
    return octaves if octaves[-1] == max_seq_length else [*octaves, max_seq_length]
