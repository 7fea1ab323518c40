"""Runs beside each other: is one better than another on the same rows, or could the difference be chance?

Each run is compared with the first one, by dataset and by the paper's groups of datasets, with `statistics.paired`.
P-values are corrected by Holm's method over all lines together.
"""

from __future__ import annotations

import re
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass, replace
from typing import TYPE_CHECKING, Any

import numpy as np

from logo.errors import DataError, UsageError, listed
from logo.evaluation.metrics import by_measure, measures
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
    found: dict[str, list[str]] = {group: [] for group in GROUPS}
    for dataset in datasets:
        main = re.split(r"[./]", dataset, maxsplit=1)[0]
        found.setdefault(_GROUPS.get(main, main), []).append(dataset)
    return {group: names for group, names in found.items() if names}


def lines_of(measured: Mapping[str, Iterable[str]]) -> list[tuple[str, str, list[str]]]:
    """What a table has lines for: (name, measure, datasets), each dataset with its measures, then the groups of two
    datasets or more with the same measure, and `all` where there are several groups.

    Args:
        measured: the measures of each dataset.
    """
    alone = [one for names in grouped(measured).values() for one in names]
    lines = [(one, measure, [one]) for one in alone for measure in measured[one]]
    for measure in dict.fromkeys(measure for _, measure, _ in lines):
        groups = grouped(one for one in alone if measure in measured[one])
        several = {ALL: [one for names in groups.values() for one in names]} if len(groups) > 1 else {}
        lines += [(name, measure, some) for name, some in {**groups, **several}.items() if len(some) > 1]
    return lines


def values_of(rows: pandas.DataFrame) -> dict[str, Values]:
    """The values (rows,) of each measure of one run's dataset."""
    found = by_measure(rows["metric"].iloc[0], list(rows["value"]))
    return {name: np.asarray(values, dtype=np.float64) for name, values in found.items()}


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
    found: Paired

    def as_json(self) -> dict[str, Any]:
        """All of it; `a` and `b` are the means, `run_a` and `run_b` the runs."""
        own = {"run_a": self.a, "run_b": self.b, "name": self.name, "measure": self.measure, "datasets": self.datasets}
        return {**own, **asdict(self.found), "difference": self.found.difference, "marked": self.found.is_marked}


@dataclass(frozen=True)
class Comparison:
    """Runs compared with the first one.

    Attributes:
        lines: of all runs, corrected together.
        notes: what was not compared, and why, or could not be checked; one sentence each.
    """

    lines: tuple[Compared, ...]
    notes: tuple[str, ...]


def compare(table: pandas.DataFrame, *, seed: int = 0, strict: bool = True) -> Comparison:
    """Compares the runs of a table with its first one, on the datasets that both have.

    Args:
        table: as `results.read` returns it.
        seed: of intervals and tests.
        strict: raise where runs cannot be compared; False: a note says so.

    Raises:
        UsageError: there is one run only.
        DataError: two runs have no dataset in common, or one with other rows or another metric.
    """
    runs = {name: dict(iter(rows.groupby("dataset", sort=False))) for name, rows in table.groupby("run", sort=False)}
    first, *others = runs
    if strict and not others:
        raise UsageError(f"expected two runs or more to compare, found one, {first}")
    lines: list[Compared] = []
    notes = list(_mixed(table.attrs.get("runs", {})))
    for other in others:
        a, b = runs[first], runs[other]
        common = [name for name in a if name in b]
        unlike = {name: said for name in common if (said := _unlike(a[name], b[name], (first, other)))}
        refused = [f"dataset {name!r}: {said}" for name, said in unlike.items()]
        if not common:
            refused = [f"no dataset in common: {first} has {listed(list(a))}, {other} has {listed(list(b))}"]
        if strict and refused:
            raise DataError(refused[0])
        notes += refused
        notes += [f"only {run} has {listed(only)}" for run, only in _alone({first: a, other: b}) if common]
        pairs = {name: (values_of(a[name]), values_of(b[name])) for name in common if name not in unlike}
        if unchecked := [name for name in pairs if not (_has_texts(a[name]) and _has_texts(b[name]))]:
            notes.append(f"{first} or {other} has no prompts: rows of {listed(unchecked)} are taken to be the same")
        for name, measure, members in lines_of({name: list(one) for name, (one, _) in pairs.items()}):
            found = paired([(pairs[one][0][measure], pairs[one][1][measure]) for one in members], seed)
            lines.append(Compared(first, other, name, measure, len(members), found))
    corrected = zip(lines, holm([one.found.p for one in lines]), strict=True)
    return Comparison(tuple(replace(one, found=replace(one.found, p_holm=p)) for one, p in corrected), tuple(notes))


def _mixed(runs: Mapping[str, Mapping[str, Any]]) -> Iterator[str]:
    """That datasets of one run were answered by different engines or with different settings."""
    for run, datasets in runs.items():
        engines = {
            name: {key: value for key, value in one.get("identity", {}).items() if key not in _OF_DATASETS}
            for name, one in datasets.items()
        }
        first = next(iter(engines), "")
        for name, engine in engines.items():
            if found := differences(engines[first], engine):
                yield f"{run} mixes settings: of {name}, {described(found, 3)} as of {first}"


def _alone(runs: Mapping[str, Mapping[str, Any]]) -> Iterator[tuple[str, list[str]]]:
    """The datasets that one of two runs has alone."""
    for run, datasets in runs.items():
        if only := [name for name in datasets if not all(name in other for other in runs.values())]:
            yield run, only


def _unlike(a: pandas.DataFrame, b: pandas.DataFrame, runs: Sequence[str]) -> str:
    """Why results of one dataset cannot be compared; empty if they can."""
    (x, *_), (y, *_) = a["metric"], b["metric"]
    if measures(x) != measures(y):
        both = f"{x} in {runs[0]} and {y} in {runs[1]}"
        return f"expected one metric, found {both}; --metric judges the stored answers of both anew"
    differ = f"{len(a)} in {runs[0]} and {len(b)} in {runs[1]}" if len(a) != len(b) else ""
    for what in ("prompt", "completion") if not differ and _has_texts(a) and _has_texts(b) else ():
        for number, (ours, theirs) in enumerate(zip(a[what], b[what], strict=True), start=1):
            if not differ and ours != theirs:
                differ = f"row {number} with the {what} {ours!r:.60} in {runs[0]} and {theirs!r:.60} in {runs[1]}"
    return f"expected the same rows, found {differ}; answer the same data with the same --limit" if differ else ""


def _has_texts(rows: pandas.DataFrame) -> bool:
    """Whether a result has prompts and gold texts; those of the official script have none."""
    return {"prompt", "completion"} <= set(rows) and not rows[["prompt", "completion"]].isna().any(axis=None)
