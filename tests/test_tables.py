"""Tables of results: one value, and the same numbers in a terminal, in Markdown, in LaTeX and on a page."""

from __future__ import annotations

import re

from hypothesis import given
from hypothesis import strategies as st
from rich.console import Console

from logo.cli.output import rich_table
from logo.evaluation.intervals import Interval
from logo.evaluation.report.page import environment
from logo.evaluation.tables import (
    Cell,
    Column,
    Table,
    latex,
    latex_text,
    markdown,
    number,
    numbers,
    row,
    words,
)

TEXT = st.text(max_size=20) | st.sampled_from(
    ["\\end{tabular} % $x_1^2$ ~#&", "a|b", "</td><script>", "*x* [y](z) `c`"]
)
SHARE = st.floats(0, 1)


def printed(table: Table, *, intervals: bool = True) -> list[str]:
    console = Console(width=400, color_system=None)
    with console.capture() as capture:
        console.print(rich_table(table, intervals=intervals))
    return [line.rstrip() for line in capture.get().splitlines()]


def html(table: Table) -> str:
    found: str = environment().from_string('{% from "table.html" import table %}{{ table(t) }}').render(t=table)
    return found


@given(st.lists(st.tuples(SHARE, SHARE, SHARE), min_size=1, max_size=5))
def test_every_display_shows_the_same_numbers(values: list[tuple[float, float, float]]) -> None:
    rows = [row(f"run{n}", number(a, interval=Interval(b, c))) for n, (a, b, c) in enumerate(values)]
    below = Table((*words("run"), *numbers("score")), tuple(rows))
    beside = Table((*words("run"), Column("score", interval="95 %")), tuple(rows))
    expected = [[f"{100 * value:.2f}" for value in three] for three in values]
    for text in (markdown(below), latex(below, "tab:x"), html(below), "\n".join(printed(below))):
        found = re.findall(r"\d+\.\d\d", text)
        assert found == [one for three in expected for one in three]
    assert [re.findall(r"\d+\.\d\d", line) for line in printed(beside)[1:]] == expected
    without = [re.findall(r"\d+\.\d\d", line) for line in printed(below, intervals=False)[1:]]
    assert without == [three[:1] for three in expected]


# The csv module does not quote a carriage return that stands alone, and UTF-8 has no half of a surrogate pair.


def test_headings_sections_marks_and_what_is_not_known() -> None:
    columns = (*words("run"), Column("BLEU", above="Translation"), Column("chrF", above="Translation"))
    rows = (
        row("a", number(0.5, emphasis="bold"), None, section="first"),
        row("b", number(0.25, emphasis="dotted", notes=["only 3 rows"]), number(-0.00001, "+.1f"), section="second"),
        row(Cell("b", repeats=True), Cell("", None), 7, section="second"),
    )
    table = Table(columns, rows, "A title", "A note")
    assert table.above == [(columns[0], 1), (columns[1], 2)]
    assert [(section, len(rows)) for section, rows in table.sections] == [("first", 1), ("second", 2)]
    lines = printed(table)
    assert (
        lines[0].split() == ["run", "BLEU", "chrF"] and lines[2] == "first" and lines[3].split() == ["a", "50.00", "-"]
    )
    assert lines[6].split() == ["b", "25.00", "+0.0"] and lines[7].split() == ["7"]  # a name that repeats is blank
    assert lines[-1] == "A note"
    text = markdown(table)
    assert "| a | **50.00** | – |" in text and "| b | *25.00* only 3 rows | +0.0 |" in text and "| b |  | 7 |" in text
    assert "| run | Translation BLEU | Translation chrF |" in text
    paper = latex(table, "tab:x")
    assert r"a & \textbf{50.00} & -- \\" in paper and r"\underline{25.00} {\scriptsize only 3 rows}" in paper
    assert r"\caption{A title. A note}" in paper and r"\begin{tabular}{lrr}" in paper
    page = html(table)
    assert '<th scope="colgroup" class="num" colspan="2">Translation</th>' in page
    assert (
        page.count('scope="rowgroup"') == 2 and '<td class="none">–</td>' in page and "<strong>50.00</strong>" in page
    )


@given(TEXT, TEXT)
def test_text_of_others_breaks_no_table(text: str, other: str) -> None:
    table = Table(words("name", other), (row(text, other), row(other, None)), note=text)
    lines = [line for line in markdown(table).split("\n") if line.startswith("|")]
    assert len(lines) == 4 and all(len(re.findall(r"(?<!\\)\|", line)) == 3 for line in lines)
    rows = re.findall(r"^    (.*) \\\\$", latex(table, "x"), flags=re.MULTILINE)
    assert len(rows) == 3 and all(line.replace(r"\&", "").count("&") == 1 for line in rows)
    assert len(re.findall("<td", html(table))) == 2 and "<script" not in html(table)


@given(TEXT)
def test_latex_is_escaped(text: str) -> None:
    shown = latex_text(text)
    assert not re.search(r"[\x00-\x1f\u2028\u2029]", shown)
    bare = re.sub(r"\\(text[a-z]+\{\}|[{}$&#%_])|\$-\$", "", shown)
    assert not re.search(r"[\\{}$&#%_^~]", bare)
