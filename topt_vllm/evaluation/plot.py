"""Loss against V rows read: a line for each rule, a hollow mark for each budget, a panel by text and context."""

from pathlib import Path
from typing import Any

from topt_vllm.evaluation.options import EvaluationError
from topt_vllm.output import in_one_step


def check_plot(path: Path) -> None:
    """Call it before the long work.

    Raises:
        EvaluationError: matplotlib isn't installed, or doesn't know the format.
    """
    try:
        from matplotlib.backend_bases import FigureCanvasBase
    except ImportError as error:
        raise EvaluationError("--plot needs matplotlib: pip install 'topt-vllm[plot]'") from error
    if path.suffix.removeprefix(".").lower() not in FigureCanvasBase.get_supported_filetypes():
        raise EvaluationError(f"--plot {path}: no format of pictures; take .png, .svg or .pdf")


def plot(records: list[dict[str, Any]], path: Path) -> None:
    """Writes the plot; the format is that of the file's suffix.

    Args:
        records: Of an evaluation.
        path: A file that doesn't exist.
    """
    from matplotlib.figure import Figure

    texts = list(dict.fromkeys((record["text"], record["context"]) for record in records))
    figure = Figure(figsize=(5.2 * len(texts), 4.2), layout="constrained")
    rules = list(dict.fromkeys(record["rule"] for record in records))
    panels = figure.subplots(1, len(texts), squeeze=False)[0]
    for panel, text in zip(panels, texts, strict=True):
        here = [record for record in records if (record["text"], record["context"]) == text]
        for style, rule in enumerate(rules):
            look: dict[str, Any] = {"marker": "osD^vP"[style % 6], "color": f"C{style}"}
            tuned = [
                record for record in here if record["rule"] == rule and record["rows_target"] is not None
            ]
            budgets = [record for record in here if record["rule"] == rule and record["rows_target"] is None]
            panel.plot(*_points(tuned), label=rule, **look)
            # The table's budgets have dense layers of their own, so they lie on no line.
            panel.plot(*_points(budgets), linestyle="none", fillstyle="none", **look)
        # Losses span orders of magnitude, and a rule may also beat dense attention by a hair.
        panel.set_yscale("symlog", linthresh=0.1)
        panel.set_xscale("log")
        panel.axhline(0, color="grey", linewidth=0.8)
        panel.grid(True, which="both", alpha=0.25)
        panel.set_title(f"{text[0]}, {text[1]} tokens")
        panel.set_xlabel("V rows read, all layers (%)")
        panel.xaxis.set_major_formatter("{x:g}")
        panel.xaxis.set_minor_formatter("{x:g}")
        panel.yaxis.set_major_formatter("{x:g}")
    panels[0].set_ylabel("perplexity over dense (%)")
    handles, labels = panels[0].get_legend_handles_labels()
    figure.legend(handles, labels, loc="outside lower center", ncols=len(labels), fontsize=8)
    with in_one_step(path) as temporary:
        figure.savefig(temporary, dpi=130)


def _points(records: list[dict[str, Any]]) -> tuple[list[float], list[float]]:
    found = sorted((100 * record["v_rows_read"], record["loss_pct"]) for record in records)
    return [share for share, _ in found], [loss for _, loss in found]
