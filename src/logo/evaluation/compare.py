"""Runs beside each other: is one better than another on the same rows, or could the difference be chance?

Each run is compared with the first one, by dataset and by the paper's groups of datasets, with `statistics.paired`.
P-values are corrected by Holm's method over all lines together.
"""

from __future__ import annotations

import re
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import asdict, dataclass, replace
from functools import cached_property
from typing import TYPE_CHECKING, Any

import numpy as np

from logo.errors import DataError, UsageError, listed
from logo.evaluation.metrics import Scale, by_measure, group_measure, measures
from logo.evaluation.results import described, differences
from logo.evaluation.statistics import Paired, Values, holm, paired

if TYPE_CHECKING:
    import pandas

_GROUPS: Mapping[str, str] = {
    "bbh": "BIG-Bench Hard",
    "wmt14": "Translation",
    "wmt16": "Translation",
    "gem": "Struct-to-Text",
    "ai2_arc": "Closed-Book QA",
    "nq": "Closed-Book QA",
    "tqa": "Closed-Book QA",
    "anli": "NLI",
    "glue": "NLI",
    "code_x_glue": "Code",
}
GROUPS: tuple[str, ...] = tuple(dict.fromkeys(_GROUPS.values()))
"""The names of the paper's groups, in its order; code comes last."""
ALL = "all"


def grouped(datasets: Iterable[str]) -> dict[str, list[str]]:
    """Group -> its datasets in the order they came: the paper's groups first, then others, which are called by the part
    of the datasets' names before the first dot or slash."""
    groups: dict[str, list[str]] = {group: [] for group in GROUPS}
    for dataset in datasets:
        main = re.split(r"[./]", dataset, maxsplit=1)[0]
        groups.setdefault(_GROUPS.get(main, main), []).append(dataset)
    return {group: names for group, names in groups.items() if names}


@dataclass(frozen=True)
class Line:
    """A line of a table: a dataset, or a group of several (`name`), by one `measure`; of a group, `em_first` counts as
    `em` (`metrics.group_measure`)."""

    name: str
    measure: str
    datasets: tuple[str, ...]


def lines_of(measured: Mapping[str, Iterable[str]]) -> list[Line]:
    """What a table has lines for: each dataset with its measures, then the groups of two datasets or more with the same
    measure, and `all` where there are several groups.

    Args:
        measured: the measures of each dataset.
    """
    ordered = [dataset for names in grouped(measured).values() for dataset in names]
    lines = [Line(dataset, measure, (dataset,)) for dataset in ordered for measure in measured[dataset]]
    for measure in dict.fromkeys(group_measure(line.measure) for line in lines):
        having = [dataset for dataset in ordered if measure in map(group_measure, measured[dataset])]
        groups = grouped(having)
        if len(groups) > 1:
            groups[ALL] = having
        lines += [Line(name, measure, tuple(datasets)) for name, datasets in groups.items() if len(datasets) > 1]
    return lines


@dataclass(frozen=True)
class Column:
    """The values (rows,) of one run's dataset by a measure, and their scale."""

    values: Values
    scale: Scale


def columns_of(rows: pandas.DataFrame) -> dict[str, Column]:
    """The column of each measure of one run's dataset."""
    kind, scale = rows[["metric", "scale"]].iloc[0]
    return {
        name: Column(np.asarray(values, dtype=np.float64), scale)
        for name, values in by_measure(kind, list(rows["value"])).items()
    }


def column_for(line: Line, columns: Mapping[str, Column]) -> Column | None:
    """The column of a dataset that counts for a line; None: the dataset has none."""
    if line.measure in columns or len(line.datasets) == 1:
        return columns.get(line.measure)
    return next((column for name, column in columns.items() if group_measure(name) == line.measure), None)


# What `run.json` says of the dataset, and not of what has answered it.
_OF_DATASETS = ("dataset", "rows", "rows_sha256", "metric", "metric_plugin", "train_sha256")


@dataclass(frozen=True)
class Compared:
    """A line: the runs `a` and `b` by a measure, on a dataset or on all those of a group, `name`."""

    a: str
    b: str
    name: str
    measure: str
    datasets: int
    pair: Paired

    def as_json(self) -> dict[str, Any]:
        """All of it; `a` and `b` are the means, `run_a` and `run_b` the runs."""
        place = {"run_a": self.a, "run_b": self.b, "name": self.name, "measure": self.measure}
        numbers = {"datasets": self.datasets, **asdict(self.pair)}
        return {**place, **numbers, "difference": self.pair.difference, "marked": self.pair.is_marked}


@dataclass(frozen=True)
class Comparison:
    """Runs compared with the first one.

    Attributes:
        lines: of all runs, corrected together.
        notes: what was not compared, and why, or could not be checked; one sentence each.
    """

    lines: tuple[Compared, ...]
    notes: tuple[str, ...]


RowsByDataset = Mapping[str, "pandas.DataFrame"]  # of one run


def compare(table: pandas.DataFrame, *, seed: int = 0, strict: bool = True) -> Comparison:
    """Compares the runs of a table with its first one, on the datasets that both have with the same rows and the same
    metric; notes say what was left out.

    Args:
        table: as `results.read` returns it.
        seed: of intervals and tests.
        strict: raise where nothing can be compared; False: notes say so.

    Raises:
        UsageError: there is one run only.
        DataError: nothing can be compared.
    """
    runs = {name: dict(iter(rows.groupby("dataset", sort=False))) for name, rows in table.groupby("run", sort=False)}
    first, *later = runs
    if strict and not later:
        raise UsageError(f"expected two runs or more to compare, found one, {first}")
    lines: list[Compared] = []
    refused: list[str] = []
    notes = list(_mixed(table.attrs.get("runs", {})))
    for name in later:
        both = _TwoRuns(first, name, runs[first], runs[name])
        refused += both.refused
        notes += both.refused + both.notes
        lines += both.compared(seed)
    if strict and not lines:
        raise DataError(refused[0])
    corrected = holm([line.pair.p for line in lines])
    lines = [replace(line, pair=replace(line.pair, p_holm=p)) for line, p in zip(lines, corrected, strict=True)]
    return Comparison(tuple(lines), tuple(notes))


@dataclass(frozen=True)
class _TwoRuns:
    """Two runs, by name and with their rows."""

    a: str
    b: str
    run_a: RowsByDataset
    run_b: RowsByDataset

    @cached_property
    def common(self) -> list[str]:
        """The datasets that both have."""
        return [dataset for dataset in self.run_a if dataset in self.run_b]

    @cached_property
    def unlike(self) -> dict[str, str]:
        """Why datasets that both have cannot be compared."""
        reasons = {dataset: self._difference(dataset) for dataset in self.common}
        return {dataset: reason for dataset, reason in reasons.items() if reason}

    @property
    def refused(self) -> list[str]:
        """What cannot be compared, in sentences."""
        if not self.common:
            there = f"{self.a} has {listed(list(self.run_a))}, {self.b} has {listed(list(self.run_b))}"
            return [f"no dataset in common: {there}"]
        return [f"dataset {dataset!r}: {reason}" for dataset, reason in self.unlike.items()]

    @property
    def notes(self) -> list[str]:
        """The datasets that one of them has alone, and those whose rows could not be checked."""
        notes = []
        for name, run, other_run in ((self.a, self.run_a, self.run_b), (self.b, self.run_b, self.run_a)):
            alone = [dataset for dataset in run if dataset not in other_run]
            if alone and self.common:
                notes.append(f"only {name} has {listed(alone)}")
        unchecked = [
            dataset
            for dataset in self.common
            if dataset not in self.unlike and not (_has_texts(self.run_a[dataset]) and _has_texts(self.run_b[dataset]))
        ]
        if unchecked:
            notes.append(f"{self.a} or {self.b} has no prompts: rows of {listed(unchecked)} are taken to be the same")
        return notes

    def compared(self, seed: int) -> list[Compared]:
        """A line for each dataset that can be compared, and for each group of them."""
        alike = [dataset for dataset in self.common if dataset not in self.unlike]
        columns_a = {dataset: columns_of(self.run_a[dataset]) for dataset in alike}
        columns_b = {dataset: columns_of(self.run_b[dataset]) for dataset in alike}
        compared = []
        for line in lines_of({dataset: list(columns) for dataset, columns in columns_a.items()}):
            ours = [column_for(line, columns_a[dataset]) for dataset in line.datasets]
            theirs = [column_for(line, columns_b[dataset]) for dataset in line.datasets]
            pairs = [(a, b) for a, b in zip(ours, theirs, strict=True) if a is not None and b is not None]
            binary = all(a.scale == b.scale == "binary" for a, b in pairs)
            pair = paired([(a.values, b.values) for a, b in pairs], "binary" if binary else "graded", seed)
            compared.append(Compared(self.a, self.b, line.name, line.measure, len(line.datasets), pair))
        return compared

    def _difference(self, dataset: str) -> str:
        """Why the results of a dataset cannot be compared; empty if they can."""
        rows_a = self.run_a[dataset]
        rows_b = self.run_b[dataset]
        metric_a = rows_a["metric"].iloc[0]
        metric_b = rows_b["metric"].iloc[0]
        if measures(metric_a) != measures(metric_b):
            both = f"{metric_a} in {self.a} and {metric_b} in {self.b}"
            # The metric of a result without gold texts is the one that both can have.
            shared = metric_b if _has_texts(rows_a) else metric_a
            hint = f"--metric {dataset}={shared} judges the stored answers anew"
            if not (_has_texts(rows_a) or _has_texts(rows_b)):
                hint = "neither has gold texts to judge the stored answers by"
            return f"expected one metric, found {both}; {hint}"
        other_rows = _other_rows(rows_a, rows_b, self.a, self.b)
        if other_rows:
            return f"expected the same rows, found {other_rows}; answer the same data with the same --limit"
        return ""


def _other_rows(a: pandas.DataFrame, b: pandas.DataFrame, name_a: str, name_b: str) -> str:
    """How the rows of two results differ, in words: their number, or the first that is another one."""
    if len(a) != len(b):
        return f"{len(a)} in {name_a} and {len(b)} in {name_b}"
    if not (_has_texts(a) and _has_texts(b)):
        return ""
    for column in ("prompt", "completion"):
        for number, (text_a, text_b) in enumerate(zip(a[column], b[column], strict=True), start=1):
            if text_a != text_b:
                return f"row {number} with the {column} {text_a!r:.60} in {name_a} and {text_b!r:.60} in {name_b}"
    return ""


def _mixed(runs: Mapping[str, Mapping[str, Any]]) -> Iterator[str]:
    """That datasets of one run were answered by different engines or with different settings."""
    for run, datasets in runs.items():
        engines = {
            name: {key: value for key, value in about.get("identity", {}).items() if key not in _OF_DATASETS}
            for name, about in datasets.items()
        }
        first = next(iter(engines), "")
        for name, engine in engines.items():
            different = differences(engines[first], engine)
            if different:
                yield f"{run} mixes settings: of {name}, {described(different, 3)} as of {first}"


def _has_texts(rows: pandas.DataFrame) -> bool:
    """Whether a result has prompts and gold texts; those of the official script have none."""
    return {"prompt", "completion"} <= set(rows) and not rows[["prompt", "completion"]].isna().any(axis=None)
