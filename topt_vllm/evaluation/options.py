"""What an evaluation is asked to do, and what can be refused before a model is touched."""

import math
import os
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from topt_vllm.attention.margin import DEFAULT_MARGIN, HARD, read_margin
from topt_vllm.output import is_one_of, not_writable
from topt_vllm.replay.options import DTYPES, REQUIRED, ReplayError, option, table_name
from topt_vllm.shares import read_share

RULES = ("toptheta", "toptheta-nomean", "topk", "blasst", "sparsev", "quest")
# Named where they are wanted: they start with a warm-up that the others don't have.
SIFT = ("sift", "sift-context")
# Evaluates budgets only, and only where it is named.
ADAPTING = "toptheta-adapt"
OURS = ("toptheta", "toptheta-nomean", ADAPTING)
# The rule that K screens are evaluated with.
SCREENED = "toptheta"
# Their thresholds follow a sequence, whose rows therefore have to come at once.
IN_ORDER = (ADAPTING, *SIFT)
ROWS = (0.05, 0.1, 0.2)
TASKS = ("multikey", "variables", "common-words", "frequent-words", "questions")
NO_SCREEN = "off"
SCREENS = (NO_SCREEN, "int4", "int4+4")

# Headings of the help.
_RULES, _ROWS, _RUN = "rules and targets", "decoded rows", "run and output"
_NEEDLES, _TASKS = "hidden facts", "tasks and generated text"


class EvaluationError(ReplayError):
    """An evaluation that can't be run; the message says what to change."""


def _set(values: Iterable[Any]) -> tuple[Any, ...]:
    return tuple(sorted(set(values)))


def _names(values: Iterable[str]) -> tuple[str, ...]:
    return tuple(dict.fromkeys(values))


def _budgets(values: Iterable[str]) -> tuple[int | str, ...]:
    return tuple(int(value) if value.isdecimal() else value for value in _names(values))


def _layers(values: list[str]) -> tuple[int, ...]:
    if values == ["none"]:
        return ()
    try:
        return _set(map(int, values))
    except ValueError as error:
        raise EvaluationError(f"--dense-layers {' '.join(values)}: layer numbers, or none") from error


@dataclass(frozen=True)
class EvaluationOptions:
    """Options of ``topt-vllm evaluate``, each with its help; shares are out of 1."""

    model: str = option(REQUIRED, "folder or hub id of a decoder-only model")
    dataset: tuple[str, ...] = option(
        REQUIRED, "texts, each evaluated by itself; as in calibrate", metavar="TEXT"
    )
    rules: tuple[str, ...] = option(
        RULES,
        f"out of {' '.join(RULES)} (default all of these), {' '.join(SIFT)}, and, for --budget, {ADAPTING}",
        group=_RULES,
        choices=(*RULES, *SIFT, ADAPTING),
        metavar="RULE",
        convert=_names,
    )
    rows: tuple[float, ...] = option(
        ROWS,
        "shares of V rows to tune the rules to, all layers counted, as 0.1 or 10%% (default 0.05 0.1 0.2, without "
        "those that windows alone exceed)",
        group=_RULES,
        nargs="*",
        type=read_share,
        metavar="SHARE",
        convert=_set,
    )
    # With their own dense layers.
    ks: tuple[int | str, ...] = option(
        (),
        "also budgets of the table as they stand, by k or name (--k: its former name)",
        group=_RULES,
        flag="budget",
        alias="k",
        type=str,
        metavar="BUDGET",
        convert=_budgets,
    )
    k_screens: tuple[str, ...] = option(
        (NO_SCREEN,),
        f"K screens of the rule {SCREENED}, a record for each (default {NO_SCREEN})",
        group=_RULES,
        flag="k-screen",
        choices=SCREENS,
        convert=_names,
    )
    # None: a hard bound.
    k_screen_margin: float | None = option(
        DEFAULT_MARGIN,
        f"margin of K screens: standard deviations of a score's error, or {HARD} (default %(default)s)",
        group=_RULES,
        type=read_margin,
        metavar="NUMBER",
    )
    thresholds: str | None = option(
        None,
        "the model's table (default: where the server finds it)",
        group=_RULES,
        type=table_name,
        metavar="TABLE",
    )
    dense_layers: tuple[int, ...] | None = option(
        None,
        "dense under every rule: layers, or none (default: the table's where they leave half of the target "
        "to the rule, else none)",
        group=_RULES,
        type=str,
        metavar="LAYER",
        convert=_layers,
    )
    tune_on: str | None = option(
        None,
        "text to tune on (default: the end of each text, which isn't evaluated)",
        group=_RULES,
        metavar="TEXT",
    )
    max_seq_length: int | None = option(
        None,
        "tokens of a sequence (default: the longest of --lengths, --needles and --task-lengths, else the "
        "model's context, at most 8192)",
        group=_ROWS,
    )
    decode_rows: int = option(
        1024,
        "rows decoded under each rule; what lies before them is the dense prompt (default %(default)s)",
        group=_ROWS,
        metavar="ROWS",
    )
    lengths: tuple[int, ...] = option(
        (),
        "contexts at which the decoded rows end, a record for each (default: --max-seq-length alone)",
        group=_ROWS,
        metavar="TOKENS",
        convert=_set,
    )
    num_samples: int = option(1, "sequences of each text (default %(default)s)", group=_ROWS)
    needles: tuple[int, ...] = option(
        (),
        "hide facts in the first text, in prompts of these lengths",
        group=_NEEDLES,
        metavar="LENGTH",
        convert=_set,
    )
    depths: tuple[float, ...] = option(
        (0.0, 0.25, 0.5, 0.75, 1.0),
        "where the facts of a prompt stand in it, 0 to 1 (default 0 0.25 0.5 0.75 1)",
        group=_NEEDLES,
        convert=_set,
    )
    tasks: tuple[str, ...] = option(
        (),
        f"ask about prompts made from the first text: out of {' '.join(TASKS)}",
        group=_TASKS,
        choices=TASKS,
        metavar="TASK",
        convert=_names,
    )
    task_lengths: tuple[int, ...] = option(
        (4096,), "tokens of their prompts (default 4096)", group=_TASKS, metavar="LENGTH", convert=_set
    )
    task_cases: int = option(
        10, "questions of each task at each length (default %(default)s)", group=_TASKS, metavar="COUNT"
    )
    generate: int = option(
        0,
        "tokens that the model writes behind the start of the first text, up to each of --lengths: dense, and "
        "under each rule with the same noise (default 0)",
        group=_TASKS,
        metavar="TOKENS",
    )
    skip_texts: bool = option(
        False,
        "leave out what the texts themselves would lose (--needles-only: its former name)",
        group=_ROWS,
        alias="needles-only",
    )
    device: str | None = option(
        None, "cpu, cuda, cuda:N, or auto for all GPUs (default: a GPU where there is one)", group=_RUN
    )
    dtype: str = option("float32", "of the weights (default %(default)s)", group=_RUN, choices=DTYPES)
    trust_remote_code: bool = option(False, "run code that comes with the model", group=_RUN)
    json: Path | None = option(None, "write the records; the file must not exist", group=_RUN, metavar="FILE")
    plot: Path | None = option(
        None, "plot loss against rows (.png, .svg, .pdf); must not exist", group=_RUN, metavar="FILE"
    )

    def __post_init__(self) -> None:
        def require(condition: bool, problem: str) -> None:
            if not condition:
                raise EvaluationError(problem)

        require(
            ADAPTING not in self.rules or bool(self.ks),
            f"--rules {ADAPTING} holds a budget's number of keys; name budgets with --budget",
        )
        require(
            all(0 < share < 1 for share in self.rows),
            f"--rows {_listed(self.rows)}: shares lie above 0 and below 1",
        )
        require(
            bool(self.rows or self.ks),
            "nothing to evaluate: name targets with --rows, or budgets with --budget",
        )
        require(
            bool(self.rows) or self.dense_layers is None,
            "--dense-layers is for the targets of --rows; budgets have dense layers of their own",
        )
        require(
            self.tune_on is None
            or (
                self.tune_on not in self.dataset
                and not is_one_of(Path(self.tune_on), map(Path, self.dataset))
            ),
            f"--tune-on {self.tune_on} is evaluated too; leave it out, for the end of each text is tuned on then",
        )
        require(
            bool(self.rows) or self.tune_on is None,
            "--tune-on is for the targets of --rows; budgets aren't tuned, so leave it out",
        )
        others = [rule for rule in self.rules if rule not in OURS and self.rules != RULES]
        require(
            bool(self.rows) or not others,
            f"--rules {' '.join(others)} are tuned to targets, and --rows names none; name some, or leave them out",
        )
        require(
            not self.ks or any(rule in OURS for rule in self.rules),
            f"--budget {_listed(self.ks)} evaluates thresholds, but --rules names none of {', '.join(OURS)}",
        )
        require(
            self.k_screens == (NO_SCREEN,) or SCREENED in self.rules,
            f"--k-screen {_listed(self.k_screens)} is for the rule {SCREENED}, which --rules doesn't name",
        )
        require(
            self.k_screen_margin is None or 0 <= self.k_screen_margin < math.inf,
            f"--k-screen-margin is {self.k_screen_margin}; it must be a number of at least 0, or {HARD}",
        )
        require(
            self.k_screen_margin == DEFAULT_MARGIN or self.k_screens != (NO_SCREEN,),
            "--k-screen-margin is that of a K screen; name one with --k-screen, or leave it out",
        )
        require(self.decode_rows >= 2, f"--decode-rows is {self.decode_rows}; it must be at least 2")
        require(self.num_samples >= 1, f"--num-samples is {self.num_samples}; it must be at least 1")
        require(
            all(0 <= depth <= 1 for depth in self.depths),
            f"--depths {_listed(self.depths)}: 0 is the start of the text and 1 its end",
        )
        require(
            bool(self.needles) or self.depths == EvaluationOptions.depths,
            "--depths is where facts stand in the prompts of --needles; name those, or leave it out",
        )
        require(self.task_cases >= 1, f"--task-cases is {self.task_cases}; it must be at least 1")
        require(
            bool(self.tasks)
            or (self.task_lengths, self.task_cases)
            == (EvaluationOptions.task_lengths, EvaluationOptions.task_cases),
            "--task-lengths and --task-cases are for --tasks; name some, or leave them out",
        )
        require(
            self.generate == 0 or self.generate >= 2,
            f"--generate is {self.generate}; it must be at least 2, or 0",
        )
        following = [name for name in self.rules if name in IN_ORDER]
        require(
            not self.generate or not following,
            f"--generate decodes token by token, and --rules {' '.join(following)} can't: their thresholds follow "
            "a sequence; leave out one",
        )
        require(
            not self.skip_texts or bool(self.needles or self.tasks or self.generate),
            "--skip-texts (or --needles-only) leaves nothing to evaluate; name --needles, --tasks or --generate",
        )
        for flag, path in (("--json", self.json), ("--plot", self.plot)):
            if path is not None:
                require(not os.path.lexists(path), f"{flag} {path} exists; name another file")
                problem = not_writable(path)
                require(problem is None, f"{flag} {path}: {problem}")
        require(self.json is None or self.json != self.plot, f"--json and --plot are one file, {self.json}")


def _listed(values: tuple[object, ...]) -> str:
    return " ".join(map(str, values))
