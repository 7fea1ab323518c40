"""The table of work on routing adapters: every method relative to the oracle.

    own         mean over tasks of method / oracle, the row's own adapter in the pool
    left_out    the same with that adapter removed; the oracle still has it
    unseen      tasks that never had an adapter and so have no oracle: the difference from the uniform mixture

Tasks whose oracle scores 0 have no ratio; they are left out of the mean and named. The literature prints the mean of
ratios (LoRAuter, arXiv 2601.21795), which varies a lot with few rows per task, so the ratio of the means stands beside
it. Intervals draw tasks and say how much a number would vary with other tasks. Numerators and denominators are drawn
together, so a comparison is paired.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from statistics import fmean
from typing import Any

import numpy as np

from logo.evaluation.corpus import mean_worth
from logo.evaluation.intervals import Interval, Values, bootstrap
from logo.evaluation.summary import KINDS, Measured, Section, values_of

GENERATED, FORCED = "generated", "exact_match"

Arm = tuple[str, str]  # kind and name
Tasks = dict[str, dict[Arm, float]]  # task -> arm -> mean score


def relative(rows: Iterable[Measured], pool: Sequence[str], *, generated: bool, seed: int = 0) -> dict[str, Any]:
    """The table of measured rows: `metric`, `own`, `left_out` and `unseen`; the last three None without rows.

    Args:
        rows: in any order.
        pool: the adapters' names; tasks of these names are own tasks.
        generated: generated answers are judged, by the metric of their task; else exact match, teacher-forced.
        seed: of the bootstrap.
    """
    metric = GENERATED if generated else FORCED
    own, unseen = list[Measured](), list[Measured]()
    for row in rows:
        (own if row.task in set(pool) else unseen).append(row)
    answers = _tasks([(row.task, row.answers) for row in own], metric)
    left_out = _tasks([(row.task, row.left_out) for row in own if row.left_out is not None], metric)
    oracle = {task: arms["mixtures", "oracle"] for task, arms in answers.items()}
    return {
        "metric": metric,
        "own": _of_oracle(answers, oracle, seed),
        "left_out": _of_oracle(left_out, oracle, seed),
        "unseen": _of_uniform([(row.task, row.answers) for row in unseen], metric, seed),
    }


def _of_oracle(tasks: Tasks, oracle: Mapping[str, float], seed: int) -> dict[str, Any] | None:
    """Each arm relative to the oracle."""
    if not tasks:
        return None
    known = [task for task in tasks if oracle[task] > 0]
    part: dict[str, Any] = {"tasks": len(tasks), "without_oracle": [task for task in tasks if oracle[task] <= 0]}
    for kind, name in _arms(tasks):
        pairs = np.array([(tasks[task][kind, name], oracle[task]) for task in tasks], dtype=np.float64)
        ratios = np.array([tasks[task][kind, name] / oracle[task] for task in known], dtype=np.float64)
        both = float(pairs[:, 1].sum())
        entry: dict[str, Any] = {
            "value": float(pairs[:, 0].mean()),
            "of_oracle": fmean(ratios) if known else None,
            "of_oracle_pooled": float(pairs[:, 0].sum()) / both if both else None,
            "intervals": {
                "of_oracle": _ends(_mean_interval(ratios, seed)),
                "of_oracle_pooled": _ends(bootstrap(pairs, _ratio, seed=[seed])) if both else None,
            },
        }
        part.setdefault(kind, {})[name] = entry
    return part


def _of_uniform(rows: Sequence[tuple[str, Section]], metric: str, seed: int) -> dict[str, Any] | None:
    """Each arm beside the uniform mixture: value, and paired differences of value and of likelihood over tasks."""
    if not rows:
        return None
    values, nll = _tasks(rows, metric), _tasks(rows, "nll")
    part: dict[str, Any] = {"tasks": len(values)}
    for arm in _arms(values):
        gains = {
            "value": [one[arm] for one in values.values()],
            "nll": [one[arm] for one in nll.values()],
            "value_over_uniform": [one[arm] - one["mixtures", "uniform"] for one in values.values()],
            "nll_over_uniform": [one[arm] - one["mixtures", "uniform"] for one in nll.values()],
        }
        entry: dict[str, Any] = {what: fmean(numbers) for what, numbers in gains.items()}
        entry["intervals"] = {what: _ends(_mean_interval(np.array(n), seed)) for what, n in gains.items()}
        part.setdefault(arm[0], {})[arm[1]] = entry
    return part


def _tasks(rows: Iterable[tuple[str, Section]], metric: str) -> Tasks:
    """Means over the rows of each task."""
    sections: dict[str, list[Section]] = {}
    for task, section in rows:
        sections.setdefault(task, []).append(section)
    return {
        task: {(kind, name): fmean(values) for (kind, name, one), values in values_of(found).items() if one == metric}
        for task, found in sorted(sections.items())
    }


def _arms(tasks: Tasks) -> list[Arm]:
    """The arms that every task has, signals first."""
    first, *others = tasks.values()
    shared = [arm for arm in first if all(arm in one for one in others)]
    return sorted(shared, key=lambda arm: KINDS.index(arm[0]))


def _mean_interval(values: Values, seed: int) -> Interval | None:
    return bootstrap(np.stack([values, np.ones_like(values)], axis=1), mean_worth, seed=[seed]) if len(values) else None


def _ratio(sums: Values) -> Values:
    """The ratio of sums (..., 2); NaN for draws in which the oracle scores 0, which have none."""
    unknown = np.full_like(sums[..., 0], np.nan)
    return np.asarray(np.divide(sums[..., 0], sums[..., 1], out=unknown, where=sums[..., 1] > 0))


def _ends(interval: Interval | None) -> list[float] | None:
    return None if interval is None else list(interval)
