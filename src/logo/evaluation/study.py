"""A study: signals and methods compared on one pool by how often they find the right adapter and by the quality of
their mixtures.

A row of `DIR/NAME.jsonl` belongs to the adapter of that name (an *own* task) or to none (an *unseen* task). For own
tasks the right adapter is known: a study measures the rank that a signal gives it, and the likelihood of the gold
completion under the signal's mixture, beside the oracle (that adapter alone), a uniform mixture and the base model. The
same rows with their own adapter left out, and the unseen tasks, show what a signal does if the pool holds nothing that
fits.

There is one record per row and one per lesson. The report follows from the records, so a journal of them is enough to
continue after an interruption.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Collection, Iterable, Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any, Protocol

from logo.baselines.registry import may_select_by_signal
from logo.errors import StorageError, UsageError
from logo.evaluation.contest import Contest, Lesson, Lessons
from logo.evaluation.datasets import Dataset
from logo.evaluation.differences import described, differences
from logo.evaluation.identity import rows_digest
from logo.evaluation.journal import Journal, written
from logo.evaluation.relative import relative
from logo.evaluation.reliability import reliability
from logo.evaluation.results import versions
from logo.evaluation.runner import summed
from logo.evaluation.summary import Measured, summary
from logo.evaluation.tables import counted
from logo.rows import Row

_REPLACED = "; --overwrite replaces it, another --save keeps both"


@dataclass(frozen=True)
class Study:
    """A finished study.

    Attributes:
        report: as JSON.
        rows: what was measured; none if the report was read from its file.
        note: the differences of the environment in which that one was measured, in words.
    """

    report: dict[str, Any]
    rows: tuple[Measured, ...]
    note: str = ""


def cut(
    tasks: Sequence[Dataset], limit: int | None = None, hold_out: int = 0
) -> tuple[list[Dataset], dict[str, tuple[Row, ...]]]:
    """The tasks with their first rows, and by name the last `hold_out` rows of each, which are not among these.

    Raises:
        UsageError: a limit below 1, or a task that has no rows left.
    """
    if limit is not None and limit < 1:
        raise UsageError(f"limit {limit}: expected at least 1 row; leave it out for all rows")
    for task in tasks:
        if len(task.rows) <= hold_out:
            raise UsageError(
                f"hold-out {hold_out}: task {task.name!r} has {len(task.rows)} rows, expected more; hold out fewer, or "
                "leave the task out with --tasks"
            )
    ends = {task.name: len(task.rows) - hold_out for task in tasks}
    asked = [replace(task, rows=task.rows[: ends[task.name]][:limit]) for task in tasks]
    return asked, {task.name: task.rows[ends[task.name] :] for task in tasks} if hold_out else {}


@dataclass(frozen=True)
class Facts:
    """The recorded facts of the compared engines, in a form that can be sent to another process.

    Attributes:
        names: of the adapters.
        pool: their SHA-256 by name.
        settings: dtype, device, whether mixtures are merged, if it was asked for, and the settings of each signal.
        digests: of the base model (`logo.evaluation.identity.digests`).
        environment: see `logo.evaluation.identity.environment`.
        in_order: whether a selection depends on earlier prompts.
    """

    names: tuple[str, ...]
    pool: Mapping[str, str]
    settings: Mapping[str, Any]
    digests: Mapping[str, Any]
    environment: Mapping[str, str]
    in_order: bool


class Measuring(Protocol):
    """What measures rows; in this process `logo.evaluation.arms.Arms`."""

    @property
    def facts(self) -> Facts: ...

    def learn(self, lessons: Iterable[Lesson]) -> Iterator[tuple[Lesson, Mapping[str, Any]]]:
        """Each lesson with the state that its method has learnt, in any order."""

    def __call__(self, rows: Iterable[tuple[Dataset, int]], lessons: Lessons) -> Iterator[Measured]:
        """A record for each row of a task, in any order."""


def study(
    measuring: Measuring,
    tasks: Sequence[Dataset],
    journal_file: Path,
    *,
    settings: Mapping[str, object],
    contest: Contest | None = None,
    seed: int = 0,
    loading: float = 0.0,
    finished: Path | None = None,
    overwrite: bool = False,
    on_progress: Callable[[str], None] | None = None,
    on_lesson: Callable[[Lesson], None] | None = None,
) -> Study:
    """Learns and measures what the journal does not hold yet, and reports.

    Args:
        measuring: measures rows.
        tasks: of a folder (`logo.evaluation.datasets.find_datasets`).
        journal_file: see `logo.evaluation.journal`; stays until the caller removes it, after writing the report.
        settings: what was asked for, to be recorded. What it holds under `base_model` must not change in a resumed
            study; nor may the pool, the rows, the contest and the engines' settings.
        contest: what `measuring` asks of every row.
        seed: of the bootstrap.
        loading: seconds it took to make the engines.
        finished: where the report will be written. If this study's is there already, and no row was measured since, it
            is returned.
        overwrite: drop the journal and ignore that report.
        on_progress: gets the task's name after each row, those of the journal included; `on_lesson` likewise.

    Raises:
        UsageError: the journal or the report is another study's, or the contest asks for no row.
        DataError: a row cannot be scored (names the file and the line).
    """
    facts, contest = measuring.facts, contest or Contest()
    tell, taught = on_progress or (lambda name: None), on_lesson or (lambda lesson: None)
    asked = contest.as_dict()
    if any(may_select_by_signal(method) for method in contest.methods.values()):
        asked["methods_signal"] = next(iter(facts.settings["signals"]))  # see `logo.evaluation.arms.Arms`
    settings = {**settings, **facts.settings, **asked, "seed": seed}
    tasks = asked_of(tasks, contest, facts.names)
    run = _identity(facts, tasks, settings, tuple(asked))
    if finished is not None and not overwrite and not is_begun(journal_file) and finished.exists():
        return _written_before(finished, {**run, "seed": seed})
    if facts.in_order and not overwrite:
        Journal(journal_file, run).close()  # refused if it is another study's
    # A study whose rows depend on each other cannot continue in the middle.
    with Journal(journal_file, run, fresh=facts.in_order or overwrite) as journal:
        lessons = {Lesson(*one["lesson"]): one["learnt"] for one in journal.records if "lesson" in one}
        records = (Measured(**record) for record in journal.records if "lesson" not in record)
        rows = {(row.task, row.index): row for row in records}
        for lesson in lessons:
            taught(lesson)
        for name, _ in rows:
            tell(name)
        wanted = contest.lessons([task.name for task in tasks], facts.names)
        for lesson, learnt in measuring.learn(lesson for lesson in wanted if lesson not in lessons):
            journal.append({"lesson": list(lesson), "learnt": dict(learnt)})
            lessons[lesson] = learnt
            taught(lesson)
        every = [(task, index) for task in tasks for index in range(len(task.rows))]
        # The first rows of all tasks come first, so that an unfinished study is a smaller study of all tasks.
        order = every if facts.in_order else sorted(every, key=lambda one: one[1])
        missing = ((task, index) for task, index in order if (task.name, index) not in rows)
        for measured in measuring(missing, lessons):
            journal.append(asdict(measured))
            rows[measured.task, measured.index] = measured
            tell(measured.task)
    done = _reported([rows[task.name, index] for task, index in every], lessons, facts.names, settings, seed, loading)
    return replace(done, report={**done.report, "run": {**run, "seed": seed}})


def study_so_far(journal_file: Path, seed: int = 0) -> Study:
    """The report of the rows that an unfinished study has measured so far; the study may still be running. Needs no
    engine.

    Raises:
        UsageError: there is no journal, or it has no measured row yet.
    """
    found = written(journal_file)
    records = [] if found is None else found.records
    rows = [Measured(**record) for record in records if "lesson" not in record]
    lessons = {Lesson(*one["lesson"]): one["learnt"] for one in records if "lesson" in one}
    if found is None or not rows:
        learnt = f", but {counted(len(lessons), 'lesson')}, which come before the rows" if lessons else ""
        raise UsageError(f"journal {journal_file}: expected measured rows of an unfinished study, found none{learnt}")
    settings = {"so_far": len(rows), **{name: found.run[name] for name in found.run if name not in ("pool",)}}
    ordered = sorted(rows, key=lambda row: (row.task, row.index))
    return _reported(ordered, lessons, tuple(found.run["pool"]), settings, seed, 0.0)


def _reported(
    rows: Sequence[Measured],
    lessons: Lessons,
    names: Sequence[str],
    settings: Mapping[str, object],
    seed: int,
    loading: float,
) -> Study:
    report = summary(rows, names, seed=seed)
    report |= {"confidence": found} if (found := reliability(rows)) else {}
    if {"protocols", "methods", "generate"} & set(settings):
        report["relative"] = relative(rows, names, generated="generate" in settings, seed=seed)
    if lessons:
        report["learnt"] = [{**lesson._asdict(), "found": lessons[lesson]} for lesson in sorted(lessons)]
    report |= {"settings": dict(settings), "seconds": _seconds(rows, loading), "versions": versions()}
    return Study(report, tuple(rows))


def is_begun(journal_file: Path) -> bool:
    """Whether a study has measured or learnt something that no report has yet."""
    found = written(journal_file)
    return found is not None and bool(found.records)


def report_in(file: Path) -> dict[str, Any]:
    """The report of a study in a file.

    Raises:
        UsageError: the file holds something else.
        StorageError: it cannot be read.
    """
    try:
        report = json.loads(file.read_text(encoding="utf-8"))
    except OSError as error:
        raise StorageError(f"{file}: it cannot be read: {error}") from error
    except ValueError:
        report = None
    if not isinstance(report, dict) or not isinstance(report.get("run"), dict):
        raise UsageError(f"{file}: it is no report of a study{_REPLACED}")
    return report


def _written_before(file: Path, run: Mapping[str, Any]) -> Study:
    """The study whose report is in a file, if it is that of this run, whatever it ran on.

    Raises:
        UsageError: it is not.
    """
    report, asked = report_in(file), json.loads(json.dumps(run, default=str))
    before = {**report["run"]}
    then, now = before.pop("environment", {}), asked.pop("environment")
    if found := differences(asked, before):
        raise UsageError(f"{file}: it is the report of another study ({described(found)}){_REPLACED}")
    return Study(report, (), described(differences(now, then)))


def asked_of(tasks: Sequence[Dataset], contest: Contest, names: Collection[str]) -> list[Dataset]:
    """The tasks whose rows a contest measures, with a pool of these adapters.

    Raises:
        UsageError: there are none.
    """
    found = [task for task in tasks if contest.asks(task.name, names)]
    if not found:
        raise UsageError(
            f"protocol {','.join(contest.protocols)}: expected rows that it asks for, found none: "
            f"{sum(task.name in names for task in tasks)} of {len(tasks)} tasks have an adapter of their own"
        )
    return found


def journal_of(report: Path) -> Path:
    """The journal of an unfinished study, beside its report."""
    return report.with_name(f"{report.name}.partial.jsonl")


# -- what it is based on ----------------------------------------------------------------------------------------


def _identity(
    facts: Facts, tasks: Sequence[Dataset], settings: Mapping[str, object], more: Sequence[str]
) -> dict[str, object]:
    """Everything that a row's record depends on; `more`: settings that count beside the usual ones."""
    return {
        "environment": facts.environment,
        **facts.digests,
        **{key: settings.get(key) for key in ("base_model", "dtype", "signals", *more)},
        **({"merge": settings["merge"]} if "merge" in settings else {}),
        "pool": facts.pool,
        "rows_sha256": {task.name: rows_digest(task.rows) for task in tasks},
    }


def _seconds(rows: Sequence[Measured], loading: float) -> dict[str, Any]:
    others = ({what: spent for what, spent in row.seconds.items() if what != "select"} for row in rows)
    return {"loading": loading, "select": summed(row.seconds["select"] for row in rows), **summed(others)}
