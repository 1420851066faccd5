"""``calibrate --k-screen-only``: what K screens need, added to a table that has thresholds already."""

import shlex
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from tqdm import tqdm

from topt_vllm.calibration.candidates import CandidateShares
from topt_vllm.calibration.key_statistics import key_statistics, key_sums
from topt_vllm.calibration.options import CalibrationError, CalibrationOptions
from topt_vllm.calibration.plan import read_sequences
from topt_vllm.output import not_writable
from topt_vllm.replay.memory import explained
from topt_vllm.replay.model import Subject, check_device, examine, load_causal_lm
from topt_vllm.replay.scores import LayerCall
from topt_vllm.replay.texts import Sequences
from topt_vllm.replay.whole_pass import observed
from topt_vllm.table.file import load
from topt_vllm.table.schema import KeyStatistics, ThresholdTable
from topt_vllm.table.words import printable


@dataclass(frozen=True)
class ScreenPlan:
    """A run that has been checked and can start.

    Attributes:
        options: As asked.
        subject: The model.
        table: To which statistics are added.
        sequences: Tokens; the held-back ones measure candidates.
    """

    options: CalibrationOptions
    subject: Subject
    table: ThresholdTable
    sequences: Sequences


def prepare(options: CalibrationOptions) -> ScreenPlan:
    """Everything that can fail without the weights.

    Raises:
        CalibrationError: There is no table of the model, it can't be replaced, or an option, the model or the text
            can't be used.
    """
    check_device(options.device)
    subject = examine(options.model, trust_remote_code=options.trust_remote_code)
    table = _table(options, subject)
    if problem := not_writable(options.output):
        raise CalibrationError(f"--output {options.output}: {problem}")
    length = subject.max_seq_length(options.max_seq_length)
    if length <= table.lengths[0]:
        raise CalibrationError(
            f"--max-seq-length is {length}, but {options.output} has thresholds from {table.lengths[0]} tokens on, "
            "and none of a held-back text would be measured; use longer sequences"
        )
    sequences, _ = read_sequences(options, subject, length)
    return ScreenPlan(options, subject, table, sequences)


def _table(options: CalibrationOptions, subject: Subject) -> ThresholdTable:
    path = options.output
    if not path.is_file():
        raise CalibrationError(
            f"--k-screen-only adds to a table, and {path} is none. Name it with --output, or calibrate one, K "
            f"screens included:\n    {_full_command(options, path)}"
        )
    table = load(path)
    difference = subject.identity.difference(table.model)
    if difference:
        raise CalibrationError(
            f"{path}: this table belongs to {printable(table.model.id[:80])}, not to {options.model}: {difference} "
            f"(model against table). Name the right one with --output, or calibrate one, K screens included:\n"
            f"    {_full_command(options, _free_name(path))}"
        )
    return table


def _full_command(options: CalibrationOptions, output: Path) -> str:
    texts = ("--model", options.model, "--dataset", *options.dataset)
    return shlex.join(["topt-vllm", "calibrate", *texts, "--output", str(output)])


def _free_name(path: Path) -> Path:
    """Beside another model's table, which stays."""
    free = path
    while free.exists():
        free = free.with_stem(f"{free.stem}-new")
    return free


def add_key_statistics(plan: ScreenPlan) -> ThresholdTable:
    """The table with statistics of the keys and shares of candidates; shows its progress on stderr.

    Raises:
        CalibrationError: The weights can't be loaded, the model's keys can't be used, or memory runs out.
    """
    with explained(len(plan.sequences.held_back), CalibrationError):
        options = plan.options
        model = load_causal_lm(options.model, options.device, options.dtype, options.trust_remote_code)
        return _with_key_statistics(model, plan)


def _with_key_statistics(model: Any, plan: ScreenPlan) -> ThresholdTable:
    subject = plan.subject
    sequences = plan.sequences.calibration
    passes = len(sequences) + 1
    with tqdm(total=passes * len(subject.full_layers), desc="statistics of K", unit="layer") as bar:
        statistics = _statistics(model, plan, bar)
        bar.set_description("candidates")
        # The last token is only predicted where budgets are measured.
        text, table = plan.sequences.held_back[:-1], plan.table
        shares = CandidateShares(subject, len(text), statistics.transforms(), table.budgets, table.lengths)

        def observe(call: LayerCall) -> None:
            shares.observe(call)
            bar.update()

        observed(model, subject, text, observe)
    budgets = shares.added_to(table.budgets)
    return table.model_copy(update={"budgets": budgets, "key_statistics": statistics})


def _statistics(model: Any, plan: ScreenPlan, bar: Any) -> KeyStatistics:
    sums: dict[int, torch.Tensor] = {}

    def observe(call: LayerCall) -> None:
        found = key_sums(call.query, call.key)
        sums[call.layer] = sums[call.layer] + found if call.layer in sums else found
        bar.update()

    for sequence in plan.sequences.calibration:
        observed(model, plan.subject, sequence, observe)
    return key_statistics(sums, plan.options.seed)
