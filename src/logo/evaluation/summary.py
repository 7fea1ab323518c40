"""The numbers of a study from its measured rows: means over tasks with intervals."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field
from statistics import fmean
from typing import Any

from logo.evaluation.corpus import mean_of
from logo.evaluation.intervals import of_mean

KINDS = ("signals", "methods", "mixtures")
# Kind -> name -> metric -> value. Of one row, of a task, or of all tasks.
Section = dict[str, dict[str, dict[str, float]]]


@dataclass(frozen=True)
class Measured:
    """The measurements of one row.

    Attributes:
        task: the task's name; `index`: the row's index in it.
        answers: every signal, method and fixed mixture; ranks (`top1`, `top3`, `mrr`) only of signals on own tasks.
        left_out: the same without the row's own adapter; None on unseen tasks.
        seconds: `select` by signal and method, `score`, and `generate` if answers were generated.
        predictions: part (`answers`, `left_out`) -> kind -> name -> the generated answer.
    """

    task: str
    index: int
    answers: Section
    left_out: Section | None
    seconds: dict[str, Any] = field(default_factory=dict)
    predictions: dict[str, dict[str, dict[str, str]]] = field(default_factory=dict)


def summary(rows: Iterable[Measured], pool: Sequence[str], *, seed: int = 0) -> dict[str, Any]:
    """The numbers of a study: `signals`, `methods` where there are some, `mixtures`, `left_out`, `unseen`, `tasks` and
    `pool`; None without rows.

    Args:
        rows: in any order.
        pool: the adapters' names; tasks of these names are own tasks.
        seed: of intervals that are drawn.
    """
    tasks: dict[str, list[Measured]] = {}
    for row in sorted(rows, key=lambda row: (row.task, row.index)):
        tasks.setdefault(row.task, []).append(row)
    own = {name: measured for name, measured in tasks.items() if name in set(pool)}
    answers = section([[row.answers for row in measured] for measured in own.values()], seed)
    left_out = [[row.left_out for row in measured if row.left_out is not None] for measured in own.values()]
    unseen = [[row.answers for row in measured] for name, measured in tasks.items() if name not in own]
    return {
        "signals": answers and answers.get("signals"),
        **({"methods": answers["methods"]} if answers and "methods" in answers else {}),
        "mixtures": answers and answers["mixtures"],
        "left_out": section(left_out, seed),
        "unseen": section(unseen, seed),
        "tasks": {name: _of_task(measured) for name, measured in tasks.items()},
        "pool": list(pool),
    }


def section(tasks: Sequence[Sequence[Section]], seed: int = 0) -> dict[str, dict[str, dict[str, Any]]] | None:
    """Means over tasks of rows that all have the same metrics, with their 95 % `intervals`, None where there is none;
    None without rows."""
    columns = [values_of(rows) for rows in tasks if rows]
    if not columns:
        return None
    report: dict[str, dict[str, dict[str, Any]]] = {}
    intervals: dict[tuple[str, str], dict[str, list[float] | None]] = {}
    for kind, name, metric in columns[0]:
        found = [mean_of(task[kind, name, metric]) for task in columns]
        values = [task.value for task in found]
        interval = of_mean(values, [task.interval(seed=[seed]) for task in found])
        report.setdefault(kind, {}).setdefault(name, {})[metric] = fmean(values)
        intervals.setdefault((kind, name), {})[metric] = None if interval is None else list(interval)
    for (kind, name), ends in intervals.items():
        report[kind][name]["intervals"] = ends
    return report


def values_of(rows: Iterable[Section]) -> dict[tuple[str, str, str], list[float]]:
    """The values of some rows by kind, name and metric."""
    found: dict[tuple[str, str, str], list[float]] = {}
    for row in rows:
        for kind, named in row.items():
            for name, metrics in named.items():
                for metric, value in metrics.items():
                    found.setdefault((kind, name, metric), []).append(value)
    return found


def _of_task(rows: Sequence[Measured]) -> dict[str, Any]:
    report: dict[str, Any] = {"rows": len(rows), **_plain_means([row.answers for row in rows])}
    left_out = [row.left_out for row in rows if row.left_out is not None]
    return report | ({"left_out": _plain_means(left_out)} if left_out else {})


def _plain_means(rows: Sequence[Section]) -> Section:
    report: Section = {}
    for (kind, name, metric), values in values_of(rows).items():
        report.setdefault(kind, {}).setdefault(name, {})[metric] = fmean(values)
    return report
