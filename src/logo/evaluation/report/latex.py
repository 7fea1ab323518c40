"""The tables of a report for a paper: booktabs, runs as rows over groups, and datasets over runs."""

from __future__ import annotations

import re
from collections.abc import Sequence

from logo.evaluation.paired import ALPHA, TESTS
from logo.evaluation.report.analysis import Analysis
from logo.evaluation.report.numbers import NAMES, Cell, Line
from logo.evaluation.report.published import CAVEAT

_SPECIAL = {
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
}
_MARKS = {"": "{}", "best": "\\textbf{{{}}}", "tied": "\\underline{{{}}}"}
_CONTROL = re.compile(r"[\x00-\x1f\x7f-\x9f\ud800-\udfff\u2028\u2029]+")


def latex(analysis: Analysis) -> str:
    """Two `table` environments; the best are marked, 95 % intervals beside the numbers in small print."""
    return "\n".join(
        [
            "% needs \\usepackage{booktabs}; T1 or Unicode fonts for names that are not plain ASCII",
            *_groups(analysis),
            "",
            *_datasets(analysis),
            "",
        ]
    )


def escaped(text: str) -> str:
    """Text as LaTeX shows it, on one line."""
    return "".join(_SPECIAL.get(character, character) for character in _CONTROL.sub(" ", text))


def _groups(analysis: Analysis) -> list[str]:
    lines = list(analysis.groups)
    if len({line.group for line in lines}) > 1:
        lines.append(analysis.overall)
    heads = [escaped(line.group or "all") for line in lines]
    metrics = [escaped(NAMES.get(line.metric, "")) for line in lines]
    rows = [
        " & ".join([escaped(label), *(_cell(line, line.cells[number]) for line in lines)])
        for number, label in enumerate(analysis.labels)
    ]
    caption = (
        f"Means of the datasets' means in percent, with 95\\,\\% intervals (squared and added). {_marks(analysis)}"
    )
    return _table(caption, "tab:logo-groups", ["run", *heads], ["", *metrics], rows)


def _datasets(analysis: Analysis) -> list[str]:
    rows = [
        " & ".join(
            [escaped(str(line.dataset)), escaped(NAMES.get(line.metric, line.metric))]
            + [_cell(line, cell) for cell in line.cells]
        )
        for line in analysis.lines
    ]
    heads = ["dataset", "measure", *map(escaped, analysis.labels)]
    kinds = "Wilson's where answers are right or wrong, else bootstrap percentiles"
    caption = f"Official measures in percent, with 95\\,\\% intervals ({kinds}). {_marks(analysis)}{_sources(analysis)}"
    caption += f" {escaped(analysis.left_out)}" if analysis.left_out else ""
    return _table(caption, "tab:logo-datasets", heads, None, rows, words=2)


def _marks(analysis: Analysis) -> str:
    """What bold and underlined numbers mean; nothing where there is one run."""
    if len(analysis.runs) < 2:
        return ""
    return (
        "Bold: significantly better than every other run of the line; underlined: where no run is, the highest and all "
        f"that are not significantly worse ($p < {ALPHA}$ by {TESTS['mcnemar']} where the answers to one dataset are "
        f"right or wrong, else by {TESTS['randomisation']}, with Holm's correction)."
    )


def _sources(analysis: Analysis) -> str:
    """Where published numbers were read."""
    cells = [cell for line in analysis.lines for cell in line.cells if cell is not None]
    sources = dict.fromkeys(cell.published.source for cell in cells if cell.published is not None)
    return f" {CAVEAT} From: {escaped('; '.join(sources))}." if sources else ""


def _table(
    caption: str, name: str, heads: Sequence[str], below: Sequence[str] | None, rows: Sequence[str], words: int = 1
) -> list[str]:
    """`words`: how many columns, from the left, hold words."""
    return [
        "\\begin{table}",
        "  \\centering",
        f"  \\caption{{{caption}}}",
        f"  \\label{{{name}}}",
        f"  \\begin{{tabular}}{{{'l' * words}{'r' * (len(heads) - words)}}}",
        "    \\toprule",
        *(f"    {' & '.join(cells)} \\\\" for cells in (heads, below) if cells is not None),
        "    \\midrule",
        *(f"    {row} \\\\" for row in rows),
        "    \\bottomrule",
        "  \\end{tabular}",
        "\\end{table}",
    ]


def _cell(line: Line, cell: Cell | None) -> str:
    if cell is None:
        return "--"
    value = f"{line.scale * cell.value:.1f}"
    shown = _MARKS[cell.mark].format(value)
    if cell.interval is not None:
        shown += f" {{\\scriptsize [{', '.join(f'{line.scale * end:.1f}' for end in cell.interval)}]}}"
    if cell.published is not None:
        shown += f" {{\\scriptsize published {line.scale * cell.published.value:.2f}}}"
    return shown
