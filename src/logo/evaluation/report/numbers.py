"""From results to the numbers of a report: means with intervals, who is best, and one run against another.

A line is one measure of one dataset or group, with a cell per run. Official means come from the instances' values;
their intervals from the run's own file where it has them, else from the same bootstrap. Runs are only called best where
they answered equally much.
"""

from __future__ import annotations

import itertools
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Literal

import numpy as np
from numpy.typing import NDArray

from logo.evaluation import paired
from logo.evaluation.corpus import mean_of
from logo.evaluation.groups import group_of, grouped
from logo.evaluation.intervals import Values, estimate
from logo.evaluation.metrics import measures, recorded_kind
from logo.evaluation.report.results import Result, Run

Mark = Literal["", "best", "close"]

NAMES: Mapping[str, str] = {
    "em": "accuracy",
    "em_first": "accuracy",
    "bleu": "BLEU",
    "chrf": "chrF",
    "rouge-1": "ROUGE-1",
    "rouge-2": "ROUGE-2",
    "rouge-L": "ROUGE-L",
    "exact_match": "exact match (SQuAD)",
    "f1": "F1 (SQuAD)",
}
"""What people call a measure; others are shown as they are written."""

SWAPS = 2000  # of the randomisation test: p down to 0.0005, in a fraction of a second per pair of runs
_RIGHT = 0.5


@dataclass(frozen=True)
class Cell:
    """One run's number.

    Attributes:
        value: the mean; `low` and `high`: its 95 % interval, equal to it where nothing is known.
        rows: instances it stands on; `datasets`: how many datasets.
        complete: no other run of the line has answered more.
        mark: the best of the complete ones, or one whose interval overlaps the best's.
    """

    value: float
    low: float
    high: float
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


@dataclass(frozen=True)
class Versus:
    """Run `b` against run `a` (their places) on the instances that both have answered, primary measures.

    Attributes:
        difference: b less a, the mean over datasets, as a fraction.
        instances, datasets: on how many b is better, worse, the same.
        p: two-sided, of the difference; not corrected for the number of comparisons.
    """

    a: int
    b: int
    difference: paired.Difference
    instances: paired.Record
    datasets: paired.Record
    p: float


def official(result: Result) -> tuple[tuple[str, ...], Values]:
    """The names of the official measures, the primary one last, and their values (instances, measures)."""
    first = result.values[0]
    if isinstance(first, dict):
        names = tuple(first)
        return names, np.array([[value[name] for name in names] for value in result.values if isinstance(value, dict)])
    names = measures(recorded_kind(result.run, result.dataset))
    return names, np.array([[value] for value in result.values], dtype=np.float64)


def primary(result: Result) -> Values:
    """What each answer is worth in one number (instances,): ROUGE-L where there are three."""
    _, values = official(result)
    return np.asarray(values[:, -1])


def right(result: Result) -> NDArray[np.bool_]:
    """Which answers count as right (instances,): worth at least one half."""
    return np.asarray(primary(result) >= _RIGHT)


def datasets_of(runs: Sequence[Run]) -> list[str]:
    """Every dataset of any run, grouped as the paper does."""
    present = dict.fromkeys(name for run in runs for name in run.results)
    return [name for names in grouped(present).values() for name in names]


def dataset_lines(runs: Sequence[Run], *, seed: int = 0) -> list[Line]:
    """One line per dataset and official measure."""
    lines = []
    for name in datasets_of(runs):
        found = [_official_cells(run.results.get(name), seed) for run in runs]
        for metric in dict.fromkeys(metric for cells in found for metric in cells):
            cells = [cells.get(metric) for cells in found]
            lines.append(Line(group_of(name), name, metric, marked(cells)))
    return lines


def group_lines(runs: Sequence[Run], *, seed: int = 0) -> list[Line]:
    """One line per group and official measure: the mean of its datasets' means."""
    lines = []
    for group, names in grouped(datasets_of(runs)).items():
        metrics: dict[str, None] = {}
        for run in runs:
            for name in names:
                if name in run.results:
                    metrics |= dict.fromkeys(official(run.results[name])[0])
        for metric in metrics:
            cells = [_mean([_column(run.results[n], metric) for n in names if n in run.results], seed) for run in runs]
            lines.append(Line(group, None, metric, marked(cells)))
    return lines


def overall(runs: Sequence[Run], *, seed: int = 0) -> Line:
    """The mean over all datasets of their primary measures."""
    cells = [_mean([primary(result)[:, None] for result in run.results.values()], seed) for run in runs]
    return Line("", None, "primary", marked(cells))


def extra_lines(runs: Sequence[Run]) -> list[Line]:
    """One line per dataset and measure beside the official ones, as the runs have written them."""
    lines = []
    for name in datasets_of(runs):
        found = [run.results.get(name) for run in runs]
        present = [result for result in found if result is not None]
        signed = {metric for result in present for metric in result.signatures}
        for metric in dict.fromkeys(metric for result in present for metric in result.extra):
            cells = [_extra_cell(result, metric) for result in found]
            scale = 1.0 if metric in signed else 100.0  # sacrebleu speaks in percent already
            lines.append(Line(group_of(name), name, metric, marked(cells), scale))
    return lines


def marked(cells: Sequence[Cell | None]) -> tuple[Cell | None, ...]:
    """Cells with their marks: the best of those that stand on most, and those whose intervals overlap the best's."""
    present = [cell for cell in cells if cell is not None]
    most = max(((cell.datasets, cell.rows) for cell in present), default=(0, 0))
    whole = [cell for cell in present if (cell.datasets, cell.rows) == most]
    if len(whole) < 2 or len({cell.value for cell in whole}) == 1:  # nothing to be better than
        return tuple(cell and replace(cell, complete=(cell.datasets, cell.rows) == most) for cell in cells)
    top = max(cell.value for cell in whole)
    reach = min(cell.low for cell in whole if cell.value == top)

    def mark(cell: Cell) -> Cell:
        complete = (cell.datasets, cell.rows) == most
        how: Mark = "" if not complete else "best" if cell.value == top else "close" if cell.high >= reach else ""
        return replace(cell, complete=complete, mark=how)

    return tuple(cell and mark(cell) for cell in cells)


def versus(runs: Sequence[Run], *, seed: int = 0) -> list[Versus]:
    """Every later run against every earlier one, where they share instances."""
    found = []
    for (a, first), (b, second) in itertools.combinations(enumerate(runs), 2):
        pairs = [
            pair
            for name, result in first.results.items()
            if name in second.results and (pair := _pair(result, second.results[name])) is not None
        ]
        if not pairs:
            continue
        instances = sum((paired.record(pair) for pair in pairs), paired.Record(0, 0, 0))
        gaps = [pair.b.value - pair.a.value for pair in pairs]
        wins, losses = sum(gap > 0 for gap in gaps), sum(gap < 0 for gap in gaps)
        found.append(
            Versus(
                a=a,
                b=b,
                difference=paired.bootstrap(pairs, seed=seed),
                instances=instances,
                datasets=paired.Record(wins, losses, len(gaps) - wins - losses),
                p=paired.randomisation(pairs, seed=seed, swaps=SWAPS),
            )
        )
    return found


def shared_rows(a: Result, b: Result) -> tuple[list[int], list[int]]:
    """The places of the instances that two results share, parallel.

    The same prompt and gold texts make the same instance. Where prompts are not at hand, places do, if both results are
    equally long and not known to come from different files.
    """
    if a.prompts is not None and b.prompts is not None:
        places = {key: place for place, key in enumerate(keys(b))}
        both = [(place, places[key]) for place, key in enumerate(keys(a)) if key in places]
        return [place for place, _ in both], [place for _, place in both]
    files = {_digest(result) for result in (a, b)} - {None}
    same = len(a) == len(b) and len(files) < 2
    return (list(range(len(a))), list(range(len(a)))) if same else ([], [])


def keys(result: Result) -> list[tuple[object, ...]]:
    """What tells a result's instances apart, in order; a row that comes again is numbered."""
    seen: Counter[tuple[object, ...]] = Counter()
    found: list[tuple[object, ...]] = []
    for prompt in result.prompts or ():
        key = (prompt.context, prompt.golds)
        found.append((*key, seen[key]))
        seen[key] += 1
    return found


def _pair(a: Result, b: Result) -> paired.Pair | None:
    here, there = shared_rows(a, b)
    if not here or official(a)[0] != official(b)[0]:
        return None
    return paired.Pair(mean_of(primary(a)[here].tolist()), mean_of(primary(b)[there].tolist()))


def _digest(result: Result) -> object:
    data = result.run.get("dataset")
    return data.get("sha256") if isinstance(data, dict) else None


def _official_cells(result: Result | None, seed: int) -> dict[str, Cell]:
    if result is None:
        return {}
    names, values = official(result)
    found = estimate([values], seed=seed)
    cells = {}
    for column, name in enumerate(names):
        low, high = result.intervals.get(name, (float(found.low[column]), float(found.high[column])))
        cells[name] = Cell(float(found.mean[column]), low, high, len(result))
    return cells


def _column(result: Result, metric: str) -> Values:
    names, values = official(result)
    return np.asarray(values[:, [names.index(metric)]]) if metric in names else values[:0, :1]


def _mean(tasks: Sequence[Values], seed: int) -> Cell | None:
    tasks = [values for values in tasks if len(values)]
    if not tasks:
        return None
    found = estimate(tasks, seed=seed)
    low, high = float(found.low[0]), float(found.high[0])
    return Cell(float(found.mean[0]), low, high, sum(map(len, tasks)), len(tasks))


def _extra_cell(result: Result | None, metric: str) -> Cell | None:
    if result is None or metric not in result.extra:
        return None
    value = result.extra[metric]
    low, high = result.extra_intervals.get(metric, (value, value))
    return Cell(value, low, high, len(result))
