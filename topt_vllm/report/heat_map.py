"""θ by layer and query head, as one colour per cell."""

from collections import defaultdict
from collections.abc import Iterable
from dataclasses import dataclass
from itertools import chain

from markupsafe import Markup

from topt_vllm.report import numbers
from topt_vllm.report.inputs import Inputs
from topt_vllm.report.parts import Figure, Section, Table
from topt_vllm.report.svg import WIDTH, picture, tag, text
from topt_vllm.table.schema import Budget, ThresholdTable
from topt_vllm.table.words import budget_in_words

# From low to high θ. Lightness rises evenly, so that the map also reads in grey.
COLOURS = (
    "#30123b",
    "#3d2f7f",
    "#3f4c9f",
    "#3a6aab",
    "#3a87ab",
    "#43a3a4",
    "#5dbd94",
    "#8ad37c",
    "#bfe36a",
    "#f1ee7b",
)
_LEFT, _TOP = 34, 22


def thresholds(inputs: Inputs) -> Section:
    """The default budget's map, and the others' folded."""
    table = inputs.table
    default = table.budget(None)
    limits = _limits(table)
    maps = {budget.key: _figure(table, budget, limits) for budget in table.budgets}
    length = numbers.tokens(table.lengths[-1])
    return Section(
        key="thresholds",
        title="θ by layer and query head",
        intro=f"A key's V row is read when its score reaches θ. Shown at {length} tokens, the longest calibrated "
        "length, in scaled logits. Columns are layers, rows are query heads; small gaps part the heads of one KV "
        "head from the next. Grey layers are dense: they have no threshold.",
        finding=_finding(default),
        figures=[maps.pop(default.key)],
        more=list(maps.values()),
        tables=[_by_layer(default)],
    )


def _sparse(budget: Budget) -> dict[int, list[float]]:
    """θ of every head at the longest length, by layer."""
    return {
        entry.layer: [head[-1] for head in entry.theta]
        for entry in budget.layers
        if entry.layer not in budget.dense_layers
    }


def _limits(table: ThresholdTable) -> tuple[float, float]:
    """Ends of the colours: the outermost fiftieth at each end would leave few colours to the rest."""
    heads = chain.from_iterable(_sparse(budget).values() for budget in table.budgets)
    known = sorted(chain.from_iterable(heads)) or [0.0]
    cut = len(known) // 50
    return known[cut], known[-1 - cut]


def _spread(thetas: Iterable[float]) -> tuple[float, float, float]:
    """The lowest, the middle one and the highest."""
    ordered = sorted(thetas)
    return ordered[0], ordered[len(ordered) // 2], ordered[-1]


def _finding(budget: Budget) -> str:
    name, known = budget_in_words(budget.key), list(chain.from_iterable(_sparse(budget).values()))
    if not known:
        return f"All layers of budget {name} are dense."
    low, middle, high = map(numbers.plain, _spread(known))
    return f"θ of budget {name} is {low} to {high}; half of the heads have less than {middle}."


@dataclass(frozen=True)
class _Grid:
    """Where cells lie: a column per layer, a row per query head, gaps between the heads of KV heads."""

    layers: list[int]
    heads: int
    kv_heads: int

    @property
    def wide(self) -> float:
        return (WIDTH - _LEFT - 6) / max(1, len(self.layers))

    @property
    def high(self) -> float:
        # Few heads get bars, many share the height of a screen.
        return min(18.0, max(150.0, min(3.0 * self.heads, 600.0)) / self.heads)

    def x(self, column: float) -> float:
        return _LEFT + column * self.wide

    def y(self, head: int) -> float:
        group = max(1, self.heads // self.kv_heads)
        return _TOP + head * self.high + head // group * min(1.5, 60 / self.kv_heads)

    @property
    def bottom(self) -> float:
        return self.y(self.heads - 1) + self.high


def _figure(table: ThresholdTable, budget: Budget, limits: tuple[float, float]) -> Figure:
    layers = [entry.layer for entry in budget.layers]
    grid = _Grid(layers, table.model.num_query_heads, table.model.num_kv_heads)
    body = [*_cells(grid, _sparse(budget), limits), *_names(grid), *_colour_bar(limits, grid.bottom + 40)]
    label = f"Heat map. {_finding(budget)}"
    return Figure(picture(grid.bottom + 68, label, body), f"Budget {budget_in_words(budget.key)}")


def _cells(grid: _Grid, sparse: dict[int, list[float]], limits: tuple[float, float]) -> list[Markup]:
    """One path per colour: a large model has thousands of cells."""
    by_colour: defaultdict[str | None, list[str]] = defaultdict(list)
    for column, layer in enumerate(grid.layers):
        for head in range(grid.heads):
            colour = _colour(sparse[layer][head], limits) if layer in sparse else None
            by_colour[colour].append(
                f"M{grid.x(column):.2f} {grid.y(head):.2f}h{grid.wide:.2f}v{grid.high:.2f}h-{grid.wide:.2f}z"
            )
    return [
        tag("path", d="".join(parts), fill=colour, class_="dense" if colour is None else None)
        for colour, parts in by_colour.items()
    ]


def _colour(theta: float, limits: tuple[float, float]) -> str:
    low, high = limits
    place = (theta - low) / (high - low) if high > low else 0.0
    return COLOURS[min(len(COLOURS) - 1, max(0, int(place * len(COLOURS))))]


def _names(grid: _Grid) -> list[Markup]:
    parts = [
        text(2, 12, "query head", class_="name"),
        text(WIDTH - 6, grid.bottom + 28, "layer", "end", "name"),
    ]
    for column in range(0, len(grid.layers), max(1, -(-len(grid.layers) // 10))):
        parts.append(text(grid.x(column + 0.5), grid.bottom + 14, str(grid.layers[column]), "middle"))
    for head in range(0, grid.heads, max(1, round(14 / grid.high))):
        parts.append(text(_LEFT - 5, grid.y(head) + grid.high / 2 + 4, str(head), "end"))
    return parts


def _colour_bar(limits: tuple[float, float], top: float) -> list[Markup]:
    low, high = (numbers.plain(limit, 1) for limit in limits)
    left, wide = 90, 16
    parts = [
        tag("rect", x=left + index * wide, y=top, width=wide, height=10, fill=colour)
        for index, colour in enumerate(COLOURS)
    ]
    right = left + wide * len(COLOURS)
    return [*parts, text(left - 5, top + 10, f"θ ≤ {low}", "end"), text(right + 5, top + 10, f"≥ {high}")]


def _by_layer(budget: Budget) -> Table:
    rows = [(str(layer), *map(numbers.plain, _spread(heads))) for layer, heads in _sparse(budget).items()]
    caption = f"Budget {budget_in_words(budget.key)} in numbers: θ over query heads"
    return Table(caption, ("Layer", "Lowest", "Median", "Highest"), rows, folded=True)
