"""What a calibration run is asked to do, and what can be refused before a model is touched."""

import math
from dataclasses import dataclass
from pathlib import Path

SHORTEST_LENGTH = 256
ROWS_PER_LENGTH = 64
DTYPES = ("auto", "float32", "bfloat16", "float16")


class CalibrationError(ValueError):
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
        dense_layers: Layers to attend densely; None for layer 0 where it has thresholds.
        sigma: Standard deviations added to θ: above 0 keeps fewer keys, below 0 more.
        topk_at_calibration: Run the model with top-k attention, so that later layers see what sparse
            earlier layers produce.
        seed: Of the choice of query rows.
        device: ``cpu``, ``cuda``, ``cuda:N``, ``auto`` to spread over all GPUs; None for a GPU where there is one.
        dtype: Of the weights; ``auto`` for the checkpoint's own.
        force: Whether an existing output may be replaced.
    """

    model: str
    dataset: tuple[str, ...]
    output: Path
    num_samples: int = 4
    max_seq_length: int | None = None
    ks: tuple[int, ...] = (64, 128, 256)
    dense_layers: tuple[int, ...] | None = None
    sigma: float = 0.0
    topk_at_calibration: bool = False
    seed: int = 0
    device: str | None = None
    dtype: str = "auto"
    force: bool = False

    def __post_init__(self) -> None:
        if self.num_samples < 1:
            raise CalibrationError(f"--num-samples is {self.num_samples}; it must be at least 1")
        if not self.ks or min(self.ks) < 1 or list(self.ks) != sorted(set(self.ks)):
            raise CalibrationError(f"--k is {list(self.ks)}; different budgets of at least 1 are needed")
        if not math.isfinite(self.sigma):
            raise CalibrationError(f"--sigma is {self.sigma}; it must be finite")
        if self.dtype not in DTYPES:
            raise CalibrationError(f"--dtype is {self.dtype!r}; allowed: {', '.join(DTYPES)}")


def calibrated_lengths(max_seq_length: int, largest_k: int) -> list[int]:
    """Context lengths that get a θ of their own: octaves, and the longest length.

    The first is at least twice the largest budget, for below that nearly every key is among the top k.

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
