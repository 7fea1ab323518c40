"""One tidy table of a sweep: a row for each cell, dataset and measure, as CSV and as Parquet with the same content."""

from __future__ import annotations

import csv
import importlib
import importlib.util
import io
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any

from logo.errors import UsageError
from logo.evaluation.groups import group_of
from logo.evaluation.sweep.grid import Axis, numbers
from logo.evaluation.sweep.running import Outcome

Field = int | float | str | None

# Columns after those of the axes.
_TEXTS = ("dataset", "group", "kind", "metric")
_NUMBERS = ("value", "low", "high")
_COUNTS = ("rows", "errors")
_SECONDS = ("seconds_probe", "seconds_generate")
COLUMNS = (*_TEXTS, *_NUMBERS, *_COUNTS, *_SECONDS, "folder")


@dataclass(frozen=True)
class TidyTable:
    """Names of columns, their types (int, float or str), and rows of as many fields; None: there is no such number."""

    columns: tuple[str, ...]
    types: tuple[type, ...]
    rows: tuple[tuple[Field, ...], ...]


def table(axes: Sequence[Axis], outcomes: Sequence[Outcome]) -> TidyTable:
    """The table of these outcomes, in their order.

    A column for each axis, named like it with underscores, numbers where all of its values are; then `dataset`,
    `group`, `kind` (`official`: the mean over rows of the official measure; `corpus`: a measure of all answers
    together), `metric`, `value` with its 95 % interval `low` and `high` (fractions of one; corpus BLEU and chrF 0 to
    100), `rows`, `errors` (rows without an answer, which count as wrong), the seconds that all rows took, and
    `folder`, relative to the sweep's.
    """
    shown: list[dict[Any, Field]] = []
    types: list[type] = []
    for axis in axes:
        found = numbers(axis.values)
        shown.append(dict(zip(axis.values, map(str, axis.values) if found is None else found, strict=True)))
        types.append(str if found is None else type(found[0]))
    rows = []
    for outcome in outcomes:
        values = [known[outcome.cell.values[axis.name]] for axis, known in zip(axes, shown, strict=True)]
        begin = [*values, outcome.dataset, group_of(outcome.dataset)]
        end: list[Field] = [len(outcome.result), len(outcome.result.errors)]
        end += [outcome.result.seconds.get(stage) for stage in ("probe", "generate")]
        rows += [(*begin, *measure, *end, outcome.folder) for measure in _measures(outcome)]
    columns = (*(axis.name.replace("-", "_") for axis in axes), *COLUMNS)
    types += [str] * len(_TEXTS) + [float] * len(_NUMBERS) + [int] * len(_COUNTS) + [float] * len(_SECONDS) + [str]
    return TidyTable(columns, tuple(types), tuple(rows))


def as_csv(found: TidyTable) -> bytes:
    """UTF-8 with a line of names; numbers with as many digits as they have, so that nothing is lost."""
    text = io.StringIO()
    writer = csv.writer(text, lineterminator="\n")
    writer.writerow(found.columns)
    writer.writerows(["" if field is None else field for field in row] for row in found.rows)
    return text.getvalue().encode("utf-8")


def as_parquet(found: TidyTable) -> bytes:
    """The same as Parquet: int64, double and string columns.

    Raises:
        UsageError: pyarrow is not installed.
    """
    if not has_parquet():
        raise UsageError("Parquet needs pyarrow: install lora-on-the-go[eval]")
    arrow: Any = importlib.import_module("pyarrow")
    parquet: Any = importlib.import_module("pyarrow.parquet")
    kinds = {int: arrow.int64(), float: arrow.float64(), str: arrow.string()}
    arrays = [
        arrow.array([row[at] for row in found.rows], type=kinds[found.types[at]]) for at in range(len(found.columns))
    ]
    sink = io.BytesIO()
    parquet.write_table(arrow.table(arrays, names=list(found.columns)), sink)
    return sink.getvalue()


def has_parquet() -> bool:
    """Whether Parquet can be written."""
    return importlib.util.find_spec("pyarrow") is not None


def _measures(outcome: Outcome) -> Iterator[tuple[Field, ...]]:
    """Kind, metric, value, low and high."""
    result = outcome.result
    for kind, values, intervals in (
        ("official", result.official, result.official_intervals),
        ("corpus", result.extra, result.extra_intervals),
    ):
        for metric, value in values.items():
            low, high = intervals.get(metric, (None, None))
            yield kind, metric, value, low, high
