"""What a calibration run is asked to do, and what can be refused before a model is touched."""

from collections.abc import Iterable
from dataclasses import dataclass, fields
from pathlib import Path
from typing import Literal

from topt_vllm.calibration.search import Target
from topt_vllm.replay.options import DTYPES, REQUIRED, ReplayError, flag_of, option
from topt_vllm.shares import read_percent

SHORTEST_LENGTH = 256
ROWS_PER_LENGTH = 64
BUDGETS = ("k", "auto")
# torch takes 64 bits, and sequences count on from it.
_LARGEST_SEED = 1 << 62

# What --k-screen-only has no use for.
_NOT_FOR_K_SCREENS = (
    "budget",
    "ks",
    "max_loss",
    "target_rows",
    "dense_layers",
    "force",
    "resume",
)

# Headings of the help.
_BUDGETS, _RUN = "budgets", "run and output"


class CalibrationError(ReplayError):
    """A calibration that can't be run; the message says what to change."""


def _ascending(values: Iterable[int]) -> tuple[int, ...]:
    return tuple(sorted(values))


@dataclass(frozen=True)
class CalibrationOptions:
    """Options of ``topt-vllm calibrate``, each with its help; percentages are out of 100."""

    model: str = option(REQUIRED, "folder or hub id of a decoder-only model")
    dataset: tuple[str, ...] = option(
        REQUIRED,
        "texts: plain, JSON, CSV or Parquet, compressed or not; folders and pipes of them; or hub datasets as "
        "name[:config[:split]] (docs/texts.md)",
        metavar="TEXT",
    )
    num_samples: int = option(4, "sequences to calibrate on (default %(default)s)")
    max_seq_length: int | None = option(
        None, "tokens of a sequence (default: the model's context, at most 8192)"
    )
    budget: Literal["k", "auto"] = option(
        "k",
        "k: the same number of keys everywhere; auto: those of --k, and one for each target, with more keys for "
        "the heads that lose more (default %(default)s)",
        group=_BUDGETS,
        choices=BUDGETS,
    )
    ks: tuple[int, ...] = option(
        (64, 128, 256),
        "budgets: keys per query head (default 64 128 256)",
        group=_BUDGETS,
        flag="k",
        convert=_ascending,
    )
    max_loss: tuple[float, ...] = option(
        (), "targets of --budget auto: rise of perplexity, as 1%%", group=_BUDGETS, type=read_percent
    )
    target_rows: tuple[float, ...] = option(
        (), "likewise: V rows read, all layers counted", group=_BUDGETS, type=read_percent
    )
    # None: layer 0 where it has thresholds.
    dense_layers: tuple[int, ...] | None = option(
        None,
        "layers that all budgets attend densely (default: layer 0 for those of --k, none for others)",
        group=_BUDGETS,
        nargs="*",
        metavar="LAYER",
    )
    seed: int = option(0, "of the choice of query rows (default %(default)s)", group=_RUN)
    device: str | None = option(
        None, "cpu, cuda, cuda:N, or auto for all GPUs (default: a GPU where there is one)", group=_RUN
    )
    dtype: str = option("auto", "of the weights (default: the checkpoint's)", group=_RUN, choices=DTYPES)
    trust_remote_code: bool = option(False, "run code that comes with the model", group=_RUN)
    output: Path = option(
        REQUIRED,
        "table to write (default: toptheta.yaml in the model's folder, NAME.yaml here for a hub id)",
        group=_RUN,
        required=False,
        kw_only=True,
    )
    k_screen_only: bool = option(
        False,
        "only add what K screens need to an existing table, or renew it, without --force; thresholds stay as they "
        "are; minutes",
        group=_RUN,
    )
    force: bool = option(False, "replace an existing table", group=_RUN)
    resume: bool = option(False, "go on where a killed run with the same options was", group=_RUN)

    def __post_init__(self) -> None:
        if self.num_samples < 1:
            raise CalibrationError(f"--num-samples is {self.num_samples}; it must be at least 1")
        if abs(self.seed) >= _LARGEST_SEED:
            raise CalibrationError(f"--seed is {self.seed}; its size must be below 2^62")
        if not self.ks or min(self.ks) < 1 or list(self.ks) != sorted(set(self.ks)):
            raise CalibrationError(f"--k is {list(self.ks)}; different budgets of at least 1 are needed")
        for name, percents in (("--max-loss", self.max_loss), ("--target-rows", self.target_rows)):
            # Budgets are named after them, and names have fewer digits.
            alike = len({f"{percent:g}" for percent in percents}) < len(percents)
            if alike or any(not 0 < percent < 100 for percent in percents):
                raise CalibrationError(
                    f"{name} is {list(percents)}; different percentages above 0 and below 100 are needed"
                )
        if (self.max_loss or self.target_rows) and self.budget != "auto":
            raise CalibrationError("--max-loss and --target-rows are targets of --budget auto; add it")
        if self.k_screen_only:
            self._require_nothing_of_thresholds()

    def _require_nothing_of_thresholds(self) -> None:
        options = (field for field in fields(self) if field.name in _NOT_FOR_K_SCREENS)
        given = [flag_of(field) for field in options if getattr(self, field.name) != field.default]
        if given:
            raise CalibrationError(
                f"{', '.join(given)}: not with --k-screen-only, which leaves thresholds as they are, starts over "
                "in minutes and needs no --force; leave that out"
            )

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
    top k; budgets of ``auto`` ask at most half of a context. Sequences are longer: the last token of the held-back
    one is only predicted, and shorter contexts than the first length are dense, so nothing would be measured.

    Raises:
        CalibrationError: The sequences are too short for the budget.
    """
    first = max(SHORTEST_LENGTH, 1 << (2 * largest_k - 1).bit_length())
    if max_seq_length <= first:
        raise CalibrationError(
            f"--k {largest_k} needs sequences of more than {first} tokens, for contexts below are dense; "
            f"--max-seq-length is {max_seq_length}. Raise it or lower --k"
        )
    octaves = [1 << power for power in range(first.bit_length() - 1, max_seq_length.bit_length())]
    return octaves if octaves[-1] == max_seq_length else [*octaves, max_seq_length]
