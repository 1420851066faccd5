"""Inline SVG: elements whose attributes and texts are escaped, scales, axes, markers.

Drawn by hand and not by matplotlib, whose SVG has its own colours and fonts and turns texts into outlines. Here the
page's style sheet gives the colours, so that dark mode reaches the drawings, and a text stays a text.
"""

import math
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass

from markupsafe import Markup

# Width of every drawing (user units), about a phone's screen: there one unit is one pixel.
WIDTH = 340
_OPEN, _CLOSED = Markup("<{}{}>{}</{}>"), Markup("<{}{}/>")


def tag(name: str, content: str | Markup = "", **attributes: object) -> Markup:
    """An element; ``class_`` is the attribute class, ``text_anchor`` is text-anchor."""
    listed = Markup("").join(
        Markup(' {}="{}"').format(key.rstrip("_").replace("_", "-"), _value(value))
        for key, value in attributes.items()
        if value is not None
    )
    if not content:
        return _CLOSED.format(name, listed)
    return _OPEN.format(name, listed, content, name)


def _value(value: object) -> str:
    return f"{round(value, 1):g}" if isinstance(value, float) else str(value)


def picture(height: float, label: str, body: Iterable[Markup], width: float = WIDTH) -> Markup:
    """A drawing that is as wide as its place; the label says in words and numbers what it shows.

    Without a label it is a symbol beside its own text, which is not read aloud.
    """
    size, drawn = f"0 0 {width:g} {round(height, 1):g}", Markup("").join(body)
    if not label:
        return tag("svg", drawn, viewBox=size, aria_hidden="true")
    return tag("svg", drawn, viewBox=size, role="img", aria_label=label)


def text(x: float, y: float, content: str, anchor: str | None = None, class_: str | None = None) -> Markup:
    """A line of text; ``anchor`` is middle or end, or None for its start."""
    return tag("text", content, x=float(x), y=float(y), text_anchor=anchor, class_=class_)


@dataclass(frozen=True)
class Scale:
    """Maps values to user units.

    Attributes:
        low: Value at ``start``.
        high: Value at ``end``.
        start: User units.
        end: User units.
        bend: Monotonic function in whose values the scale is even.
    """

    low: float
    high: float
    start: float
    end: float
    bend: Callable[[float], float] = float

    def __call__(self, value: float) -> float:
        low, high = self.bend(self.low), self.bend(self.high)
        place = (self.bend(min(max(value, self.low), self.high)) - low) / (high - low)
        return self.start + place * (self.end - self.start)

    def ticks(self, apart: float) -> list[float]:
        """Values 1, 2, 5 times powers of ten, their negatives and zero, at least ``apart`` user units from another.

        Where all don't fit, zero and powers of ten come first.
        """
        chosen: list[float] = []
        for value in _round_values(self.low, self.high):
            if self.low <= value <= self.high and all(
                abs(self(value) - self(other)) >= apart for other in chosen
            ):
                chosen.append(value)
        return sorted(chosen)


def _round_values(low: float, high: float) -> list[float]:
    top = max(abs(low), abs(high))
    powers = range(math.floor(math.log10(top)) - 3, math.floor(math.log10(top)) + 1) if top else range(0)
    found = [0.0]
    for digit in (1, 2, 5):
        for power in reversed(powers):
            value = float(f"{digit}e{power}")
            found += [value, -value]
    return found


# Half of a marker's width.
_MARKER = 4.0
MARKERS = ("circle", "square", "diamond", "up", "down", "cross")


def marker(x: float, y: float, shape: int, class_: str) -> Markup:
    """One of the shapes of :data:`MARKERS`, told apart without colour."""
    name = MARKERS[shape % len(MARKERS)]
    if name == "circle":
        return tag("circle", cx=x, cy=y, r=_MARKER, class_=class_)
    return tag("path", d=path(_outline(name, x, y), closed=name != "cross"), class_=class_)


def _outline(name: str, x: float, y: float) -> Sequence[tuple[float, float]]:
    s, t = _MARKER, 1.25 * _MARKER
    corners = {
        "square": [(-s, -s), (s, -s), (s, s), (-s, s)],
        "diamond": [(0, -t), (t, 0), (0, t), (-t, 0)],
        "up": [(0, -t), (t, s), (-t, s)],
        "down": [(0, t), (t, -s), (-t, -s)],
        "cross": [(-s, -s), (s, s), (0, 0), (-s, s), (s, -s)],
    }[name]
    return [(x + dx, y + dy) for dx, dy in corners]


def path(points: Iterable[tuple[float, float]], closed: bool = False) -> str:
    """Straight lines through points, as the attribute d."""
    return "M" + "L".join(f"{x:.1f} {y:.1f}" for x, y in points) + ("Z" if closed else "")
