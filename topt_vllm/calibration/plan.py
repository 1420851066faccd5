"""What a calibration run will do, once everything that can fail without the weights has been checked."""

from dataclasses import dataclass
from pathlib import Path

import torch

from topt_vllm.calibration.options import CalibrationError, CalibrationOptions, calibrated_lengths
from topt_vllm.output import is_one_of, not_writable, refuse_overwrite
from topt_vllm.replay.checkpoint import check_weights
from topt_vllm.replay.model import Subject, check_device, examine, load_tokenizer
from topt_vllm.replay.replay import replayed_rows
from topt_vllm.replay.texts import Sequences, cut_sequences, read_texts
from topt_vllm.table.schema import TextSource

# Query rows of a sequence on which heads' errors are measured, and how many sequences.
ERROR_ROWS = 64
_ERROR_SEQUENCES = 2
_TUNING_SEQUENCES = 2
# Rows decoded to measure a budget: the last ones of a sequence.
MEASURED_ROWS = 1024


@dataclass(frozen=True)
class Plan:
    """A run that has been checked and can start.

    Attributes:
        options: As asked.
        subject: The model.
        lengths: Calibrated context lengths (tokens); the last is the sequences' length.
        dense_layers: Layers to attend densely, of all budgets that don't allocate.
        sequences: Tokens.
        sources: Where the tokens came from.
    """

    options: CalibrationOptions
    subject: Subject
    lengths: list[int]
    dense_layers: list[int]
    sequences: Sequences
    sources: list[TextSource]

    @property
    def max_seq_length(self) -> int:
        """Tokens of each sequence."""
        return self.lengths[-1]

    @property
    def ks(self) -> tuple[int, ...]:
        """Every k that thresholds are collected for, ascending: those asked for, and those that heads may get."""
        offered = ladder(self.max_seq_length) if self.options.budget == "auto" else ()
        return tuple(sorted({*self.options.ks, *offered}))

    @property
    def allocated_layers(self) -> list[int]:
        """Layers whose heads get a k of their own in a budget with a target: all that aren't asked to be dense."""
        asked = self.options.dense_layers or ()
        return [layer for layer in self.subject.full_layers if layer not in asked]

    def fixed_rows(self, contexts: torch.Tensor) -> float:
        """Share of the V rows in context that lies in layers to which nothing is allocated; int64 [r]."""
        return 1 - self.subject.v_share(self.allocated_layers, contexts)

    @property
    def error_sequences(self) -> list[list[int]]:
        """The calibration sequences on which heads' errors are measured."""
        return self.sequences.calibration[-_ERROR_SEQUENCES:]


def ladder(max_seq_length: int) -> tuple[int, ...]:
    """Numbers of keys that a head may get: powers of two, up to half of the context."""
    return tuple(1 << power for power in range((max_seq_length // 2).bit_length()))


def prepare(options: CalibrationOptions) -> Plan:
    """Everything that can fail without the weights.

    Raises:
        CalibrationError: An option, the model or the text can't be used.
        FileExistsError: The output exists and may not be replaced.
    """
    _check_output(options)
    check_device(options.device)
    subject = examine(options.model, trust_remote_code=options.trust_remote_code)
    lengths = calibrated_lengths(subject.max_seq_length(options.max_seq_length), options.ks[-1])
    dense, length = _dense_layers(options, subject.full_layers), lengths[-1]
    tuning = _TUNING_SEQUENCES if options.targets else 0
    sequences, sources = read_sequences(options, subject, length, tuning)
    plan = Plan(options, subject, lengths, dense, sequences, sources)
    _check_targets(plan)
    return plan


def _check_targets(plan: Plan) -> None:
    """Refuses rows that are read whatever is allocated: every head would get a single key."""
    options, length = plan.options, plan.max_seq_length
    rows = replayed_rows(length, min(MEASURED_ROWS, length - plan.lengths[0]))
    least = 100 * plan.fixed_rows(torch.tensor(rows) + 1)
    if missed := [f"{percent:g}%" for percent in options.target_rows if percent <= least]:
        dense = f"--dense-layers {' '.join(map(str, options.dense_layers))}" if options.dense_layers else ""
        windows = "sliding windows" if plan.subject.identity.sliding_window_layers else ""
        raise CalibrationError(
            f"--target-rows {' '.join(missed)}: at {length} tokens {' and '.join(filter(None, (windows, dense)))} "
            f"alone read {least:.1f} % of the V rows; raise the target, leave --target-rows out, or give "
            f"{'fewer --dense-layers' if dense else 'a longer --max-seq-length'}"
        )


def _dense_layers(options: CalibrationOptions, full: list[int]) -> list[int]:
    if options.dense_layers is None:
        return [layer for layer in full if layer == 0]
    unknown = sorted(set(options.dense_layers) - set(full))
    if unknown:
        raise CalibrationError(
            f"--dense-layers {unknown} are not layers that get thresholds; those are {_ranges(full)}"
        )
    if len(set(options.dense_layers)) == len(full):
        raise CalibrationError(
            "--dense-layers names every layer that gets thresholds; nothing would be sparse"
        )
    return sorted(set(options.dense_layers))


def _ranges(numbers: list[int]) -> str:
    if numbers == list(range(numbers[0], numbers[-1] + 1)):
        return f"{numbers[0]} to {numbers[-1]}"
    return ", ".join(map(str, numbers))


def _check_output(options: CalibrationOptions) -> None:
    if problem := not_writable(options.output):
        raise CalibrationError(f"--output {options.output}: {problem}")
    refuse_overwrite(options.output, options.force)
    if is_one_of(options.output, map(Path, options.dataset)):
        raise CalibrationError(f"--output {options.output} is a text of --dataset; name another file")


def read_sequences(
    options: CalibrationOptions, subject: Subject, length: int, tuning: int = 0
) -> tuple[Sequences, list[TextSource]]:
    """Sequences of the texts, of ``length`` tokens, and where they came from."""
    check_weights(options.model)
    documents, sources = read_texts(options.dataset, (options.num_samples + tuning + 1) * length)
    tokenizer = load_tokenizer(options.model, options.trust_remote_code)
    sequences = cut_sequences(tokenizer, documents, options.num_samples, length, tuning)
    largest = max(max(tokens) for tokens in (*sequences.calibration, *sequences.tuning, sequences.held_back))
    # A tokenizer of another model shows itself where it makes tokens that the model doesn't have.
    if largest >= subject.vocabulary:
        raise CalibrationError(
            f"{options.model}: the tokenizer makes token {largest}, but the model has {subject.vocabulary} tokens; "
            "the tokenizer belongs to another model. Put the right tokenizer files into the model's folder"
        )
    return sequences, sources
