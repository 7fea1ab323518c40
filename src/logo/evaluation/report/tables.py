"""The tables of a report as values, which the page, the Markdown and the LaTeX show alike."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace

from logo.evaluation.paired import ALPHA, COLUMN, TESTS, tests_in_words
from logo.evaluation.report.adapters import Weights
from logo.evaluation.report.analysis import Analysis
from logo.evaluation.report.numbers import NAMES, Line
from logo.evaluation.report.numbers import Cell as Number
from logo.evaluation.runs import Run
from logo.evaluation.tables import (
    Cell,
    Column,
    Emphasis,
    Row,
    Table,
    counted,
    latex,
    markdown,
    number,
    numbers,
    p_value,
    row,
    words,
)

MOST = 5  # adapters per dataset that are named
MARKS = (
    "Bold: the highest, and significantly better than every other run of that line. {weak}: where no run is, the "
    f"highest and all that are not significantly worse. Significant: p below {ALPHA} by {TESTS['mcnemar']} where the "
    f"answers to one dataset are right or wrong, else by {TESTS['randomisation']}; corrected by Holm’s method for all "
    "pairs of runs in all lines of this report together."
)
INTERVALS = (
    "Intervals are Wilson’s where answers are right or wrong, else bootstrap percentiles over instances, of ten "
    "instances or more. A mean’s interval comes from its datasets’, squared and added: it is about other instances of "
    "the same datasets."
)
ALL = "All: the mean over datasets of accuracy, BLEU or ROUGE-L, whichever a dataset has."
TIMES = (
    "Wall time, summed over datasets. Loading counts once for each process. Times compare only between runs on the "
    "same device with nothing else on it."
)
_EMPHASIS: dict[str, Emphasis] = {"": "", "best": "bold", "tied": "dotted"}


def as_latex(analysis: Analysis) -> str:
    """The tables by group and by dataset, for a paper."""
    head = "% needs \\usepackage{booktabs}; T1 or Unicode fonts for names that are not plain ASCII\n"
    by_group, by_dataset = groups(analysis, "Underlined"), datasets(analysis)
    by_dataset = replace(by_dataset, note=f"{_legend(analysis, 'Underlined')} {by_dataset.note}".strip())
    return head + latex(by_group, "tab:logo-groups") + "\n" + latex(by_dataset, "tab:logo-datasets")


def as_markdown(analysis: Analysis) -> str:
    """The tables of groups and datasets in Markdown."""
    return markdown(groups(analysis, "In italics")) + "\n" + markdown(datasets(analysis))


def groups(analysis: Analysis, weak: str = "Dotted") -> Table:
    """Runs by groups, with the mean over all datasets where there are several groups.

    Args:
        weak: how runs are marked if there is no single best one.
    """
    lines, several = list(analysis.groups), len({line.group for line in analysis.groups}) > 1
    lines += [analysis.overall] if several else []
    columns = [Column(NAMES.get(line.metric, "mean"), above=line.group or "All") for line in lines]
    rows = [row(name, *(_cell(line, line.cells[n]) for line in lines)) for n, name in enumerate(_names(analysis))]
    title = "Mean of the datasets' means, in percent, with 95 % intervals"
    note = _legend(analysis, weak) + (f" {ALL}" if several else "")
    return Table((*words("run"), *columns), tuple(rows), title, note)


def datasets(analysis: Analysis) -> Table:
    """Datasets and official measures by runs, a section per group."""
    return _by_dataset(
        analysis, analysis.lines, "Official measures, in percent, with 95 % intervals", analysis.left_out
    )


def extra(analysis: Analysis) -> Table | None:
    """Measures beside the official ones, with sacrebleu's signatures; None where no run has any."""
    results = [result for run in analysis.runs for result in run.results.values()]
    signatures = sorted({f"{name}: {text}" for result in results for name, text in result.signatures.items()})
    title = "Further measures, with 95 % intervals"
    return _by_dataset(analysis, analysis.extra, title, "; ".join(signatures)) if analysis.extra else None


def runs(analysis: Analysis) -> Table:
    """The runs, with their settings, counts and dates."""
    rows = []
    for name, run in zip(_names(analysis), analysis.runs, strict=True):
        first = next(iter(run.results.values()))
        answers = sum(map(len, run.results.values()))
        pool = len(first.run.get("pool") or first.columns) or None
        failed = sum(len(result.errors) for result in run.results.values())
        date = first.run.get("date")
        minute = None if date is None else str(date).replace("T", " ")[:16]
        counts = (run.k, run.seed, pool, len(run.results), spaced(answers), failed)
        rows.append(row(name, run.base, run.method, *counts, first.run.get("device"), minute))
    counted_ = numbers("k", "seed", "adapters", "datasets", "answers", "failed")
    return Table((*words("run", "base model", "method"), *counted_, *words("device", "date")), tuple(rows), "Runs")


def versus(analysis: Analysis) -> Table:
    """The comparisons of pairs of runs."""
    names, rows = _names(analysis), []
    for pair in analysis.versus:
        found, p = pair.difference, (pair.significance.p, pair.p_holm)
        gap = number(found.value, "+.1f", found.interval, emphasis="bold" if pair.p_holm < ALPHA else "")
        counts = [n for one in (pair.record, pair.datasets) for n in (one.wins, one.losses, one.ties)]
        rows.append(row(names[pair.b], names[pair.a], gap, *map(p_value, p), COLUMN[pair.significance.test], *counts))
    columns = (
        *words("run", "against"),
        *numbers("difference", "p", "p Holm"),
        *words("test"),
        *numbers("better", "worse", "same", "datasets won", "lost", "even"),
    )
    title = "Paired difference in points over shared instances, with 95 % intervals; then instances, then datasets"
    note = (
        "The same instances are compared in both runs; every dataset counts alike. p: two-sided, by "
        f"{tests_in_words(pair.significance for pair in analysis.versus)}. p Holm: corrected as for the marks, for all "
        f"pairs of runs in all lines of this report together. Bold: p Holm below {ALPHA}."
    )
    return Table(columns, tuple(rows), title, note)


def selected(analysis: Analysis) -> Table | None:
    """Statistics of selections, and the ranks of the right adapter where it is known; None without selections."""
    if not any(analysis.selected):
        return None
    known = any(found is not None and found.known for found in analysis.selected)
    heads = ["weight of the first", "effective number"]
    heads += ["right adapter first", "among three", "mean reciprocal rank", "of instances"] if known else []
    rows = []
    for name, found in zip(_names(analysis), analysis.selected, strict=True):
        cells: list[object] = []
        if found is not None:
            cells = [f"{found.heaviest:.2f}", f"{found.effective:.1f}"]
            if found.known:
                shares = [f"{100 * share:.1f} %" for share in (found.first, found.in_three)]
                cells += [*shares, f"{found.reciprocal:.2f}", found.known]
        rows.append(row(name, *cells, *[None] * (len(heads) - len(cells))))
    note = "Effective number: as many adapters of equal weight would spread the weight as far."
    if known:
        note += " The right adapter is named by the data, or has the dataset’s name; ties count against it."
    return Table((*words("run"), *numbers(*heads)), tuple(rows), "Selections", note)


def weights(found: Weights) -> Table:
    """Each dataset's heaviest adapters, in words."""
    rows = []
    for name, values in zip(found.datasets, found.values, strict=True):
        order = sorted(range(len(values)), key=lambda n: (-float(values[n]), found.adapters[n]))[:MOST]
        # Isolated, so that a name that is written from right to left moves no number.
        shares = [f"\u2068{found.adapters[n]}\u2069 {values[n]:.2f}" for n in order if values[n] > 0]
        rows.append(row(name, " · ".join(shares)))
    return Table(words("dataset", "mean weight"), tuple(rows), f"The {MOST} heaviest adapters of each dataset")


def time(analysis: Analysis) -> Table:
    """Seconds by run and stage."""
    stages = list(dict.fromkeys(name for spent in analysis.seconds for name in spent.stages))
    rows = []
    for name, spent in zip(_names(analysis), analysis.seconds, strict=True):
        each = 1000 * sum(spent.stages.values()) / spent.instances
        shown = [spent.loading, *(spent.stages.get(stage, 0.0) for stage in stages), spent.total]
        rows.append(row(name, *(f"{seconds:.1f}" for seconds in shown), f"{each:.0f}"))
    columns = (*words("run"), *numbers("loading", *stages, "together", "ms per answer"))
    return Table(columns, tuple(rows), "Seconds by stage", TIMES)


def options(analysis: Analysis) -> Table | None:
    """Options in which runs differ; None where they do not."""
    rows = [row(name, *values) for name, values in analysis.differing.items()]
    columns = (*words("option"), *_by_run(analysis, numeric=False))
    return Table(columns, tuple(rows), "Other options that differ") if rows else None


def versions(run: Run) -> Table | None:
    """The versions of libraries under which the first dataset of a run was answered."""
    found = next(iter(run.results.values())).run.get("versions")
    if not isinstance(found, dict):
        return None
    return Table(words("of", "version"), tuple(row(*item) for item in found.items()), "Versions")


def spaced(count: int) -> str:
    """`12 345`."""
    return f"{count:,}".replace(",", " ")


def _names(analysis: Analysis) -> list[Cell]:
    """The runs' labels, with their folders."""
    both = zip(analysis.labels, analysis.runs, strict=True)
    return [Cell(label, title=run.folder.resolve().name) for label, run in both]


def _legend(analysis: Analysis, weak: str) -> str:
    """A text that explains marks and intervals."""
    return f"{MARKS.format(weak=weak)} {INTERVALS}" if len(analysis.runs) > 1 else INTERVALS


def _by_run(analysis: Analysis, *, numeric: bool = True) -> list[Column]:
    return [Column(label, numeric=numeric) for label in analysis.labels]


def _by_dataset(analysis: Analysis, lines: Sequence[Line], title: str, note: str) -> Table:
    rows: list[Row] = []
    for line in lines:
        name, measure = str(line.dataset), NAMES.get(line.metric, line.metric)
        repeats = bool(rows) and rows[-1].cells[0] is not None and rows[-1].cells[0].text == name
        first = Cell(name, dataset=True, repeats=repeats)
        rows.append(row(first, measure, *(_cell(line, cell) for cell in line.cells), section=line.group))
    return Table((*words("dataset", "measure"), *_by_run(analysis)), tuple(rows), title, note)


def _cell(line: Line, cell: Number | None) -> Cell | None:
    if cell is None:
        return None
    notes = []
    if not cell.complete:
        of = [counted(cell.datasets, "dataset")] if line.dataset is None else []
        notes.append(f"only {', '.join([*of, counted(cell.rows, 'row')])}")
    emphasis = _EMPHASIS[cell.mark] if cell.complete else "faint"
    return number(cell.value, ".1f", cell.interval, scale=line.scale, emphasis=emphasis, notes=notes)
