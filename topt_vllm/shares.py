"""Shares and percentages as command lines write them."""

from argparse import ArgumentTypeError


def read_share(text: str) -> float:
    """A share out of 1, which may be written as a percentage: 0.1 or 10%.

    Raises:
        ArgumentTypeError: Neither.
    """
    try:
        return float(text[:-1]) / 100 if text.endswith("%") else float(text)
    except ValueError as error:
        raise ArgumentTypeError(f"{text!r}: a share is expected, such as 0.1 or 10%") from error


def read_part(text: str) -> float:
    """A share above 0 and up to 1; as :func:`read_share`."""
    share = read_share(text)
    if not 0 < share <= 1:
        raise ArgumentTypeError(f"{text!r}: a share above 0 and up to 1 is expected")
    return share


def read_percent(text: str) -> float:
    """A percentage out of 100, with or without its sign: 1 or 1%.

    Raises:
        ArgumentTypeError: Neither.
    """
    try:
        return float(text.removesuffix("%"))
    except ValueError as error:
        raise ArgumentTypeError(f"{text!r}: a percentage is expected, such as 1%") from error
