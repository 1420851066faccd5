"""The margin of a K screen, as settings and options write it. Command lines read this: it loads nothing."""

HARD = "hard"
# Standard deviations: where fewer than one in a thousand of the keys to keep are missed.
DEFAULT_MARGIN = 2.5


def read_margin(written: float | str) -> float | None:
    """Standard deviations of plane one's error; None for ``hard``, a bound that misses nothing.

    Raises:
        ValueError: Neither a number nor ``hard``.
    """
    return None if written == HARD else float(written)
