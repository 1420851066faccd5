"""What an evaluation will do, checked without the weights."""

import itertools
import sys
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch

from topt_vllm.config import TopThetaConfig
from topt_vllm.evaluation.cases import Case
from topt_vllm.evaluation.lengths import (
    check_generate,
    check_lengths,
    check_rotations,
    contexts_by_option,
    longest_sequence,
)
from topt_vllm.evaluation.needles import Needle, hide
from topt_vllm.evaluation.options import ADAPTING, NO_SCREEN, ROWS, EvaluationError, EvaluationOptions
from topt_vllm.evaluation.plot import check_plot
from topt_vllm.evaluation.rules.toptheta import ladder
from topt_vllm.evaluation.tasks.making import make_cases
from topt_vllm.replay.checkpoint import check_weights
from topt_vllm.replay.model import Subject, check_device, examine, load_tokenizer
from topt_vllm.replay.options import ReplayError
from topt_vllm.replay.texts import Sequences, cut_sequences, read_texts
from topt_vllm.table.command import lacks_key_statistics
from topt_vllm.table.schema import ThresholdTable
from topt_vllm.table.search import find_table
from topt_vllm.table.words import as_text


@dataclass(frozen=True)
class Text:
    """One text.

    Attributes:
        name: File name or hub id; the path where files of several folders have the same name.
        sequences: Evaluated token sequences.
        tuning: The sequence that parameters are tuned on, none of the above; [] if none are and the text is short.
        tuned_on: Where that comes from.
        calibrated: Whether the table was calibrated on it, so that its losses are no measure of other texts'.
    """

    name: str
    sequences: list[list[int]]
    tuning: list[int]
    tuned_on: str
    calibrated: bool


@dataclass(frozen=True)
class Plan:
    """An evaluation that has been checked and can start.

    Attributes:
        options: As asked, without default targets that can't be reached.
        subject: The model.
        max_seq_length: Tokens of a sequence.
        table: Its thresholds.
        path: Where the table lies.
        texts: What is evaluated on.
        needles: Facts hidden in the first of them.
        tasks: Cases by task and length, about the same text.
        dense: Dense layers for each target.
    """

    options: EvaluationOptions
    subject: Subject
    max_seq_length: int
    table: ThresholdTable
    path: Path
    texts: list[Text]
    needles: list[Needle]
    tasks: dict[tuple[str, int], list[Case]]
    dense: dict[float, frozenset[int]]

    @property
    def lengths(self) -> tuple[int, ...]:
        """Contexts at which the decoded rows of the texts end."""
        return () if self.options.skip_texts else self._contexts

    @property
    def generated(self) -> tuple[int, ...]:
        """Contexts at which generated text ends."""
        return self._contexts if self.options.generate else ()

    @property
    def _contexts(self) -> tuple[int, ...]:
        return self.options.lengths or (self.max_seq_length,)

    def count(self, length: int) -> int:
        """Rows decoded before a context of ``length``: none below the table's first length, where no θ is known."""
        return min(self.options.decode_rows, length - self.table.lengths[0])


def prepare(options: EvaluationOptions) -> Plan:
    """Everything that can fail without the weights.

    Raises:
        CalibrationError: An option, the model, its table or a text can't be used.
    """
    if options.plot:
        check_plot(options.plot)
    check_device(options.device)
    subject = examine(options.model, trust_remote_code=options.trust_remote_code)
    length = longest_sequence(options, subject)
    table, path = _table(options, subject)
    _check_screens(options, table, path)
    check_lengths(options, length, table)
    check_rotations(options, subject, length)
    if options.generate:
        check_generate(options, subject, length, table)
    for k in options.ks:
        _budget(table, k, options.rules)
    dense = _dense_layers(options, subject, table, length)
    options = replace(options, rows=tuple(dense))
    check_weights(options.model)
    tokenizer = load_tokenizer(options.model, options.trust_remote_code)
    calibrated = {source.sha256 for source in table.calibration.data} - {None}
    # Needles hide in the first text, and all else than losses starts from it.
    names = options.dataset[:1] if options.skip_texts else options.dataset
    # Once, for it may be a pipe.
    apart = _tuning_text(options, tokenizer, length)
    texts = [_text(options, tokenizer, name, length, calibrated, apart) for name in names]
    if len({text.name for text in texts}) < len(texts):
        texts = [replace(text, name=as_text(name)) for text, name in zip(texts, names, strict=True)]
    first = texts[0].sequences[0]
    needles = hide(tokenizer, first, options.needles, options.depths)
    tasks = {
        (task, length): make_cases(task, tokenizer, first, length, options.task_cases)
        for task in options.tasks
        for length in options.task_lengths
    }
    for case in (*needles, *itertools.chain.from_iterable(tasks.values())):
        subject.check_rotations(len(case.prompt), int(case.contexts[-1]))
    return Plan(options, subject, length, table, path, texts, needles, tasks, dense)


def _table(options: EvaluationOptions, subject: Subject) -> tuple[ThresholdTable, Path]:
    config = TopThetaConfig(thresholds=options.thresholds)
    found = find_table(config, subject.identity, options.model, subject.identity.revision)
    if found is None:
        raise EvaluationError(
            "an evaluation needs thresholds; name a table with --thresholds instead of none"
        )
    return found


def _check_screens(options: EvaluationOptions, table: ThresholdTable, path: Path) -> None:
    if options.k_screens != (NO_SCREEN,) and table.key_statistics is None:
        named = " ".join(options.k_screens)
        raise EvaluationError(f"--k-screen {named}: {lacks_key_statistics(options.model, path)}")


def _budget(table: ThresholdTable, k: int | str, rules: tuple[str, ...]) -> None:
    budget = table.budget(k)
    if ADAPTING in rules and not budget.ks():
        raise EvaluationError(
            f"--rules {ADAPTING} needs budgets that promise keys, and --budget {k} promises none; leave out one"
        )


def _dense_layers(
    options: EvaluationOptions, subject: Subject, table: ThresholdTable, length: int
) -> dict[float, frozenset[int]]:
    """The layers that are dense under every rule, by target; default targets out of reach are left out."""
    contexts = contexts_by_option(options, length)
    lengths = sorted(itertools.chain(*contexts.values()))
    asked = options.dense_layers
    layers = frozenset(ladder(table)[-1].dense_layers if asked is None else asked)
    if unknown := sorted(layers - set(subject.full_layers)):
        raise EvaluationError(f"--dense-layers {unknown} are not full-attention layers of {options.model}")

    def share(layers: frozenset[int], context: int) -> float:
        rows = torch.arange(max(context - options.decode_rows, table.lengths[0]), context)
        return subject.v_share((*layers, *subject.identity.sliding_window_layers), rows)

    found = {
        target: layers if asked is not None or share(layers, lengths[-1]) <= target / 2 else frozenset[int]()
        for target in options.rows
    }
    # Of a window the share is largest where contexts are short.
    missed = {target: dense for target, dense in found.items() if share(dense, lengths[0]) >= target}
    if not missed:
        return found
    targets, dense = " ".join(f"{target:g}" for target in missed), list(missed.values())[-1]
    named = f"dense layers {sorted(dense)} and " if dense else ""
    problem = f"at {lengths[0]} tokens {named}sliding windows alone read {share(dense, lengths[0]):.1%}"
    default = options.rows == ROWS
    if default and (len(missed) < len(found) or options.ks):
        print(f"note: left out of the default --rows: {targets}, for {problem}", file=sys.stderr)
        return {target: dense for target, dense in found.items() if target not in missed}
    flag = next(flag for flag, lengths_of in contexts.items() if lengths[0] in lengths_of)
    raise EvaluationError(
        f"{'the default ' if default else ''}--rows {targets}: {problem}; raise the target, or name longer "
        f"{flag}{' or fewer --dense-layers' if dense else ''}{', or a --budget' if default else ''}"
    )


def _text(
    options: EvaluationOptions,
    tokenizer: Any,
    name: str,
    length: int,
    calibrated: set[str | None],
    apart: tuple[list[int], str] | None,
) -> Text:
    documents, sources = read_texts((name,), (options.num_samples + 1) * length)
    # The part held back of a text is what its parameters are tuned on, unless another text serves for that.
    found = _cut(
        tokenizer, documents, options.num_samples, length, name, bool(options.rows) and apart is None
    )
    named = sources[0].name if len(sources) == 1 else name
    seen = any(source.sha256 in calibrated for source in sources)
    tuning, tuned_on = apart or (found.held_back, f"the end of {named}")
    return Text(named, found.calibration, tuning, tuned_on, seen)


def _tuning_text(options: EvaluationOptions, tokenizer: Any, length: int) -> tuple[list[int], str] | None:
    """The sequence of ``--tune-on``, and its text's name."""
    if options.tune_on is None:
        return None
    try:
        documents, sources = read_texts((options.tune_on,), 2 * length)
        found = _cut(tokenizer, documents, 1, length, options.tune_on, hold_back=False)
    except ReplayError as error:
        raise EvaluationError(f"--tune-on {str(error).removeprefix('--dataset ')}") from error
    return found.calibration[0], sources[0].name if len(sources) == 1 else options.tune_on


def _cut(
    tokenizer: Any, documents: list[str], count: int, length: int, name: str, hold_back: bool
) -> Sequences:
    """Sequences of one text, which messages name: there may be several."""
    try:
        return cut_sequences(tokenizer, documents, count, length, hold_back=hold_back)
    except ReplayError as error:
        raise EvaluationError(f"{name}: {error}") from error
