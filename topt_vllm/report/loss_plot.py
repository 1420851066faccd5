"""One panel: loss against V rows read."""

import math
from collections.abc import Sequence
from dataclasses import dataclass

from markupsafe import Markup

from topt_vllm.report.axes import LEFT, RIGHT, TOP, Axes
from topt_vllm.report.labels import Box, place
from topt_vllm.report.svg import Scale, marker, path, picture, tag

_HEIGHT = 210.0
# Losses below this many percent are drawn to scale, larger ones by their logarithm: rules differ by orders of
# magnitude, and one may also beat dense attention by a hair.
LINEAR = 0.3
_END = 1e12
_COLOURS = 6  # of the style sheet


@dataclass(frozen=True)
class Point:
    """One measurement, in percent.

    Attributes:
        rows: V rows read.
        loss: Rise of perplexity.
        error: Standard error; 0 where it isn't known.
        label: Beside the point; empty for none.
    """

    rows: float
    loss: float
    error: float = 0.0
    label: str = ""


@dataclass(frozen=True)
class Series:
    """Points that belong together.

    Attributes:
        style: Number of colour and marker.
        points: In any order.
        joined: Whether a line joins them: they differ in the target alone.
    """

    style: int
    points: Sequence[Point]
    joined: bool


def draw(series: Sequence[Series], label: str) -> Markup:
    """The panel; ``label`` states the finding."""
    points = [point for entry in series for point in entry.points]
    axes = _axes(points)
    parts = axes.frame()
    for entry in series:
        parts += _drawn(axes, entry)
    named = [(axes.x(p.rows), axes.y(p.loss), p.label) for p in points if p.label]
    others = [(axes.x(p.rows), axes.y(p.loss)) for p in points if not p.label]
    parts += place(named, others, Box(LEFT, TOP, RIGHT + 8, axes.y.start))
    return picture(axes.height, label, parts)


def _axes(points: Sequence[Point]) -> Axes:
    rows = [min(100.0, max(0.01, point.rows)) for point in points]
    # A stranger's table may say anything finite; what lies beyond the axes is drawn at their ends.
    low = max(-_END, min(0.0, *(point.loss - point.error for point in points)))
    high = min(_END, max(LINEAR, *(point.loss + point.error for point in points)))
    return Axes(
        Scale(min(rows) / 1.25, max(max(rows) * 1.25, 4 * min(rows)), LEFT, RIGHT, math.log10),
        Scale(1.15 * low - 0.02, 1.15 * high, TOP + _HEIGHT, TOP, lambda loss: math.asinh(loss / LINEAR)),
        "V rows read, % of all layers",
        "perplexity over dense, %",
    )


def _drawn(axes: Axes, series: Series) -> list[Markup]:
    colour = _colour(series.style)
    ordered = sorted(series.points, key=lambda point: point.rows)
    places = [(axes.x(point.rows), axes.y(point.loss)) for point in ordered]
    parts = (
        [tag("path", d=path(places), class_=f"line {colour}")] if series.joined and len(places) > 1 else []
    )
    for point, (x, y) in zip(ordered, places, strict=True):
        if point.error:
            top, bottom = axes.y(point.loss + point.error), axes.y(point.loss - point.error)
            parts.append(tag("line", x1=x, x2=x, y1=top, y2=bottom, class_=f"error {colour}"))
        filled = "dot" if series.joined else "hollow"
        parts.append(symbol(x, y, series.style, filled))
    return parts


def symbol(x: float, y: float, style: int, kind: str) -> Markup:
    """The marker of a style. Colours come again from the seventh on, with other shapes."""
    return marker(x, y, style + style // _COLOURS, f"{kind} {_colour(style)}")


def _colour(style: int) -> str:
    return f"s{style % _COLOURS}"
