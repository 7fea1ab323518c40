"""`summary`: the report of a study, from the records of its rows."""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np

from logo.evaluation.contest import IN_POOL, OUT_OF_POOL, PROTOCOLS, REMOVED
from logo.evaluation.statistics import DRAWS, FEWEST, auroc, calibration_error, over_tasks
from logo.selection.selector import UNSURE

Tasks = dict[str, list[float]]  # task -> a number of each row


def summary(records: Sequence[Mapping[str, Any]], seed: int = 0) -> dict[str, Any]:
    """The report of measured rows, as JSON: `protocols`, with the metrics of each arm; `confidence` by signal; the most
    frequent `confusions`, and those of rows that no adapter fits and that are not unsure (`mistaken`); the median
    `milliseconds` of a selection by each arm; `tasks`, `rows`, and those whose prompt was `cut`.

    A metric's `value` is the mean over tasks of their rows' means, and its 95 % `interval` says how much it would vary
    with other tasks. Metrics are `top1`, `top3` and `mrr` of the target adapter's rank; `exact_match` (teacher-forced)
    and `nll` (nats per token) of gold texts; `score` of generated answers; and `of_target`, the mean of `score`, or
    else of `exact_match`, divided by that of the target adapter alone on the same tasks.

    If rows are worded in several ways, `wordings` has a report of each wording, and what `confidence` says of all rows
    is the mean of what it says within each: rows of a task that has an adapter are compared with those of others in the
    same wording.
    """
    report = _summary(records, seed)
    by_wording: dict[str, list[Mapping[str, Any]]] = {}
    for record in records:
        by_wording.setdefault(record.get("wording", ""), []).append(record)
    if len(by_wording) > 1:
        reports = {wording: _summary(of_wording, seed) for wording, of_wording in by_wording.items()}
        report["confidence"] = _mean_confidence([one["confidence"] for one in reports.values()])
        report["wordings"] = reports
    return report


def _mean_confidence(reports: Sequence[Mapping[str, Any]]) -> dict[str, Any]:
    """The `confidence` of several reports: of each number the mean of those that have it."""
    means: dict[str, Any] = {}
    for signal in dict.fromkeys(signal for report in reports for signal in report):
        parts = [report[signal] for report in reports if signal in report]
        errors = [part["error"] for part in parts if part["error"] is not None]
        means[signal] = {"error": float(np.mean(errors)) if errors else None}
        for name in ("mean", "sure", "auroc"):
            protocols = dict.fromkeys(protocol for part in parts for protocol in part[name])
            means[signal][name] = {
                protocol: float(np.mean([part[name][protocol] for part in parts if protocol in part[name]]))
                for protocol in protocols
            }
    return means


def _summary(records: Sequence[Mapping[str, Any]], seed: int) -> dict[str, Any]:
    """The report of rows, whatever their wordings are."""
    columns = _columns(records)
    quality = "score" if any("score" in metrics for metrics in columns.values()) else "exact_match"
    of_target = columns.get((IN_POOL, "target"), {}).get(quality, {})
    protocols: dict[str, dict[str, Any]] = {}
    for (protocol, arm), metrics in columns.items():
        numbers = {metric: _mean(tasks, seed) for metric, tasks in metrics.items()}
        if protocol != OUT_OF_POOL and quality in metrics and of_target:
            numbers["of_target"] = _ratio(metrics[quality], of_target, seed)
        protocols.setdefault(protocol, {})[arm] = numbers
    confidence = {arm: _confidence(columns, arm) for arm in dict.fromkeys(arm for _, arm in columns)}
    return {
        "protocols": protocols,
        "confidence": {arm: numbers for arm, numbers in confidence.items() if numbers is not None},
        "confusions": confusions(records),
        "mistaken": confusions(records, (REMOVED, OUT_OF_POOL), UNSURE),
        "milliseconds": _milliseconds(records),
        "tasks": len({record["task"] for record in records}),
        "rows": len(records),
        "cut": sum(record.get("cut", 0) > 0 for record in records),
    }


def _columns(records: Sequence[Mapping[str, Any]]) -> dict[tuple[str, str], dict[str, Tasks]]:
    """By protocol and arm, the numbers of each metric."""
    columns: dict[tuple[str, str], dict[str, Tasks]] = {}
    for record in records:
        for arm in record["arms"]:
            metrics = columns.setdefault((arm["protocol"], arm["arm"]), {})
            for metric, value in _metrics(arm).items():
                metrics.setdefault(metric, {}).setdefault(record["task"], []).append(value)
    return columns


def _milliseconds(records: Sequence[Mapping[str, Any]]) -> dict[str, float]:
    """The median time of a selection by each arm; a record has that of all its selections."""
    times: dict[str, list[float]] = {}
    for record in records:
        selections = Counter(arm["arm"] for arm in record["arms"])
        for name, seconds in record["seconds"].items():
            times.setdefault(name, []).append(1000 * seconds / selections[name])
    return {name: float(np.median(milliseconds)) for name, milliseconds in times.items()}


def _metrics(arm: Mapping[str, Any]) -> dict[str, float]:
    """The numbers of one arm on one row."""
    names = ("exact_match", "nll", "score", "confidence")
    numbers = {name: arm[name] for name in names if arm.get(name) is not None}
    if arm["protocol"] == IN_POOL and "first" in arm:
        place = arm["rank"] or float("inf")
        numbers |= {"top1": float(place <= 1), "top3": float(place <= 3), "mrr": 1 / place}
    return numbers


def _mean(tasks: Tasks, seed: int) -> dict[str, Any]:
    means = [sum(values) / len(values) for values in tasks.values()]
    return {"value": sum(means) / len(means), "interval": over_tasks(means, seed)}


def _ratio(tasks: Tasks, target: Tasks, seed: int) -> dict[str, Any]:
    """The ratio of two means over the same tasks, whose interval draws tasks for both."""
    pairs = np.array([[np.mean(tasks[name]), np.mean(target[name])] for name in tasks])  # (tasks, 2)
    mean, mean_of_target = pairs.mean(axis=0)
    if not mean_of_target:
        return {"value": None, "interval": None}
    places = np.random.default_rng(seed).integers(len(pairs), size=(DRAWS, len(pairs)))
    drawn = pairs[places].mean(axis=1)  # (draws, 2)
    ratios = drawn[drawn[:, 1] > 0, 0] / drawn[drawn[:, 1] > 0, 1]
    ends = [float(end) for end in np.percentile(ratios, [2.5, 97.5])] if len(pairs) >= FEWEST else None
    return {"value": float(mean / mean_of_target), "interval": ends}


def _confidence(columns: Mapping[tuple[str, str], Mapping[str, Tasks]], signal: str) -> dict[str, Any] | None:
    """How well the confidence of a signal tells rows whose target adapter is in the pool from others: its mean by
    protocol, the share that is not unsure, AUROC against each other protocol, and the calibration error; None: none."""
    values: dict[str, list[float]] = {}
    for protocol in PROTOCOLS:
        tasks = columns.get((protocol, signal), {}).get("confidence", {})
        if tasks:
            values[protocol] = [confidence for of_task in tasks.values() for confidence in of_task]
    in_pool = values.get(IN_POOL, [])
    if not in_pool:
        return None
    without_target = [*values.get(REMOVED, ()), *values.get(OUT_OF_POOL, ())]
    error = None
    if without_target:
        truth = [True] * len(in_pool) + [False] * len(without_target)
        error = calibration_error([*in_pool, *without_target], truth)
    return {
        "mean": {protocol: float(np.mean(of_protocol)) for protocol, of_protocol in values.items()},
        "sure": {protocol: float(np.mean(np.array(of_protocol) >= UNSURE)) for protocol, of_protocol in values.items()},
        "auroc": {
            protocol: auroc(in_pool, values[protocol]) for protocol in (REMOVED, OUT_OF_POOL) if protocol in values
        },
        "error": error,
    }


def confusions(
    records: Sequence[Mapping[str, Any]], protocols: Sequence[str] = (IN_POOL,), sure: float = 0.0
) -> dict[str, list[dict[str, Any]]]:
    """By arm, the pairs of a task and another adapter that comes first on its rows, at a confidence of `sure` or more;
    most rows first."""
    counts: dict[str, Counter[tuple[str, str]]] = {}
    rows = Counter(record["task"] for record in records)
    for record in records:
        for arm in record["arms"]:
            wrong = arm["protocol"] in protocols and arm.get("first") not in (None, record["task"])
            if wrong and (arm["confidence"] or 0.0) >= sure:
                counts.setdefault(arm["arm"], Counter())[record["task"], arm["first"]] += 1
    return {
        name: [
            {"task": task, "first": first, "rows": count, "of": rows[task]}
            for (task, first), count in pairs.most_common()
        ]
        for name, pairs in counts.items()
    }
