"""A picture of a threshold table: θ, rows read, and what they cost."""

from pathlib import Path
from typing import TYPE_CHECKING, Any

from topt_vllm.calibration.options import CalibrationError
from topt_vllm.output import in_one_step
from topt_vllm.table.schema import Budget, ThresholdTable

if TYPE_CHECKING:
    from matplotlib.axes import Axes


def plot(table: ThresholdTable, path: Path) -> None:
    """Draws the default budget's θ by layer and head, every budget's rows by layer, and loss against rows.

    Args:
        table: The table.
        path: Picture to write; its suffix chooses the format, PNG where it has none.

    Raises:
        CalibrationError: matplotlib is missing, or doesn't know the format.
        OSError: The file exists, or can't be written.
    """
    try:
        from matplotlib.figure import Figure
    except ImportError as error:
        raise CalibrationError("--plot needs matplotlib: pip install 'topt-vllm[plot]'") from error
    figure = Figure(figsize=(15, 4.5), layout="constrained")
    heat, rows, loss = figure.subplots(1, 3)
    _draw_thresholds(figure, heat, table, table.budget(None))
    _draw_rows(rows, table)
    _draw_losses(loss, table)
    figure.suptitle(f"{table.model.id}: {table.calibration.max_seq_length} tokens, {table.calibration.date}")
    try:
        with in_one_step(path) as temporary:
            # By name: matplotlib would add a suffix to a file without one, and write beside it.
            figure.savefig(temporary, dpi=110, format=path.suffix.removeprefix(".") or "png")
    except ValueError as error:
        raise CalibrationError(f"--plot {path}: {error}") from error


def _draw_thresholds(figure: Any, axes: "Axes", table: ThresholdTable, budget: Budget) -> None:
    theta = [[head[-1] for head in entry.theta] for entry in budget.layers]
    for row, entry in enumerate(budget.layers):
        if entry.layer in budget.dense_layers:
            theta[row] = [float("nan")] * len(theta[row])
    image = axes.imshow(theta, aspect="auto", interpolation="nearest")
    figure.colorbar(image, ax=axes, label="θ (scaled logits)")
    step = max(1, len(budget.layers) // 15)
    axes.set_yticks(range(0, len(budget.layers), step), [str(entry.layer) for entry in budget.layers[::step]])
    axes.set(
        title=f"θ at {table.lengths[-1]} tokens, budget {budget.key} (dense layers blank)",
        xlabel="query head",
        ylabel="layer",
    )


def _draw_rows(axes: "Axes", table: ThresholdTable) -> None:
    for budget in table.budgets:
        if budget.quality is not None:
            shares = [100 * share for share in budget.quality.layer_rows_read]
            axes.plot(range(len(shares)), shares, marker=".", label=str(budget.key))
    axes.set(title="V rows read by layer", xlabel="layer", ylabel="% of the layer's V rows", ylim=(0, 103))
    if axes.lines:
        axes.legend(title="budget")
    else:
        axes.text(0.5, 0.5, "not measured", transform=axes.transAxes, ha="center")


def _draw_losses(axes: "Axes", table: ThresholdTable) -> None:
    """One point per budget; those with a k are joined, for they differ in nothing else."""
    constant: list[tuple[float, float]] = []
    for budget in table.budgets:
        if budget.quality is None:
            continue
        point = 100 * budget.quality.v_rows_read, budget.quality.loss_pct
        axes.scatter(
            *point, marker="o" if budget.k is not None else "*", s=50 if budget.k is not None else 130
        )
        axes.annotate(str(budget.key), point, xytext=(6, 5), textcoords="offset points")
        if budget.k is not None:
            constant.append(point)
    axes.plot([rows for rows, _ in constant], [loss for _, loss in constant], linewidth=0.8, zorder=0)
    axes.axhline(0, color="grey", linewidth=0.6)
    axes.set(
        title="Loss against rows, held-back text",
        xlabel="% of V rows read, all layers",
        ylabel="Δ perplexity, %",
    )
