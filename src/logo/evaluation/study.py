"""Several signals compared on one pool: does each find the right adapter, and what is its mixture worth?

A row of `DIR/NAME.jsonl` belongs to the adapter of that name (an *own* task) or to none (an *unseen* task). On own
tasks the answer key is known: where the signal ranks the row's adapter, and how likely the gold completion is under
the signal's mixture, next to the oracle (that adapter alone), a uniform mixture and the base model. The same rows with
their own adapter left out, and the unseen tasks, say what a signal does when the pool holds nothing that fits.

Measuring is one record per row; everything that is reported follows from the records, so a journal of them is enough
to go on after an interruption.
"""

from __future__ import annotations

import fnmatch
import json
import os
import time
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from statistics import fmean
from typing import TYPE_CHECKING, Any

import numpy as np

from logo import __version__
from logo.errors import DataError, UsageError, closest
from logo.evaluation.datasets import Row, read_rows
from logo.evaluation.folders import replace_file
from logo.evaluation.intervals import estimate
from logo.evaluation.journal import Journal, fingerprint
from logo.evaluation.results import versions

if TYPE_CHECKING:
    from logo.engine import LoGo
    from logo.selection.selector import Selection

# "signals" or "mixtures" -> name -> metric -> value. Of one row, of a task, or of all tasks.
Section = dict[str, dict[str, dict[str, float]]]


@dataclass(frozen=True)
class Task:
    """One file of rows; `name` is what an adapter would be called that was made for it."""

    name: str
    file: Path
    rows: tuple[Row, ...]


@dataclass(frozen=True)
class Measured:
    """What is known of one row.

    Attributes:
        task: the task's name; `index`: the row's place in it.
        answers: every signal and fixed mixture; ranks (`top1`, `top3`, `mrr`) only of signals on own tasks.
        left_out: the same without the row's own adapter; None on unseen tasks.
        weights: signal -> its mixture.
        seconds: `select` by signal, and `score`.
    """

    task: str
    index: int
    answers: Section
    left_out: Section | None
    weights: dict[str, dict[str, float]]
    seconds: dict[str, Any] = field(default_factory=dict)


@dataclass(frozen=True)
class Study:
    """A finished study: the `report` as JSON holds it, and the rows it was made from."""

    report: dict[str, Any]
    rows: tuple[Measured, ...]


def find_tasks(folder: str | os.PathLike[str], request: str = "", limit: int | None = None) -> list[Task]:
    """The tasks in a folder of JSONL files, sorted by name, every line checked.

    Names are relative paths without `.jsonl`, as adapters are named by their relative paths; hidden files are left
    alone.

    Args:
        request: names or patterns (`glue*`), separated by commas; empty: all.
        limit: only the first rows of each.

    Raises:
        DataError: no such folder, no files, no such task, or a malformed line (names the file and the line).
        UsageError: a limit below 1.
    """
    root = Path(folder)
    if not root.is_dir():
        found = "a file" if root.exists() else "nothing"
        raise DataError(f"rows folder {str(root)!r}: expected a folder with NAME.jsonl files, found {found}")
    files = {path.relative_to(root).as_posix().removesuffix(".jsonl"): path for path in root.rglob("*.jsonl")}
    names = sorted(name for name in files if not any(part.startswith(".") for part in name.split("/")))
    if not names:
        raise DataError(f"rows folder {str(root)!r}: expected files NAME.jsonl, found none")
    wanted = [item.strip() for item in request.split(",") if item.strip()] or ["*"]
    for item in wanted:
        if not fnmatch.filter(names, item):
            raise DataError(f"task {item!r}: no such file in {str(root)!r}{closest(item, names)}")
    chosen = [name for name in names if any(fnmatch.fnmatchcase(name, item) for item in wanted)]
    return [Task(name, files[name], tuple(read_rows(files[name], limit))) for name in chosen]


def study(
    engines: Mapping[str, LoGo],
    tasks: Sequence[Task],
    journal_file: Path,
    *,
    settings: Mapping[str, object],
    seed: int = 0,
    loading: float = 0.0,
    on_progress: Callable[[str], None] | None = None,
) -> Study:
    """Measures every row that the journal does not hold yet, and reports.

    Args:
        engines: one per signal, by name, on one model and one pool.
        tasks: what `find_tasks` found.
        journal_file: see `logo.evaluation.journal`; stays until the caller removes it, after writing the report.
        settings: what was asked for, to be recorded. What it holds under `base_model` must not change in a resumed
            study; nor may the pool, the rows and the engines' settings.
        seed: of the bootstrap.
        loading: seconds it took to make the engines.
        on_progress: gets the task's name after each row, those of the journal included.

    Raises:
        UsageError: the journal is another study's.
        DataError: a row cannot be scored (names the file and the line).
    """
    settings = {**settings, **_engine_settings(engines), "seed": seed}
    run = fingerprint(_identity(engines, tasks, settings))
    # Under "carry" a selection depends on the rows before, so there is no going on in the middle.
    if any(logo.settings.probe_context == "carry" for logo in engines.values()):
        journal_file.unlink(missing_ok=True)
    with Journal(journal_file, run) as journal:
        rows = [Measured(**record) for record in journal.records]
        done = {(row.task, row.index) for row in rows}
        for task in tasks:
            for index, row in enumerate(task.rows):
                if (task.name, index) not in done:
                    measured = _measure(engines, task, index, row)
                    journal.append(asdict(measured))
                    rows.append(measured)
                if on_progress is not None:
                    on_progress(task.name)
    names = next(iter(engines.values())).names
    report = summary(rows, names, seed=seed)
    report |= {"settings": settings, "seconds": _seconds(rows, loading), "versions": versions()}
    return Study(report, tuple(rows))


def write_report(file: Path, report: Mapping[str, object]) -> None:
    """Writes the report as JSON, complete or not at all.

    Raises:
        StorageError: the file cannot be written.
    """
    replace_file(file, (json.dumps(report, indent=2, ensure_ascii=False) + "\n").encode())


# -- measuring one row ------------------------------------------------------------------------------------------


def _measure(engines: Mapping[str, LoGo], task: Task, index: int, row: Row) -> Measured:
    scorer = next(iter(engines.values()))
    picked, seconds = {}, {}
    for signal, logo in engines.items():
        started = time.perf_counter()
        picked[signal] = logo.select(row.context)
        seconds[signal] = time.perf_counter() - started
    own = task.name if task.name in scorer.names else None
    mixtures = _fixed_mixtures(scorer.names, own)
    left_out = None if own is None else _without(engines, picked, own)
    signals = {signal: selection.mixture for signal, selection in picked.items()}
    plan = {
        (part, kind, name): mixture
        for part, kinds in (("answers", {"signals": signals, "mixtures": mixtures}), ("left_out", left_out or {}))
        for kind, named in kinds.items()
        for name, mixture in named.items()
    }
    started = time.perf_counter()
    gold = row.completion if isinstance(row.completion, str) else row.completion[0]
    try:
        scored = scorer.score(row.context, gold, list(plan.values()))
    except UsageError as error:
        raise DataError(f"{task.file}:{index + 1}: {error}") from error
    parts: dict[str, Section] = {"answers": {}, "left_out": {}}
    for (part, kind, name), value in zip(plan, scored, strict=True):
        metrics = {"exact_match": float(value.exact_match), "nll": value.nll}
        if part == "answers" and kind == "signals" and own is not None:
            metrics = rank_metrics(picked[name].scores, own) | metrics
        parts[part].setdefault(kind, {})[name] = metrics
    return Measured(
        task=task.name,
        index=index,
        answers=parts["answers"],
        left_out=parts["left_out"] or None,
        weights=signals,
        seconds={"select": seconds, "score": time.perf_counter() - started},
    )


def rank_metrics(scores: Mapping[str, float], own: str) -> dict[str, float]:
    """`top1`, `top3` and the reciprocal rank `mrr` of one adapter; ties count against it, and so does no score."""
    if own not in scores:
        return {"top1": 0.0, "top3": 0.0, "mrr": 0.0}
    rank = sum(score >= scores[own] for score in scores.values())
    return {"top1": float(rank <= 1), "top3": float(rank <= 3), "mrr": 1 / rank}


def _fixed_mixtures(names: Sequence[str], own: str | None) -> dict[str, dict[str, float]]:
    oracle = {} if own is None else {"oracle": {own: 1.0}}
    return {**oracle, "uniform": dict.fromkeys(names, 1 / len(names)), "base": {}}


def _without(
    engines: Mapping[str, LoGo], picked: Mapping[str, Selection], own: str
) -> dict[str, dict[str, dict[str, float]]] | None:
    """What is mixed when the row's own adapter is not in the pool; None if nothing is left to choose from."""
    if any(set(selection.scores) <= {own} for selection in picked.values()):
        return None
    signals = {name: logo.reselect(picked[name].scores, [own]).mixture for name, logo in engines.items()}
    names = [name for name in next(iter(engines.values())).names if name != own]
    return {"signals": signals, "mixtures": _fixed_mixtures(names, None)}


# -- from rows to a report --------------------------------------------------------------------------------------


def summary(rows: Iterable[Measured], pool: Sequence[str], *, seed: int = 0) -> dict[str, Any]:
    """The numbers of a study: `signals`, `mixtures`, `left_out`, `unseen`, `tasks` and `pool`; None without rows.

    Args:
        rows: in any order.
        pool: the adapters' names; tasks of these names are own tasks.
        seed: of the bootstrap.
    """
    tasks: dict[str, list[Measured]] = {}
    for row in sorted(rows, key=lambda row: (row.task, row.index)):
        tasks.setdefault(row.task, []).append(row)
    own = {name: measured for name, measured in tasks.items() if name in set(pool)}
    answers = section([[row.answers for row in measured] for measured in own.values()], seed)
    left_out = [[row.left_out for row in measured if row.left_out is not None] for measured in own.values()]
    unseen = [[row.answers for row in measured] for name, measured in tasks.items() if name not in own]
    return {
        "signals": answers and answers["signals"],
        "mixtures": answers and answers["mixtures"],
        "left_out": section(left_out, seed),
        "unseen": section(unseen, seed),
        "tasks": {name: _of_task(measured) for name, measured in tasks.items()},
        "pool": list(pool),
    }


def section(tasks: Sequence[Sequence[Section]], seed: int = 0) -> dict[str, dict[str, dict[str, Any]]] | None:
    """Means over tasks of rows that all have the same metrics, with `intervals`; None without rows."""
    tasks = [rows for rows in tasks if rows]
    if not tasks:
        return None
    keys = [
        (kind, name, metric)
        for kind, named in tasks[0][0].items()
        for name, metrics in named.items()
        for metric in metrics
    ]
    values = [np.array([[row[kind][name][metric] for kind, name, metric in keys] for row in rows]) for rows in tasks]
    found = estimate(values, seed=seed)
    report: dict[str, dict[str, dict[str, Any]]] = {}
    for column, (kind, name, metric) in enumerate(keys):
        entry = report.setdefault(kind, {}).setdefault(name, {"intervals": {}})
        entry[metric] = float(found.mean[column])
        entry["intervals"][metric] = [float(found.low[column]), float(found.high[column])]
    # The numbers first, their intervals last.
    for named in report.values():
        for entry in named.values():
            entry["intervals"] = entry.pop("intervals")
    return report


def mean_weights(rows: Iterable[Measured], signal: str) -> dict[str, dict[str, float]]:
    """Task -> adapter -> mean weight over the task's rows, for one signal; adapters never selected are absent."""
    tasks: dict[str, list[dict[str, float]]] = {}
    for row in rows:
        tasks.setdefault(row.task, []).append(row.weights[signal])
    return {
        task: {name: fmean(w.get(name, 0.0) for w in weights) for name in sorted({n for w in weights for n in w})}
        for task, weights in sorted(tasks.items())
    }


def _of_task(rows: Sequence[Measured]) -> dict[str, Any]:
    report: dict[str, Any] = {"rows": len(rows), **_plain_means([row.answers for row in rows])}
    left_out = [row.left_out for row in rows if row.left_out is not None]
    return report | ({"left_out": _plain_means(left_out)} if left_out else {})


def _plain_means(rows: Sequence[Section]) -> Section:
    return {
        kind: {
            name: {metric: fmean(row[kind][name][metric] for row in rows) for metric in metrics}
            for name, metrics in named.items()
        }
        for kind, named in rows[0].items()
    }


# -- what it stands on ------------------------------------------------------------------------------------------


def _engine_settings(engines: Mapping[str, LoGo]) -> dict[str, Any]:
    model = next(iter(engines.values())).model
    signals = {
        name: {**asdict(logo.settings), "points": [f"{point.module}" for point in logo._router.points]}
        for name, logo in engines.items()
    }
    return {"dtype": str(model.dtype).removeprefix("torch."), "device": str(model.device), "signals": signals}


def _identity(engines: Mapping[str, LoGo], tasks: Sequence[Task], settings: Mapping[str, object]) -> dict[str, object]:
    """Everything that a row's record depends on. Devices agree to rounding, and that is enough."""
    scorer = next(iter(engines.values()))
    digests = scorer.pool.sha256()
    return {
        "logo": __version__,
        **{key: settings.get(key) for key in ("base_model", "dtype", "signals")},
        "pool": {name: digests[name] for name in scorer.names},
        "rows": {task.name: [asdict(row) for row in task.rows] for task in tasks},
    }


def _seconds(rows: Iterable[Measured], loading: float) -> dict[str, Any]:
    select: dict[str, float] = {}
    score = 0.0
    for row in rows:
        score += row.seconds["score"]
        for signal, seconds in row.seconds["select"].items():
            select[signal] = select.get(signal, 0.0) + seconds
    return {"loading": loading, "select": select, "score": score}
