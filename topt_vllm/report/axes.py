"""A frame with axes and grid lines for the plots of a page."""

from collections.abc import Sequence
from dataclasses import dataclass

from markupsafe import Markup

from topt_vllm.report.numbers import tick
from topt_vllm.report.svg import WIDTH, Scale, tag, text

LEFT, RIGHT, TOP, BOTTOM = 34.0, WIDTH - 12.0, 22.0, 36.0


@dataclass(frozen=True)
class Axes:
    """Two scales and what they are called.

    Attributes:
        x: From left to right.
        y: From the bottom up.
        x_name: Below the axis.
        y_name: Above the axis: readable without turning the head.
        x_marks: Numbers at the x axis; None for those that the scale finds round.
    """

    x: Scale
    y: Scale
    x_name: str
    y_name: str
    x_marks: Sequence[float] | None = None

    @property
    def height(self) -> float:
        """Of the whole drawing."""
        return self.y.start + BOTTOM

    def frame(self) -> list[Markup]:
        """Grid lines, numbers and names; a line at zero is stronger."""
        parts = []
        for value in self.x.ticks(30) if self.x_marks is None else self.x_marks:
            at = self.x(value)
            parts.append(tag("line", x1=at, x2=at, y1=self.y.end, y2=self.y.start, class_="grid"))
            parts.append(text(at, self.y.start + 14, tick(value), "middle"))
        for value in self.y.ticks(20):
            at = self.y(value)
            strong = "zero" if value == 0 else "grid"
            parts.append(tag("line", x1=self.x.start, x2=self.x.end, y1=at, y2=at, class_=strong))
            parts.append(text(self.x.start - 5, at + 4, tick(value), "end"))
        parts.append(text(self.x.end, self.height - 4, self.x_name, "end", "name"))
        parts.append(text(2, 12, self.y_name, class_="name"))
        return parts
