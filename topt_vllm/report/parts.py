"""What a section of the page consists of. Texts are plain: the template escapes them."""

from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from typing import Any

from markupsafe import Markup

# Each one's name, and its cell in the row of a record.
Columns = Sequence[tuple[str, Callable[[Any], str]]]


class Mark(str):
    """A cell of a table with a meaning that is also shown by its colour.

    Attributes:
        kind: Class in ``style.css``.
    """

    kind: str

    def __new__(cls, text: str, kind: str) -> "Mark":
        found = super().__new__(cls, text)
        found.kind = kind
        return found


@dataclass(frozen=True)
class Table:
    """Numbers in rows; the first cell of a row names it.

    Attributes:
        caption: Above the table.
        head: Names of the columns.
        rows: Cells.
        folded: Whether it is shown only when it is opened.
    """

    caption: str
    head: Sequence[str]
    rows: Sequence[Sequence[str]]
    folded: bool = False

    @classmethod
    def of(cls, caption: str, records: Iterable[Any], columns: Columns, folded: bool = False) -> "Table":
        """One row for each record."""
        rows = [[cell(record) for _, cell in columns] for record in records]
        return cls(caption, [name for name, _ in columns], rows, folded)


@dataclass(frozen=True)
class Figure:
    """A drawing.

    Attributes:
        svg: The drawing, whose label states the finding.
        title: Above it.
        caption: Below it.
    """

    svg: Markup
    title: str
    caption: str = ""


@dataclass(frozen=True)
class Key:
    """An entry of a legend: a symbol and what it stands for."""

    svg: Markup
    text: str


@dataclass(frozen=True)
class Section:
    """One part of the page.

    Attributes:
        key: Anchor.
        title: Heading.
        intro: What is shown, and how it was measured.
        finding: The outcome in one sentence, also shown at the head of the page; None without input.
        legend: Of all figures.
        figures: Drawings side by side.
        more: Further drawings, folded.
        tables: Below the drawings.
        missing: Without input: how to get it.
        command: The same as a command line.
    """

    key: str
    title: str
    intro: str
    finding: str | None = None
    legend: Sequence[Key] = ()
    figures: Sequence[Figure] = ()
    more: Sequence[Figure] = ()
    tables: Sequence[Table] = ()
    missing: str | None = None
    command: str | None = None
