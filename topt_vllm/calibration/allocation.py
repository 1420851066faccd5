"""Spending V rows where they lower the loss most.

Each layer has a curve: what it loses and reads when it alone is sparse, for several numbers of keys k, and at its
end dense attention, which loses nothing and reads everything. Losses of layers are taken to add up, which a run
with all of them sparse then checks. Under that assumption the best allocation for any total is found greedily on
the lower convex hulls of the curves: start every layer at its cheapest point and always take the step that saves
most loss per row.
"""

from dataclasses import dataclass
from itertools import pairwise


@dataclass(frozen=True)
class Point:
    """One choice for a layer.

    Attributes:
        k: Keys per query head; None for dense attention.
        loss: Mean divergence from dense attention with only this layer sparse (nats).
        rows: Share of the layer's V rows read.
    """

    k: int | None
    loss: float
    rows: float


@dataclass(frozen=True)
class Allocation:
    """A choice for every layer.

    Attributes:
        ks: By layer; None for dense attention.
        loss: Sum over the layers (nats).
        rows: Mean share of V rows read, over these layers.
    """

    ks: dict[int, int | None]
    loss: float
    rows: float


def hull(points: list[Point]) -> list[Point]:
    """The points from which no mixture of others is better, by ascending rows and falling loss."""
    kept: list[Point] = []
    for point in sorted(points, key=lambda p: (p.rows, p.loss)):
        if kept and point.loss >= kept[-1].loss:
            continue
        while len(kept) > 1 and _slope(kept[-2], kept[-1]) <= _slope(kept[-2], point):
            kept.pop()
        kept.append(point)
    return kept


def allocations(curves: dict[int, list[Point]]) -> list[Allocation]:
    """All allocations of the greedy path, from the fewest rows to every layer dense or at its best.

    Args:
        curves: Points of each layer.
    """
    hulls = {layer: hull(points) for layer, points in curves.items()}
    current = {layer: points[0] for layer, points in hulls.items()}
    steps = [
        (_slope(before, after), layer, after)
        for layer, points in hulls.items()
        for before, after in pairwise(points)
    ]
    path = [_allocation(current)]
    # A hull's slopes fall, so the steps of one layer come in order.
    for _, layer, after in sorted(steps, key=lambda step: (-step[0], step[1], step[2].rows)):
        current[layer] = after
        path.append(_allocation(current))
    return path


def _slope(before: Point, after: Point) -> float:
    """Loss saved per row."""
    return (before.loss - after.loss) / (after.rows - before.rows)


def _allocation(points: dict[int, Point]) -> Allocation:
    return Allocation(
        ks={layer: point.k for layer, point in points.items()},
        loss=sum(point.loss for point in points.values()),
        rows=sum(point.rows for point in points.values()) / len(points),
    )
