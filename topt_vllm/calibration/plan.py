"""What a calibration run will do, once everything that can fail without the weights has been checked."""

from dataclasses import dataclass
from pathlib import Path

from topt_vllm.calibration.options import CalibrationError, CalibrationOptions, calibrated_lengths
from topt_vllm.output import is_one_of, not_writable, refuse_overwrite
from topt_vllm.replay.checkpoint import check_weights
from topt_vllm.replay.model import Subject, check_device, examine, load_tokenizer
from topt_vllm.replay.texts import Sequences, cut_sequences, read_texts
from topt_vllm.table.schema import TextSource

# Query rows of a sequence on which heads' errors are measured, and how many sequences.
ERROR_ROWS = 64
_ERROR_SEQUENCES = 2
_TUNING_SEQUENCES = 2


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
    return Plan(options, subject, lengths, dense, sequences, sources)


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
