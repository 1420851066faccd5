"""θ by layer and query head, as one colour per cell."""

from collections import defaultdict

from markupsafe import Markup

from topt_vllm.report import numbers
from topt_vllm.report.inputs import Inputs
from topt_vllm.report.parts import Figure, Section, Table
from topt_vllm.report.svg import WIDTH, picture, tag, text
from topt_vllm.thresholds import Budget, ThresholdTable

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
_LEFT, _TOP, _GAP = 34, 22, 1.5


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
    known = sorted(
        theta for budget in table.budgets for heads in _sparse(budget).values() for theta in heads
    ) or [0.0]
    cut = len(known) // 50
    return known[cut], known[-1 - cut]


def _finding(budget: Budget) -> str:
    known = sorted(theta for heads in _sparse(budget).values() for theta in heads)
    if not known:
        return f"All layers of budget {numbers.budget(budget.key)} are dense."
    low, middle, high = map(numbers.plain, (known[0], known[len(known) // 2], known[-1]))
    name = numbers.budget(budget.key)
    return f"θ of budget {name} is {low} to {high}; half of the heads have less than {middle}."


def _figure(table: ThresholdTable, budget: Budget, limits: tuple[float, float]) -> Figure:
    layers = [entry.layer for entry in budget.layers]
    heads, group = (
        table.model.num_query_heads,
        max(1, table.model.num_query_heads // table.model.num_kv_heads),
    )
    wide = (WIDTH - _LEFT - 6) / max(1, len(layers))
    high = min(18.0, max(3.0, 150 / heads))
    bottom = _TOP + heads * high + (heads - 1) // group * _GAP
    by_colour: defaultdict[str, list[str]] = defaultdict(list)
    sparse = _sparse(budget)
    for column, layer in enumerate(layers):
        for head in range(heads):
            x, y = _LEFT + column * wide, _TOP + head * high + head // group * _GAP
            colour = _colour(sparse[layer][head], limits) if layer in sparse else "dense"
            by_colour[colour].append(f"M{x:.2f} {y:.1f}h{wide:.2f}v{high:.1f}h-{wide:.2f}z")
    # One path per colour: a large model has thousands of cells.
    cells = [
        tag("path", d="".join(parts), class_="dense")
        if colour == "dense"
        else tag("path", d="".join(parts), fill=colour)
        for colour, parts in by_colour.items()
    ]
    names = _names(layers, heads, group, wide, high, bottom)
    body = [*cells, *names, *_colour_bar(limits, bottom + 40)]
    return Figure(
        picture(bottom + 68, f"Heat map. {_finding(budget)}", body), f"Budget {numbers.budget(budget.key)}"
    )


def _colour(theta: float, limits: tuple[float, float]) -> str:
    low, high = limits
    place = (theta - low) / (high - low) if high > low else 0.0
    return COLOURS[min(len(COLOURS) - 1, max(0, int(place * len(COLOURS))))]


def _names(
    layers: list[int], heads: int, group: int, wide: float, high: float, bottom: float
) -> list[Markup]:
    parts = [text(2, 12, "query head", class_="name"), text(WIDTH - 6, bottom + 28, "layer", "end", "name")]
    every = max(1, -(-len(layers) // 10))
    for column in range(0, len(layers), every):
        parts.append(text(_LEFT + (column + 0.5) * wide, bottom + 14, str(layers[column]), "middle"))
    every = max(1, round(14 / high))
    for head in range(0, heads, every):
        middle = _TOP + (head + 0.5) * high + head // group * _GAP
        parts.append(text(_LEFT - 5, middle + 4, str(head), "end"))
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
    rows = []
    for layer, heads in _sparse(budget).items():
        ordered = sorted(heads)
        middle = ordered[len(ordered) // 2]
        rows.append((str(layer), *(numbers.plain(value) for value in (ordered[0], middle, ordered[-1]))))
    return Table(
        caption=f"Budget {numbers.budget(budget.key)} in numbers: θ over query heads",
        head=("Layer", "Lowest", "Median", "Highest"),
        rows=rows,
        folded=True,
    )
