"""The margin of a K screen, as settings and options write it. Command lines read this: it loads nothing."""

from argparse import ArgumentTypeError

HARD = "hard"
# Standard deviations: where fewer than one in a thousand of the keys to keep are missed.
DEFAULT_MARGIN = 2.5


def read_margin(written: float | str) -> float | None:
    """Standard deviations of plane one's error; None for ``hard``, a bound that misses nothing.

    Raises:
        ArgumentTypeError: Neither a number nor ``hard``.
    """
    try:
        return None if written == HARD else float(written)
    except ValueError as error:
        raise ArgumentTypeError(
            f"{written!r}: a number of standard deviations is expected, or {HARD}"
        ) from error
