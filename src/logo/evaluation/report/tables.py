"""The tables of the page. Headers are headers, a column is a run or a measure, and marks are told in words as well."""

from __future__ import annotations

import re
from collections.abc import Iterable, Mapping, Sequence

from logo.evaluation.paired import ALPHA, TestName
from logo.evaluation.report.adapters import Similarity, Weights
from logo.evaluation.report.analysis import Analysis
from logo.evaluation.report.markup import Html, element, join
from logo.evaluation.report.numbers import NAMES, Cell, Line
from logo.evaluation.report.scene import Dot, Scene, series
from logo.evaluation.report.svg import svg_mark
from logo.evaluation.runs import Run

TEST_NAMES: Mapping[TestName, str] = {"mcnemar": "McNemar", "randomisation": "randomised"}  # in a column
MOST = 5  # adapters per dataset, and pairs, that are told in words below a heat map
HALF = 500.0  # a picture that is no wider may stand beside another
_NOTHING = Html('<td class="none">–</td>')


def table(caption: str, head: Iterable[Html], rows: Iterable[Html], *, kind: str = "") -> Html:
    """A table in a box of its own that scrolls sideways where it is too wide, by keyboard as well.

    Args:
        head: cells of the header, or its rows.
        rows: rows of the body; of `kind` "bodies" whole bodies.
    """
    cells = list(head)
    heads = cells if cells and cells[0].startswith("<tr") else [element("tr", *cells)]
    return element(
        "div",
        element(
            "table",
            element("caption", element("span", caption)),
            element("thead", *heads),
            join(*rows) if kind == "bodies" else element("tbody", *rows),
            class_=kind or None,
        ),
        class_="scroll",
        role="region",
        tabindex=0,
        aria_label=caption,
    )


def column(text: object, *, numeric: bool = False) -> Html:
    """A column's header."""
    return element("th", text, scope="col", class_="num" if numeric else None)


def row(name: object, *cells: object, title: str | None = None) -> Html:
    """A row with its header; cells that are not `<td>` elements yet become some."""
    told = (c if isinstance(c, Html) and c.startswith("<td") else element("td", c) for c in cells)
    return element("tr", element("th", name, scope="row", title=title), *told)


def run_name(analysis: Analysis, number: int) -> Html:
    """A run's label beside its point in the pictures."""
    role, shape = series(number)
    point = element(
        "svg", svg_mark(Dot(6, 6, 4, role, shape)), width=12, height=12, viewBox="0 0 12 12", aria_hidden="true"
    )
    return element("span", point, " ", element("bdi", analysis.labels[number]), class_="run")


def runs_table(analysis: Analysis) -> Html:
    """What was run."""
    heads = ["run", "base model", "method", "k", "seed", "adapters", "datasets", "answers", "failed", "device", "date"]
    numeric = {"k", "seed", "adapters", "datasets", "answers", "failed"}
    rows = []
    for number, run in enumerate(analysis.runs):
        first = next(iter(run.results.values()))
        failed = sum(len(result.errors) for result in run.results.values())
        cells = [
            run.k,
            run.seed,
            len(first.run.get("pool") or first.columns) or None,
            len(run.results),
            f"{sum(map(len, run.results.values())):,}".replace(",", " "),
            failed,
        ]
        rows.append(
            row(
                run_name(analysis, number),
                *(_text(text) for text in (run.base, run.method)),
                *(_plain(cell) for cell in cells),
                _text(first.run.get("device")),
                _text(_minute(first.run.get("date"))),
                title=run.folder.resolve().name,
            )
        )
    return table("Runs", (column(name, numeric=name in numeric) for name in heads), rows, kind="told")


def groups_table(analysis: Analysis) -> Html:
    """Runs by groups, with the mean over all datasets where there are several groups."""
    lines = list(analysis.groups)
    if len({line.group for line in lines}) > 1:
        lines.append(analysis.overall)
    groups = [line.group for line in lines]
    above = [element("th", "run", scope="col", rowspan=2)]
    for group in dict.fromkeys(groups):
        span = groups.count(group)
        above.append(element("th", group or "All", scope="colgroup", colspan=span if span > 1 else None, class_="num"))
    below = [column(NAMES.get(line.metric, "mean"), numeric=True) for line in lines]
    heads = [element("tr", *above), element("tr", *below)]
    rows = [
        row(run_name(analysis, number), *(_cell(line, line.cells[number]) for line in lines))
        for number in range(len(analysis.runs))
    ]
    return table("Mean of the datasets' means, in percent, with 95 % intervals", heads, rows, kind="stacked")


def datasets_table(analysis: Analysis, lines: Sequence[Line], caption: str) -> Html:
    """Datasets and measures by runs, a body per group."""
    heads = [
        column("dataset"),
        column("measure"),
        *(column(run_name(analysis, n), numeric=True) for n in _all(analysis)),
    ]
    bodies = []
    for group in dict.fromkeys(line.group for line in lines):
        title = element("th", group, scope="rowgroup", colspan=len(heads))
        rows = [element("tr", title, class_="group")]
        previous = None
        for line in lines:
            if line.group == group:
                name = str(line.dataset)
                told = element("span", name, class_="unseen") if name == previous else _dataset(name)
                cells = [_cell(line, cell) for cell in line.cells]
                rows.append(row(told, NAMES.get(line.metric, line.metric), *cells))
                previous = name
        bodies.append(element("tbody", *rows))
    return table(caption, heads, bodies, kind="bodies")


def versus_table(analysis: Analysis) -> Html:
    """Pairs of runs."""
    several = len(analysis.versus) > 1
    heads = ["run", "against", "difference", "p", *(["p Holm"] if several else []), "test"]
    heads += ["better", "worse", "same", "datasets won", "lost", "even"]
    rows = []
    for pair in analysis.versus:
        found = pair.difference
        value = element("strong" if pair.p_holm < ALPHA else "span", signed(100 * found.value))
        ends = found.interval and " to ".join(signed(100 * end) for end in found.interval)
        interval = element("small", ends, class_="ci") if ends else None
        counts = [
            getattr(record, name) for record in (pair.instances, pair.datasets) for name in ("wins", "losses", "ties")
        ]
        rows.append(
            row(
                run_name(analysis, pair.b),
                run_name(analysis, pair.a),
                element("td", value, " ", interval, class_="num"),
                *(_plain(p_value(p)) for p in (pair.significance.p, *([pair.p_holm] if several else []))),
                element("td", TEST_NAMES[pair.significance.test]),
                *(_plain(count) for count in counts),
            )
        )
    caption = "Paired difference in points over shared instances, with 95 % intervals; then instances, then datasets"
    words = {"run", "against", "test"}
    return table(caption, (column(name, numeric=name not in words) for name in heads), rows)


def selected_table(analysis: Analysis) -> Html | None:
    """How selections looked, and how often they found the right adapter where it is known."""
    if not any(analysis.selected):
        return None
    known = any(found is not None and found.known for found in analysis.selected)
    heads = ["run", "weight of the first", "effective number"]
    heads += ["right adapter first", "among three", "mean reciprocal rank", "of instances"] if known else []
    rows = []
    for number, found in enumerate(analysis.selected):
        cells: list[object] = [None] * (len(heads) - 1)
        if found is not None:
            cells = [f"{found.heaviest:.2f}", f"{found.effective:.1f}"]
            told = [
                f"{100 * found.first:.1f} %",
                f"{100 * found.in_three:.1f} %",
                f"{found.reciprocal:.2f}",
                found.known,
            ]
            cells += (told if found.known else [None] * 4) if known else []
        rows.append(row(run_name(analysis, number), *(_plain(cell) for cell in cells)))
    return table("Selections", (column(name, numeric=n > 0) for n, name in enumerate(heads)), rows)


def weights_table(found: Weights) -> Html:
    """Each dataset's heaviest adapters, in words."""
    rows = []
    for name, values in zip(found.datasets, found.values, strict=True):
        order = sorted(range(len(values)), key=lambda n: (-float(values[n]), found.adapters[n]))[:MOST]
        told = [f"{found.adapters[n]} {values[n]:.2f}" for n in order if values[n] > 0]
        rows.append(row(name, join(*_separated(told))))
    return table(f"The {MOST} heaviest adapters of each dataset", [column("dataset"), column("mean weight")], rows)


def similarity_table(found: Similarity) -> Html:
    """The most alike pairs, in words."""
    count = len(found.adapters)
    pairs = [(float(found.values[a, b]), a, b) for a in range(count) for b in range(a + 1, count)]
    pairs.sort(key=lambda pair: (-pair[0], pair[1], pair[2]))
    rows = [row(found.adapters[a], found.adapters[b], _plain(f"{value:.2f}")) for value, a, b in pairs[: 2 * MOST]]
    heads = [column("adapter"), column("and"), column("correlation", numeric=True)]
    return table("The most alike adapters", heads, rows)


def time_table(analysis: Analysis) -> Html:
    """Seconds by run and stage."""
    stages = list(dict.fromkeys(name for spent in analysis.seconds for name in spent.stages))
    rows = []
    for number, spent in enumerate(analysis.seconds):
        each = 1000 * sum(spent.stages.values()) / spent.instances
        shown = [spent.loading, *(spent.stages.get(stage, 0.0) for stage in stages), spent.total]
        rows.append(row(run_name(analysis, number), *(_plain(f"{s:.1f}") for s in shown), _plain(f"{each:.0f}")))
    heads = ["run", "loading", *stages, "together", "ms per answer"]
    return table("Seconds by stage", (column(name, numeric=n > 0) for n, name in enumerate(heads)), rows)


def options_table(analysis: Analysis) -> Html | None:
    """Options in which runs differ; None where they do not."""
    if not analysis.differing:
        return None
    heads = [column("option"), *(column(run_name(analysis, n)) for n in _all(analysis))]
    rows = [row(element("code", name), *values) for name, values in analysis.differing.items()]
    return table("Other options that differ", heads, rows)


def versions_table(run: Run) -> Html | None:
    """What the first dataset of a run stood on."""
    versions = next(iter(run.results.values())).run.get("versions")
    if not isinstance(versions, dict):
        return None
    rows = [row(name, _text(version)) for name, version in versions.items()]
    return table("Versions", [column("of"), column("version")], rows)


def figure(scene: Scene, drawing: Html, *more: object) -> Html:
    """A picture with its title and what it shows in words."""
    caption = element("figcaption", element("b", scene.title), element("span", scene.text))
    box = element("div", drawing, class_="scroll picture", role="region", tabindex=0, aria_label=scene.title)
    half = "half" if scene.width <= HALF else None
    return element("figure", caption, box, *more, id=f"figure-{scene.name}", class_=half)


def p_value(p: float) -> str:
    """With three digits after the point."""
    return "< 0.001" if p < 0.001 else f"{p:.3f}"


def signed(value: float) -> str:
    """One digit after the point, always with a sign, unless nothing is left of it."""
    text = f"{round(value, 1) + 0.0:+.1f}".replace("-", "−")
    return "0.0" if text == "+0.0" else text


def _all(analysis: Analysis) -> range:
    return range(len(analysis.runs))


def _cell(line: Line, cell: Cell | None) -> Html:
    if cell is None:
        return _NOTHING
    value = line.scale * cell.value
    rest: list[object] = []
    if cell.interval is not None:
        ends = "–".join(f"{line.scale * end:.1f}" for end in cell.interval)
        rest += [" ", element("small", ends, class_="ci")]
    if cell.mark == "tied":
        rest.append(element("span", " (not shown to be worse than any other)", class_="unseen"))
    if cell.published is not None:
        told = f"{line.scale * cell.published.value:.2f}"
        rest += [" ", element("small", f"published {told}", class_="published", title=cell.published.source)]
    if not cell.complete:
        what = f"{cell.datasets} datasets, {cell.rows} rows" if line.dataset is None else f"{cell.rows} rows"
        rest += [" ", element("small", f"only {what}", class_="part")]
    shown = (
        element("strong", f"{value:.1f}") if cell.mark == "best" else element("span", f"{value:.1f}", class_="value")
    )
    return element(
        "td", shown, *rest, class_=" ".join(filter(None, ["num", cell.mark, "" if cell.complete else "part"]))
    )


def _dataset(name: str) -> Html:
    """A link to a dataset's instances, whose name may be broken where its parts meet."""
    parts = re.split(r"(?<=\.)", name)
    told = join(*(join(element("wbr") if number else None, part) for number, part in enumerate(parts)))
    return element("a", told, href="#instances", data_dataset=name)


def _plain(value: object) -> Html:
    return _NOTHING if value is None else element("td", value, class_="num")


def _text(value: object) -> Html:
    return _NOTHING if value is None else element("td", value)


def _minute(date: object) -> str | None:
    """`2026-01-02 03:04` of a date in UTC as `run.json` has it."""
    return None if date is None else str(date).replace("T", " ")[:16]


def _separated(texts: Sequence[str]) -> Iterable[object]:
    for number, text in enumerate(texts):
        yield " · " if number else None
        yield element("bdi", text)
