"""One tidy table of a sweep: a row for each cell, dataset and measure."""

from __future__ import annotations

from collections.abc import Iterator, Sequence

from logo.evaluation.groups import group_of
from logo.evaluation.stored import Result
from logo.evaluation.sweep.grid import Axis, numbers
from logo.evaluation.sweep.running import Outcome
from logo.evaluation.tables import Column, Table, Value, row, words
from logo.evaluation.tables import numbers as number_columns


def table(axes: Sequence[Axis], outcomes: Sequence[Outcome]) -> Table:
    """The table of these outcomes, in their order.

    A column for each axis, named like it with underscores, numbers where all of its values are; then `dataset`,
    `group`, `kind` (`official`: the mean over rows of the official measure; `corpus`: a measure of all answers
    together), `metric`, `value` with its 95 % interval `low` and `high` (fractions of one; corpus BLEU and chrF 0 to
    100), `rows`, `errors` (rows without an answer, which count as wrong), the seconds that all rows took, and
    `folder`, relative to the sweep's.
    """
    found = {axis.name: numbers(axis.values) for axis in axes}
    shown = {axis.name: dict(zip(axis.values, found[axis.name] or map(str, axis.values), strict=True)) for axis in axes}
    rows = []
    for outcome in outcomes:
        values = [shown[axis.name][outcome.cell.values[axis.name]] for axis in axes]
        begin = (*values, outcome.dataset, group_of(outcome.dataset))
        result = outcome.result
        end = (len(result), len(result.errors), *(result.seconds.get(stage) for stage in ("probe", "generate")))
        rows += [row(*begin, *measure, *end, outcome.folder) for measure in _measures(result)]
    columns = (
        *(Column(axis.name.replace("-", "_"), numeric=found[axis.name] is not None) for axis in axes),
        *words("dataset", "group", "kind", "metric"),
        *number_columns("value", "low", "high", "rows", "errors", "seconds_probe", "seconds_generate"),
        *words("folder"),
    )
    return Table(columns, tuple(rows))


def _measures(result: Result) -> Iterator[tuple[Value, ...]]:
    """Kind, metric, value, low and high."""
    for kind, values, intervals in (
        ("official", result.official, result.official_intervals),
        ("corpus", result.extra, result.extra_intervals),
    ):
        for metric, value in values.items():
            yield kind, metric, value, *intervals.get(metric, (None, None))
