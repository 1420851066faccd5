"""Numbers as the page writes them: a real minus sign, and a space that doesn't break before the unit."""

import math
from collections.abc import Iterable

NOTHING = "–"
_SPACE = "\u00a0"


def plain(number: float | None, digits: int = 2) -> str:
    """``−0.25``, or a dash where nothing was measured."""
    if number is None or not math.isfinite(number):
        return NOTHING
    return f"{number:.{digits}f}".replace("-", "−")


def share(part: float | None, digits: int = 1) -> str:
    """``4.1 %`` of a share of one."""
    return NOTHING if part is None else f"{plain(100 * part, digits)}{_SPACE}%"


def rise(percent: float | None, error: float | None = None) -> str:
    """``+0.62 ± 0.37 %`` of a rise in percent and its standard error."""
    if percent is None:
        return NOTHING
    known = error is not None and math.isfinite(error)
    uncertainty = f"{_SPACE}±{_SPACE}{plain(error)}" if known else ""
    return f"{percent:+.2f}{uncertainty}{_SPACE}%".replace("-", "−")


def times(ratio: float | None) -> str:
    """``1.88×``."""
    return NOTHING if ratio is None else f"{plain(ratio)}×"


def tokens(count: int) -> str:
    """``8 192``, grouped, in one piece."""
    return f"{count:,}".replace(",", "\u202f")


def span(values: Iterable[float]) -> str:
    """``1.04× to 7.01×``."""
    ordered = sorted(values)
    ends = dict.fromkeys((times(ordered[0]), times(ordered[-1])))
    return " to ".join(ends)


def tick(value: float) -> str:
    """A number at an axis."""
    return f"{value:g}".replace("-", "−")
