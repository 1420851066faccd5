"""Hidden facts by depth and length: ours beside dense attention. The grids are HTML tables, which all can read."""

from collections.abc import Callable, Sequence
from functools import partial
from statistics import fmean

from topt_vllm.report import numbers
from topt_vllm.report.inputs import Inputs
from topt_vllm.report.parts import Columns, Mark, Section, Table
from topt_vllm.report.records import Evaluated, NeedleCell

_INTRO = (
    "A fact is hidden in a prompt at a depth, 0 % is its start; question and answer are decoded under the rule. "
    "● the answer is what greedy decoding gives, ◐ it is likelier than every wrong one, ○ it is not. Beside it "
    "the lead over the likeliest wrong answer, in nats."
)


def needles(inputs: Inputs) -> Section:
    """Dense attention's grid, ours, and a line for every rule."""
    records, section = inputs.needles, partial(Section, "needles", "Facts hidden in long prompts", _INTRO)
    if not records:
        command = inputs.evaluate_command("--needles 1024 4096")
        return section(missing="Not measured yet. With --evaluation E.json, written by:", command=command)
    shown = _shown(records)
    dense = _grid("Dense attention", records[0].cells or [], dense=True)
    grids = [dense, *(_grid(f"{r.title}, {r.aim}", r.cells or [], dense=False) for r in shown)]
    rules = Table.of("Every rule", records, _COLUMNS, folded=True)
    return section(finding=_finding(shown[-1]), tables=[*grids, rules])


def _shown(records: Sequence[Evaluated]) -> list[Evaluated]:
    """The table's budgets as they stand; without any, ours at each target; else whatever there is."""
    budgets = [r for r in records if r.rule == "toptheta" and r.rows_target is None]
    return budgets or [r for r in records if r.rule == "toptheta"] or list(records)


def _finding(record: Evaluated) -> str:
    cells = record.cells or []
    count = len(cells)
    return (
        f"{record.title} with {record.aim} retrieves {sum(cell.retrieved for cell in cells)} of {count} facts, "
        f"dense attention {sum(cell.retrieved_dense for cell in cells)} of {count}."
    )


def _grid(caption: str, cells: Sequence[NeedleCell], dense: bool) -> Table:
    lengths = sorted({cell.length for cell in cells})
    by_place = {(cell.depth, cell.length): cell for cell in cells}
    rows = []
    for depth in sorted({cell.depth for cell in cells}):
        marks = [_mark(by_place.get((depth, length)), dense) for length in lengths]
        rows.append((numbers.share(depth, 0), *marks))
    return Table(caption, ("Depth", *(f"{numbers.tokens(length)} tokens" for length in lengths)), rows)


def _mark(cell: NeedleCell | None, dense: bool) -> str:
    if cell is None:
        return numbers.NOTHING
    exact, retrieved, margin = (
        (cell.exact_dense, cell.retrieved_dense, cell.margin_dense)
        if dense
        else (cell.exact, cell.retrieved, cell.margin)
    )
    kind, sign = ("hit", "●") if exact else ("near", "◐") if retrieved else ("miss", "○")
    return Mark(f"{sign}\u00a0{margin:+.1f}".replace("-", "−"), kind)


def _hits(kind: str) -> Callable[[Evaluated], str]:
    """The share of a record's cells in which this is so."""
    return lambda record: numbers.share(fmean(getattr(cell, kind) for cell in record.cells or ()), 0)


_COLUMNS: Columns = (
    ("Rule", lambda record: record.title),
    ("At", lambda record: record.aim),
    ("V rows read", lambda record: numbers.share(record.v_rows_read)),
    ("Retrieved", _hits("retrieved")),
    ("Dense", _hits("retrieved_dense")),
    ("Exact", _hits("exact")),
    ("Dense", _hits("exact_dense")),
)
