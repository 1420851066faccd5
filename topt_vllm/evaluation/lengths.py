"""Lengths that an evaluation is asked for, and whether model and table reach them."""

import itertools

from topt_vllm.evaluation.options import EvaluationError, EvaluationOptions
from topt_vllm.replay.model import Subject
from topt_vllm.table.schema import ThresholdTable


def longest_sequence(options: EvaluationOptions, subject: Subject) -> int:
    """Tokens of a text's sequences.

    Raises:
        ReplayError: The model's context is shorter.
    """
    # Said here, for its default may be too long.
    named = _by_option(options)
    for flag, lengths in named.items():
        beyond = [length for length in lengths if length > (subject.context or length)]
        if beyond:
            raise EvaluationError(
                f"{flag} {beyond[0]}: the model's context is {subject.context} tokens; name shorter prompts"
            )
    asked = options.max_seq_length
    longest = max(itertools.chain.from_iterable(named.values()), default=None)
    return subject.max_seq_length(longest if asked is None else asked)


def contexts_by_option(options: EvaluationOptions, longest: int) -> dict[str, tuple[int, ...]]:
    """Contexts that rules are tuned for, by what names them."""
    texts = (options.lengths or (longest,)) if options.generate or not options.skip_texts else ()
    return _by_option(options) | {"--lengths": texts}


def check_lengths(options: EvaluationOptions, longest: int, table: ThresholdTable) -> None:
    """Refuses lengths that the sequences or the table don't reach."""
    for length in options.lengths:
        if not table.lengths[0] + 2 <= length <= longest:
            raise EvaluationError(
                f"--lengths {length}: contexts are longer than the table's first length, {table.lengths[0]}, "
                f"and at most as long as --max-seq-length, {longest}"
            )
    named = _by_option(options)
    for flag in ("--needles", "--task-lengths"):
        wrong = [length for length in named[flag] if not table.lengths[0] < length <= longest]
        if wrong:
            raise EvaluationError(
                f"{flag} {wrong[0]}: prompts are longer than the table's first length, {table.lengths[0]}, and "
                f"at most as long as --max-seq-length, {longest}"
            )
    if longest < table.lengths[0] + 2:
        raise EvaluationError(
            f"--max-seq-length is {longest}, but the table's first length is {table.lengths[0]}, "
            "below which every row is dense; evaluate on longer sequences"
        )


def check_rotations(options: EvaluationOptions, subject: Subject, longest: int) -> None:
    """Refuses lengths whose rows would be decoded with other rotations than their prompt's."""
    lengths = options.lengths or (longest,)
    subject.check_rotations(min(lengths), max(lengths))
    if options.rows:  # one pass serves to tune for all
        tuned = [*itertools.chain.from_iterable(contexts_by_option(options, longest).values())]
        subject.check_rotations(min(tuned), max(tuned))
    for length in lengths if options.generate else ():
        subject.check_rotations(length - options.generate, length)


def check_generate(options: EvaluationOptions, subject: Subject, longest: int, table: ThresholdTable) -> None:
    """Refuses ``--generate`` where the model or the table can't do it."""
    if subject.stateful:
        raise EvaluationError(
            f"--generate decodes from K and V alone, but layers of {options.model} keep a state; leave it out"
        )
    most = min(options.lengths or (longest,)) - table.lengths[0]
    if options.generate > most:
        raise EvaluationError(
            f"--generate {options.generate}: the shortest context has {most} tokens behind the table's first "
            f"length, {table.lengths[0]}, below which every row is dense; generate fewer, or name longer --lengths"
        )


def _by_option(options: EvaluationOptions) -> dict[str, tuple[int, ...]]:
    """Lengths that are asked for, by what names them; without tasks none of theirs are."""
    tasks = options.task_lengths if options.tasks else ()
    return {"--lengths": options.lengths, "--needles": options.needles, "--task-lengths": tasks}
