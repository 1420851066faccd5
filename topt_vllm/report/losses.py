"""Loss against V rows read: the table's own budgets, and ours beside rival rules on texts of an evaluation."""

from collections.abc import Sequence

from topt_vllm.report import numbers
from topt_vllm.report.inputs import Inputs
from topt_vllm.report.loss_plot import LINEAR, Point, Series, draw, symbol
from topt_vllm.report.parts import Columns, Figure, Key, Section, Table
from topt_vllm.report.records import Evaluated
from topt_vllm.report.svg import picture
from topt_vllm.table.schema import ThresholdTable
from topt_vllm.table.words import budget_in_words


def losses(inputs: Inputs) -> Section:
    """A panel for the table, and one for each text and context."""
    records, rules = inputs.texts, _rules(inputs.texts)
    panels = list(dict.fromkeys((record.text, record.context) for record in records))
    groups = {panel: [r for r in records if (r.text, r.context) == panel] for panel in panels}
    said = {panel: _sentences(group) for panel, group in groups.items()}
    figures = [
        Figure(draw(_series(group, rules), " ".join(said[panel])), _title(panel), " ".join(said[panel]))
        for panel, group in groups.items()
    ]
    return Section(
        key="losses",
        title="Loss against V rows read",
        intro="Filled: each rule tuned to read as many V rows. Hollow: the table's budgets as they stand. Bars are "
        f"one standard error. Both axes are logarithmic, that of losses only above {LINEAR:g}\u00a0%.",
        finding=" ".join(f"{_title(panel)}: {_middle(sentences)}" for panel, sentences in said.items())
        or None,
        legend=_legend(rules),
        figures=[*_own(inputs.table), *figures],
        tables=[Table.of("Every measurement in numbers", records, _COLUMNS, folded=True)] if records else [],
        missing=None
        if records
        else "Not compared with other rules yet. With --evaluation E.json, written by:",
        command=None if records else inputs.evaluate_command("--rows 0.05 0.1 0.2"),
    )


def _title(panel: tuple[str, int]) -> str:
    return f"{panel[0]}, {numbers.tokens(panel[1])} tokens"


def _rules(records: Sequence[Evaluated]) -> dict[str, int]:
    """Style by rule: ours first, so that they look the same in every report."""
    names = sorted(
        {record.title for record in records}, key=lambda name: (not name.startswith("toptheta"), name)
    )
    return {name: style for style, name in enumerate(["toptheta", *(n for n in names if n != "toptheta")])}


def _legend(rules: dict[str, int]) -> list[Key]:
    if len(rules) == 1:
        return []
    symbols = {name: symbol(8, 8, style, "dot") for name, style in rules.items()}
    return [Key(picture(16, "", [drawn], width=16), name) for name, drawn in symbols.items()]


def _own(table: ThresholdTable) -> list[Figure]:
    """The budgets as the calibrator measured them, if it did: those with a k, then those with a name."""
    points = [
        Point(100 * budget.quality.v_rows_read, budget.quality.loss_pct, 0.0, budget_in_words(budget.key))
        for budget in sorted(table.budgets, key=lambda budget: budget.k is None)
        if budget.quality is not None
    ]
    if not points:
        return []
    said = "; ".join(f"{p.label} {numbers.rise(p.loss)} at {numbers.share(p.rows / 100)}" for p in points)
    drawn = draw([Series(0, points, joined=False)], f"Plot of the table's budgets. {said}.")
    caption = "Measured by the calibrator, without standard errors."
    return [Figure(drawn, "The table's budgets, held-back text", caption)]


def _series(records: Sequence[Evaluated], rules: dict[str, int]) -> list[Series]:
    found = []
    for rule, style in rules.items():
        here = [record for record in records if record.title == rule]
        tuned = [_point(record, "") for record in here if record.rows_target is not None]
        budgets = [
            _point(record, record.aim if rule == "toptheta" else "")
            for record in here
            if record.rows_target is None
        ]
        found += [Series(style, tuned, True)] if tuned else []
        # The table's budgets have dense layers of their own, so they lie on no line.
        found += [Series(style, budgets, False)] if budgets else []
    # Ours lie on top.
    return found[::-1]


def _point(record: Evaluated, name: str) -> Point:
    return Point(100 * record.v_rows_read, record.loss_pct, record.error or 0.0, name)


def _sentences(records: Sequence[Evaluated]) -> list[str]:
    """Ours against the best other rule at each target; the budgets where there is nothing to compare."""
    targets = sorted({record.rows_target for record in records if record.rows_target is not None})
    found = [_sentence([record for record in records if record.rows_target == target]) for target in targets]
    return found or [
        f"{r.title} with {r.aim} reads {numbers.share(r.v_rows_read)} of V rows and loses "
        f"{numbers.rise(r.loss_pct, r.error)}."
        for r in records
    ]


def _sentence(records: Sequence[Evaluated]) -> str:
    """What happens at one target."""
    ours = next((record for record in records if record.rule == "toptheta"), None)
    rival = min((record for record in records if not record.ours), key=lambda r: r.loss_pct, default=None)
    parts = [f"{ours.title} loses {_cost(ours)}"] if ours is not None else []
    if rival is not None:
        parts.append(f"the best other rule, {rival.rule}, {_cost(rival)}")
    said = ", and ".join(parts) or "only variants of ours were measured"
    return f"Tuned to {records[0].aim}, {said}."


def _cost(record: Evaluated) -> str:
    """The loss, and the rows that were read: tuning may miss its target on another text."""
    return f"{numbers.rise(record.loss_pct, record.error)} at {numbers.share(record.v_rows_read)}"


def _middle(sentences: Sequence[str]) -> str:
    """One of them stands for all at the head of the page."""
    return sentences[len(sentences) // 2]


_COLUMNS: Columns = (
    ("Text, context", lambda r: f"{r.text}, {numbers.tokens(r.context)}"),
    ("Rule", lambda r: r.title),
    ("At", lambda r: r.aim),
    ("V rows read", lambda r: numbers.share(r.v_rows_read)),
    ("Candidates", lambda r: numbers.share(r.candidates)),
    ("K and V read", lambda r: numbers.share(r.kv_bytes_read)),
    ("Loss ± standard error", lambda r: numbers.rise(r.loss_pct, r.error)),
    ("KL, nats", lambda r: numbers.plain(r.kl, 4)),
    ("Same next token", lambda r: numbers.share(r.agreement)),
)
