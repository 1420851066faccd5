"""Answers about long prompts: ours beside dense attention, by task and length."""

from collections.abc import Sequence
from functools import partial
from statistics import fmean

from topt_vllm.report import numbers
from topt_vllm.report.inputs import Inputs
from topt_vllm.report.parts import Columns, Section, Table
from topt_vllm.report.records import Evaluated

_INTRO = (
    "Questions about long prompts, after RULER; question and answer are decoded under the rule. Exact: greedy "
    "decoding gives the answer. Lead: how much likelier the right answer is than the likeliest wrong one, in nats. "
    "A task is judged by exact answers where dense attention gives enough of them, else by leads."
)


def tasks(inputs: Inputs) -> Section:
    """A line for every task, length and rule."""
    records, section = inputs.tasks, partial(Section, "tasks", "Tasks in long prompts", _INTRO)
    if not records:
        command = inputs.evaluate_command("--tasks multikey")
        return section(missing="Not measured yet. With --evaluation E.json, written by:", command=command)
    return section(finding=_finding(records), tables=[Table.of("Every task and rule", records, _COLUMNS)])


def _finding(records: Sequence[Evaluated]) -> str:
    """About the last rule, which is the table's last budget where there are several."""
    last = records[-1]
    mine = [record for record in records if (record.title, record.aim) == (last.title, last.aim)]
    able = [record for record in mine if record.judged_by == "exact"]
    known = f"{last.title} with {last.aim}: {len(able)} of {len(mine)} cases are judged by exact answers"
    if not able:
        return f"{known}."
    ours, dense = (fmean(getattr(record, name) or 0 for record in able) for name in ("exact", "exact_dense"))
    return f"{known}, {numbers.share(ours, 0)} there, dense attention {numbers.share(dense, 0)}."


_COLUMNS: Columns = (
    ("Task", lambda record: record.task),
    ("Tokens", lambda record: numbers.tokens(record.context)),
    ("Rule", lambda record: record.title),
    ("At", lambda record: record.aim),
    ("V rows read", lambda record: numbers.share(record.v_rows_read)),
    ("Exact", lambda record: numbers.share(record.exact, 0)),
    ("Dense", lambda record: numbers.share(record.exact_dense, 0)),
    ("Lead", lambda record: numbers.plain(record.margin)),
    ("Dense", lambda record: numbers.plain(record.margin_dense)),
    ("Judged by", lambda record: {"margin": "lead"}.get(record.judged_by, record.judged_by)),
)
