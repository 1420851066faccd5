"""V rows read, layer by layer."""

import math
from functools import partial

from topt_vllm.report import numbers
from topt_vllm.report.axes import LEFT, RIGHT, TOP, Axes
from topt_vllm.report.inputs import Inputs
from topt_vllm.report.parts import Figure, Section
from topt_vllm.report.svg import Scale, path, picture, tag
from topt_vllm.table.schema import Budget
from topt_vllm.table.words import budget_in_words

# Percent; a layer that reads less is drawn here.
_FLOOR = 0.1


def rows_by_layer(inputs: Inputs) -> Section:
    """The default budget's curve, and the others' folded."""
    section = partial(
        Section,
        key="layers",
        title="V rows read by layer",
        intro="Measured on the held-back text. The axis is logarithmic, the dashed line is all layers' share. "
        "Layers with a sliding window read all of it; so it says of layers without attention, which have no V.",
    )
    curves = {budget.key: budget for budget in inputs.table.budgets if _shares(budget)}
    if not curves:
        return section(
            missing="This table doesn't say which layers read how much. Calibrate again:",
            command="topt-vllm calibrate --model MODEL_FOLDER --dataset TEXT.txt",
        )
    least = min(min(_shares(budget)) for budget in curves.values())
    low = 10 ** math.floor(math.log10(min(10.0, max(_FLOOR, least))))
    default = curves.pop(inputs.table.budget(None).key, None) or curves.popitem()[1]
    more = [_figure(budget, low) for budget in curves.values()]
    return section(finding=_finding(default), figures=[_figure(default, low)], more=more)


def _shares(budget: Budget) -> list[float]:
    """Percent of each layer's V rows."""
    return [100 * share for share in budget.quality.layer_rows_read] if budget.quality is not None else []


def _finding(budget: Budget) -> str:
    """About layers with thresholds: those with a sliding window read all of it."""
    shares = dict(enumerate(_shares(budget)))
    known = {entry.layer: shares[entry.layer] for entry in budget.layers if entry.layer in shares}
    if not known:
        return f"Budget {budget_in_words(budget.key)}: no layer has thresholds."
    most = max(known, key=known.__getitem__)
    middle = sorted(known.values())[(len(known) - 1) // 2]
    return (
        f"With budget {budget_in_words(budget.key)}, half of the layers that have thresholds read "
        f"{numbers.share(middle / 100)} of their V rows or less; layer {most} reads the most, "
        f"{numbers.share(known[most] / 100)}."
    )


def _figure(budget: Budget, low: float) -> Figure:
    """The curve, on an axis from ``low`` percent, the same for all budgets."""
    shares = _shares(budget)
    axes = Axes(
        Scale(0, max(1, len(shares) - 1), LEFT + 4, RIGHT),
        Scale(low, 100, TOP + 150, TOP, math.log10),
        "layer",
        "V rows read, %",
        range(0, len(shares), max(1, -(-len(shares) // 10))),
    )
    mean = axes.y(100 * budget.quality.v_rows_read if budget.quality is not None else 100)
    points = [(axes.x(layer), axes.y(share)) for layer, share in enumerate(shares)]
    parts = [
        *axes.frame(),
        tag("line", x1=LEFT, x2=RIGHT, y1=mean, y2=mean, class_="mean"),
        tag("path", d=path(points), class_="line s0"),
        *(tag("circle", cx=x, cy=y, r=min(2.5, 90 / len(points)), class_="dot s0") for x, y in points),
    ]
    return Figure(
        picture(axes.height, f"Curve. {_finding(budget)}", parts), f"Budget {budget_in_words(budget.key)}"
    )
