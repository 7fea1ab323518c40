"""Tables as values: every display of results makes them, for terminals, pages, papers and machines.

A table holds numbers as they are shown. `logo.cli.output.rich_table` prints it, the report's templates make HTML of it,
and this module makes Markdown, LaTeX and records. A number's interval follows it in small print, or has a column of its
own if the column names one.
"""

from __future__ import annotations

import re
from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Literal

if TYPE_CHECKING:
    from logo.evaluation.intervals import Interval  # imports numpy

Emphasis = Literal["", "bold", "dotted", "faint"]

_LATEX = {
    "\\": r"\textbackslash{}",
    "{": r"\{",
    "}": r"\}",
    "$": r"\$",
    "&": r"\&",
    "#": r"\#",
    "%": r"\%",
    "_": r"\_",
    "^": r"\textasciicircum{}",
    "~": r"\textasciitilde{}",
    "<": r"\textless{}",
    ">": r"\textgreater{}",
    "|": r"\textbar{}",
    '"': r"\textquotedbl{}",
    "·": r"\textperiodcentered{}",
    "−": "$-$",
}
_COMMANDS: dict[str, str] = {"bold": "\\textbf", "dotted": "\\underline"}
_CONTROL = re.compile(r"[\x00-\x1f\x7f-\x9f\ud800-\udfff\u2028\u2029]+")
_MARKDOWN = re.compile(r"([\\`*_{}\[\]<>|#~$&])")


@dataclass(frozen=True)
class Cell:
    """One field.

    Attributes:
        text: the shown text; '' leaves the field empty.
        ends: the ends of the number's 95 % interval, as they are shown.
        emphasis: bold, dotted (underlined in LaTeX), or faint.
        notes: small print after the number.
        repeats: the row above has the same text, so it is shown only to machines and screen readers.
        dataset: this names a dataset, and a page links to its instances.
        title: tooltip on a page.
    """

    text: str
    ends: tuple[str, str] | None = None
    emphasis: Emphasis = ""
    notes: tuple[str, ...] = ()
    repeats: bool = False
    dataset: bool = False
    title: str = ""

    @property
    def interval(self) -> str:
        """`71.3–78.0`; `-1.0 to +2.0` where the ends have signs; '' without an interval."""
        if self.ends is None:
            return ""
        return (" to " if any(end.startswith(("+", "-", "−")) for end in self.ends) else "–").join(self.ends)


@dataclass(frozen=True)
class Column:
    """One column: its heading, and one `above` that neighbours may share.

    Attributes:
        numeric: aligned to the right.
        interval: heading of a separate column for the intervals, if there is room for one.
        wraps: long texts are wrapped.
    """

    name: str
    above: str = ""
    numeric: bool = True
    interval: str = ""
    wraps: bool = False


@dataclass(frozen=True)
class Row:
    """One row; rows of the same `section` are listed below its name."""

    cells: tuple[Cell | None, ...]
    section: str = ""


@dataclass(frozen=True)
class Table:
    """Columns, rows with as many cells (None: unknown), the `title` above and the `note` below."""

    columns: tuple[Column, ...]
    rows: tuple[Row, ...]
    title: str = ""
    note: str = ""

    @property
    def sections(self) -> list[tuple[str, list[Row]]]:
        """The rows by section, in their order."""
        found: dict[str, list[Row]] = {}
        for row in self.rows:
            found.setdefault(row.section, []).append(row)
        return list(found.items())

    @property
    def above(self) -> list[tuple[Column, int]]:
        """For neighbours that share an upper heading, the first column and their number; columns without one stand
        alone. Empty if no column has one."""
        found: list[tuple[Column, int]] = []
        for column in self.columns if any(column.above for column in self.columns) else ():
            if found and column.above and found[-1][0].above == column.above:
                found[-1] = (found[-1][0], found[-1][1] + 1)
            else:
                found.append((column, 1))
        return found


def words(*names: str) -> tuple[Column, ...]:
    """Columns of text."""
    return tuple(Column(name, numeric=False) for name in names)


def numbers(*names: str) -> tuple[Column, ...]:
    """Columns of numbers."""
    return tuple(Column(name) for name in names)


def row(*cells: object, section: str = "") -> Row:
    """A row of cells; other values become cells with their text, and None stays None, which means unknown."""
    return Row(tuple(cell if cell is None or isinstance(cell, Cell) else Cell(str(cell)) for cell in cells), section)


def number(
    value: float,
    form: str = ".2f",
    interval: Interval | Sequence[float] | None = None,
    *,
    scale: float = 100.0,
    emphasis: Emphasis = "",
    notes: Sequence[str] = (),
) -> Cell:
    """A number, multiplied by `scale`, with its interval, both in one format."""
    ends = None if interval is None else (_shown(scale * interval[0], form), _shown(scale * interval[1], form))
    return Cell(_shown(scale * value, form), ends, emphasis, tuple(notes))


def _shown(value: float, form: str) -> str:
    """A number in a format, without a minus sign if it is rounded to zero."""
    text = f"{value:{form}}"
    return f"{0.0:{form}}" if float(text) == 0 else text


def p_value(p: float) -> str:
    """A p-value with three digits after the point."""
    return "<0.001" if p < 0.001 else f"{p:.3f}"


def counted(count: int, what: str) -> str:
    """`1 run`, `2 runs`."""
    return f"{count} {what}{'' if count == 1 else 's'}"


def markdown(table: Table) -> str:
    """A table of GitHub's kind, with its title above and its note below."""

    def field(cell: Cell | None) -> str:
        if cell is None:
            return "–"
        text = _plain(cell.text)
        text = f"**{text}**" if cell.emphasis == "bold" else f"*{text}*" if cell.emphasis == "dotted" else text
        return " ".join(filter(None, [text, cell.interval and f"[{cell.interval}]", *map(_plain, cell.notes)]))

    heads = [_plain(f"{column.above} {column.name}".strip()) for column in table.columns]
    lines = [heads, ["---:" if column.numeric else "---" for column in table.columns]]
    lines += [[field(cell) for cell in row.cells] for row in table.rows]
    body = "\n".join(f"| {' | '.join(line)} |" for line in lines)
    return "\n\n".join(filter(None, [_plain(table.title), body, _plain(table.note)])) + "\n"


def latex(table: Table, label: str) -> str:
    """A `table` environment with booktabs' lines; the note is part of its caption.

    Args:
        label: the LaTeX label of the table.
    """
    heads = [[latex_text(column.name) for column in table.columns]]
    if table.above:
        heads.insert(0, [latex_text(column.above) for column in table.columns])
    kinds = "".join("r" if column.numeric else "l" for column in table.columns)
    caption = latex_text(". ".join(filter(None, [table.title, table.note])))
    lines = [
        "\\begin{table}",
        "  \\centering",
        f"  \\caption{{{caption}}}",
        f"  \\label{{{label}}}",
        f"  \\begin{{tabular}}{{{kinds}}}",
        "    \\toprule",
        *(f"    {' & '.join(head)} \\\\" for head in heads),
        "    \\midrule",
        *(f"    {' & '.join(map(_latex_cell, row.cells))} \\\\" for row in table.rows),
        "    \\bottomrule",
        "  \\end{tabular}",
        "\\end{table}",
    ]
    return "\n".join(lines) + "\n"


def latex_text(text: str) -> str:
    """Text as LaTeX shows it, on one line."""
    return "".join(_LATEX.get(character, character) for character in _CONTROL.sub(" ", text))


def _latex_cell(cell: Cell | None) -> str:
    if cell is None:
        return "--"
    text = latex_text(cell.text)
    if cell.emphasis in _COMMANDS:
        text = f"{_COMMANDS[cell.emphasis]}{{{text}}}"
    small = [f"[{', '.join(map(latex_text, cell.ends))}]"] if cell.ends else []
    return " ".join([text, *(f"{{\\scriptsize {one}}}" for one in [*small, *map(latex_text, cell.notes)])])


def _plain(text: str) -> str:
    return _MARKDOWN.sub(r"\\\1", " ".join(_CONTROL.sub(" ", text).split()))
