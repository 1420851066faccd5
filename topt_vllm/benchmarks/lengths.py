"""Context lengths of a batch as text: ``1x131072+15x4096`` is one sequence of 131072 tokens and 15 of 4096."""

import re
from argparse import ArgumentTypeError
from collections.abc import Sequence
from itertools import groupby

_PART = re.compile(r"([1-9]\d*)x([1-9]\d*)")


def parse_lengths(text: str) -> tuple[int, ...]:
    """Context length of each sequence (tokens).

    Raises:
        ArgumentTypeError: Not counts and lengths.
    """
    lengths: list[int] = []
    for part in text.split("+"):
        found = _PART.fullmatch(part)
        if found is None:
            raise ArgumentTypeError(
                f"{part!r} in {text!r} is no COUNTxLENGTH; sequences and tokens are at least 1, and parts are "
                "joined by +, such as 1x131072+15x4096"
            )
        lengths += [int(found[2])] * int(found[1])
    return tuple(lengths)


def describe_lengths(lengths: Sequence[int]) -> str:
    """The text that :func:`parse_lengths` reads."""
    return "+".join(f"{len(list(group))}x{length}" for length, group in groupby(lengths))
