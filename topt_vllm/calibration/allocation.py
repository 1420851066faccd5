"""Spending V rows where they lower the loss most.

Each query head has a curve: what it loses and how many V rows it causes to be read, for several numbers of keys.
Losses of heads are taken to add up, which a run with all of them sparse then checks. Under that assumption the best
allocation for any total is found greedily on the lower convex hulls of the curves: start every head at its
cheapest point and always take the step that saves most loss per row.
"""

from dataclasses import dataclass
from itertools import accumulate, pairwise

# Layer and query head.
Head = tuple[int, int]


@dataclass(frozen=True)
class Point:
    """One choice for a head.

    Attributes:
        k: Keys.
        loss: Mean divergence from dense attention that it causes (nats).
        rows: Share of the V rows of all sparse layers that it causes to be read.
    """

    k: int
    loss: float
    rows: float


@dataclass(frozen=True)
class Step:
    """One place on the greedy path.

    Attributes:
        loss: Predicted, all heads together (nats).
        rows: Predicted share of V rows read, sparse layers.
    """

    loss: float
    rows: float


@dataclass(frozen=True)
class Path:
    """All allocations from the fewest rows to every head at its most.

    Attributes:
        start: Keys by head at the first place.
        moves: The head and its new keys, from each place to the next.
        steps: Every place, one more than moves.
    """

    start: dict[Head, int]
    moves: list[tuple[Head, int]]
    steps: list[Step]

    def ks(self, place: int) -> dict[Head, int]:
        """Keys by head at a place."""
        return self.start | dict(self.moves[:place])


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


def greedy_path(curves: dict[Head, list[Point]]) -> Path:
    """The greedy path over all heads.

    Args:
        curves: Points of each head.
    """
    hulls = {head: hull(points) for head, points in curves.items()}
    moves = [(head, before, after) for head, points in hulls.items() for before, after in pairwise(points)]
    # A hull's slopes fall, so the moves of one head come in order.
    moves.sort(key=lambda move: (-_slope(move[1], move[2]), move[0], move[2].rows))
    cheapest = [points[0] for points in hulls.values()]
    first = Step(sum(point.loss for point in cheapest), sum(point.rows for point in cheapest))

    def after_move(step: Step, move: tuple[Head, Point, Point]) -> Step:
        _, before, after = move
        return Step(step.loss + after.loss - before.loss, step.rows + after.rows - before.rows)

    return Path(
        start={head: points[0].k for head, points in hulls.items()},
        moves=[(head, after.k) for head, _, after in moves],
        steps=list(accumulate(moves, after_move, initial=first)),
    )


def of_all_layers(steps: list[Step], fixed: float) -> list[Step]:
    """The steps with rows as shares of all layers' V rows.

    Args:
        steps: Of a path.
        fixed: Share of all V rows that layers read to which nothing is allocated.
    """
    return [Step(step.loss, fixed + (1 - fixed) * step.rows) for step in steps]


def _slope(before: Point, after: Point) -> float:
    """Loss saved per row."""
    return (before.loss - after.loss) / (after.rows - before.rows)
