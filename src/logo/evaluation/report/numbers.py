"""The numbers of a report from results: means with intervals, and marks of the best.

A line is one measure of one dataset or group, with a cell per run. A run is called best only among runs with equally
many answers, and only if a test says so: see `versus`.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace

from logo.evaluation.corpus import mean_of, mean_over
from logo.evaluation.groups import group_of, grouped
from logo.evaluation.intervals import Interval
from logo.evaluation.report.versus import Compared, Mark, Pairing
from logo.evaluation.stored import Result

NAMES: Mapping[str, str] = {
    "em": "accuracy",
    "em_first": "accuracy (first gold text)",
    "bleu": "BLEU",
    "chrf": "chrF",
    "rouge-1": "ROUGE-1",
    "rouge-2": "ROUGE-2",
    "rouge-L": "ROUGE-L",
    "exact_match": "exact match (SQuAD)",
    "f1": "F1 (SQuAD)",
}
"""Usual names of measures; other measures keep their own."""


@dataclass(frozen=True)
class Cell:
    """One run's number.

    Attributes:
        value: the mean.
        interval: its 95 % interval, if it has one.
        rows: number of instances; `datasets`: number of datasets.
        complete: no other run of the line has more answers.
        mark: of the complete ones, the best, or those that are not significantly worse if there is no best one.
    """

    value: float
    interval: Interval | None
    rows: int
    datasets: int = 1
    complete: bool = True
    mark: Mark = ""


@dataclass(frozen=True)
class Line:
    """One measure with a cell per run, None where a run lacks it. `dataset` is None for a whole group, and the group
    is '' for everything. `scale`: what a value is multiplied with to be shown."""

    group: str
    dataset: str | None
    metric: str
    cells: tuple[Cell | None, ...]
    scale: float = 100.0


def dataset_lines(pairing: Pairing) -> list[Line]:
    """One line per dataset and official measure."""
    return [
        Line(group_of(name), name, metric, _cells(pairing, [name], metric))
        for name in pairing.datasets
        for metric in _metrics(pairing, [name])
    ]


def group_lines(pairing: Pairing) -> list[Line]:
    """One line per group and official measure: the mean of its datasets' means."""
    return [
        Line(group, None, metric, _cells(pairing, names, metric))
        for group, names in grouped(pairing.datasets).items()
        for metric in _metrics(pairing, names)
    ]


def overall(pairing: Pairing) -> Line:
    """The mean of the primary measures over all datasets for which they are the same in all runs."""
    return Line("", None, "primary", _cells(pairing, _members(pairing, ""), None))


def extra_lines(pairing: Pairing) -> list[Line]:
    """One line per dataset and measure beside the official ones, as the runs have written them. None is marked as
    best; `logo eval compare` tests these measures."""
    lines = []
    for name in pairing.datasets:
        found = [run.results.get(name) for run in pairing.runs]
        present = [result for result in found if result is not None]
        signed = {metric for result in present for metric in result.signatures}
        for metric in dict.fromkeys(metric for result in present for metric in result.extra):
            cells = [_extra_cell(result, metric) for result in found]
            scale = 1.0 if metric in signed else 100.0  # sacrebleu's values are in percent already
            lines.append(Line(group_of(name), name, metric, _completed(cells), scale))
    return lines


def compared(pairing: Pairing, lines: Sequence[Line]) -> list[Compared]:
    """What the runs are compared by in these lines."""
    return [
        Compared(
            [cell.value if cell is not None and cell.complete else None for cell in line.cells],
            [line.dataset] if line.dataset is not None else _members(pairing, line.group),
            line.metric if line.group else None,
        )
        for line in lines
    ]


def marked(lines: Sequence[Line], marks: Sequence[Sequence[Mark]]) -> list[Line]:
    """The lines with these marks."""
    return [
        replace(line, cells=tuple(cell and replace(cell, mark=one) for cell, one in zip(line.cells, some, strict=True)))
        for line, some in zip(lines, marks, strict=True)
    ]


def _members(pairing: Pairing, group: str) -> list[str]:
    """The datasets of a group; of '' all whose primary measure is the same in all runs."""
    return grouped(pairing.datasets)[group] if group else [n for n in pairing.datasets if n not in pairing.unlike]


def _completed(cells: Sequence[Cell | None]) -> tuple[Cell | None, ...]:
    """The cells with `complete` set."""
    most = max(((cell.datasets, cell.rows) for cell in cells if cell is not None), default=(0, 0))
    return tuple(cell and replace(cell, complete=(cell.datasets, cell.rows) == most) for cell in cells)


def _metrics(pairing: Pairing, names: Sequence[str]) -> list[str]:
    results = [run.results[name] for run in pairing.runs for name in names if name in run.results]
    return list(dict.fromkeys(metric for result in results for metric in result.measures))


def _cells(pairing: Pairing, names: Sequence[str], metric: str | None) -> tuple[Cell | None, ...]:
    cells = []
    for run in pairing.runs:
        results = [run.results[name] for name in names if name in run.results]
        scores = [result.measures.get(metric or result.primary) for result in results]
        means = [mean_of(values) for values in scores if values is not None]
        rows = sum(len(mean.rows) for mean in means)
        cells.append(Cell(*mean_over(means, seed=pairing.seed), rows, len(means)) if means else None)
    return _completed(cells)


def _extra_cell(result: Result | None, metric: str) -> Cell | None:
    if result is None or metric not in result.extra:
        return None
    return Cell(result.extra[metric], result.extra_intervals.get(metric), len(result))
