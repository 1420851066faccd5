"""Places labels beside points so that they cover neither each other nor points."""

from collections.abc import Sequence
from dataclasses import dataclass

from markupsafe import Markup

from topt_vllm.report.svg import text

# Of the font in `style.css`: about the width of a character, and the height of a line (user units).
_CHARACTER, _LINE = 7.0, 12.0


@dataclass(frozen=True)
class Box:
    """A rectangle: left, top, right, bottom."""

    left: float
    top: float
    right: float
    bottom: float

    def overlap(self, other: "Box") -> float:
        """Area in common."""
        wide = min(self.right, other.right) - max(self.left, other.left)
        high = min(self.bottom, other.bottom) - max(self.top, other.top)
        return max(0.0, wide) * max(0.0, high)


def place(
    points: Sequence[tuple[float, float, str]], taken: Sequence[tuple[float, float]], frame: Box
) -> list[Markup]:
    """A text beside each point, where it covers least.

    Args:
        points: x, y and the label.
        taken: Further points not to cover.
        frame: What labels may not leave.
    """
    boxes = [_around(x, y) for x, y, _ in points] + [_around(x, y) for x, y in taken]
    parts = []
    for x, y, label in points:
        width = _CHARACTER * len(label)
        best = min(_offers(x, y, width), key=lambda box: sum(map(box.overlap, boxes)) + _outside(box, frame))
        boxes.append(best)
        parts.append(text(best.left, best.bottom - 2.5, label, class_="label"))
    return parts


def _around(x: float, y: float) -> Box:
    return Box(x - 5, y - 5, x + 5, y + 5)


def _offers(x: float, y: float, width: float) -> list[Box]:
    """Right, left, above and below, then further away."""
    found = []
    for near in (7.0, 15.0, 26.0):
        for left, middle in (
            (x + near, y),
            (x - near - width, y),
            (x - width / 2, y - near - _LINE / 2),
            (x - width / 2, y + near + _LINE / 2),
            (x + near / 2, y - near - _LINE / 2),
            (x + near / 2, y + near + _LINE / 2),
            (x - near / 2 - width, y - near - _LINE / 2),
            (x - near / 2 - width, y + near + _LINE / 2),
        ):
            found.append(Box(left, middle - _LINE / 2, left + width, middle + _LINE / 2))
    return found


def _outside(box: Box, frame: Box) -> float:
    area = (box.right - box.left) * (box.bottom - box.top)
    return 10 * (area - box.overlap(frame))
