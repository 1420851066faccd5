"""A check's outcome, and how one that can't be made becomes one that failed."""

from collections.abc import Callable
from dataclasses import dataclass


@dataclass(frozen=True)
class Check:
    """One line of the report.

    Attributes:
        name: What was checked.
        passed: Whether it is as it should be.
        detail: What was found, and where it failed how to mend it.
    """

    name: str
    passed: bool
    detail: str


def attempt(name: str, find: Callable[[], str]) -> Check:
    """Makes a check: what ``find`` returns is the detail, whatever it raises is the reason why it failed."""
    try:
        return Check(name, True, find())
    except Exception as error:  # a check that breaks is an answer, and the next one is still wanted
        # One line each: YAML's errors have several.
        return Check(name, False, " ".join(str(error).split()) or type(error).__name__)


class CheckError(Exception):
    """Something is not as it should be; the message says what and how to mend it."""
