"""What an evaluation is asked to do, and what can be refused before a model is touched."""

from dataclasses import dataclass
from pathlib import Path

from topt_vllm.replay.options import DTYPES, ReplayError

RULES = ("toptheta", "toptheta-nomean", "topk", "blasst", "sparsev", "quest")
# Named where they are wanted: they start with a warm-up that the others don't have.
SIFT = ("sift", "sift-step", "sift-context")
# Evaluates budgets only, and only where it is named.
ADAPTING = "toptheta-adapt"
OURS = ("toptheta", "toptheta-nomean", ADAPTING)


class EvaluationError(ReplayError):
    """An evaluation that can't be run; the message says what to change."""


@dataclass(frozen=True)
class EvaluationOptions:
    """Options of ``topt-vllm evaluate``.

    Attributes:
        model: Folder or hub id.
        dataset: Texts to evaluate on, each by itself: as in calibration.
        rules: Names out of :data:`RULES`, :data:`SIFT`, and :data:`ADAPTING`.
        rows: Targets, shares of V rows read; each rule is tuned to each of them.
        ks: Budgets of the table, by k or name, to evaluate as they stand, with their own dense layers.
        thresholds: The table's path; None to search for it as the server does.
        dense_layers: Layers that are dense under every rule at every target; None for the budget's where they leave
            half of the target to the rule, and none where they don't.
        max_seq_length: Tokens of a sequence; None for the longest of ``lengths`` and ``needles``, or without any
            the model's context, 8192 at most.
        decode_rows: Rows that are decoded behind a dense prompt, for every rule and length.
        lengths: Contexts at which they end (tokens); () for ``max_seq_length`` alone.
        num_samples: Sequences of each text.
        tune_on: Text that the rules' parameters are tuned on; None for the end of each text, which isn't evaluated.
        needles: Lengths of needle prompts (tokens), none for no needles.
        depths: Where needles are hidden, 0 for the start and 1 for the end.
        needles_only: Whether the texts serve only to hide needles in.
        device: As in calibration.
        dtype: Of the weights; ``auto`` for the checkpoint's own.
        json: Where records are written.
        plot: Where the plot is written.
    """

    model: str
    dataset: tuple[str, ...]
    rules: tuple[str, ...] = RULES
    rows: tuple[float, ...] = (0.05, 0.1, 0.2)
    ks: tuple[int | str, ...] = ()
    thresholds: str | None = None
    dense_layers: tuple[int, ...] | None = None
    max_seq_length: int | None = None
    decode_rows: int = 1024
    lengths: tuple[int, ...] = ()
    num_samples: int = 1
    tune_on: str | None = None
    needles: tuple[int, ...] = ()
    depths: tuple[float, ...] = (0.0, 0.25, 0.5, 0.75, 1.0)
    needles_only: bool = False
    device: str | None = None
    dtype: str = "float32"
    json: Path | None = None
    plot: Path | None = None

    def __post_init__(self) -> None:
        def require(condition: bool, problem: str) -> None:
            if not condition:
                raise EvaluationError(problem)

        allowed = (*RULES, *SIFT, ADAPTING)
        unknown = [name for name in self.rules if name not in allowed]
        require(not unknown, f"--rules {' '.join(unknown)}: unknown; allowed: {', '.join(allowed)}")
        require(
            ADAPTING not in self.rules or bool(self.ks),
            f"--rules {ADAPTING} holds a budget's number of keys; name budgets with --k",
        )
        require(
            all(0 < share < 1 for share in self.rows),
            f"--rows {_listed(self.rows)}: shares lie above 0 and below 1",
        )
        require(
            bool(self.rows or self.ks), "nothing to evaluate: name targets with --rows, or budgets with --k"
        )
        require(
            not self.ks or any(rule in OURS for rule in self.rules),
            f"--k {_listed(self.ks)} evaluates thresholds, but --rules names none of {', '.join(OURS)}",
        )
        require(self.decode_rows >= 2, f"--decode-rows is {self.decode_rows}; it must be at least 2")
        require(self.num_samples >= 1, f"--num-samples is {self.num_samples}; it must be at least 1")
        require(
            all(0 <= depth <= 1 for depth in self.depths),
            f"--depths {_listed(self.depths)}: 0 is the start of the text and 1 its end",
        )
        require(
            bool(self.needles) or not self.needles_only,
            "--needles-only: name the lengths of the prompts with --needles",
        )
        require(self.dtype in DTYPES, f"--dtype is {self.dtype!r}; allowed: {', '.join(DTYPES)}")
        for option, path in (("--json", self.json), ("--plot", self.plot)):
            if path is not None:
                require(not path.exists(), f"{option} {path} exists; name another file")
                require(path.resolve().parent.is_dir(), f"{option} {path}: the folder does not exist")


def _listed(values: tuple[object, ...]) -> str:
    return " ".join(map(str, values))
