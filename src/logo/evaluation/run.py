"""`answer_datasets`: datasets through an `Answerer`, each into a result folder.

    datasets -> done already, unfinished or new -> blocks of missing rows -> `Answerer.answer` -> rows.jsonl -> files

Blocks are answered in this process, or by workers (`logo.cluster`), which get the same blocks in any order.
"""

from __future__ import annotations

import warnings
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import closing
from dataclasses import dataclass, field, replace
from datetime import datetime, timezone
from pathlib import Path
from typing import TYPE_CHECKING, Any

from logo.baselines.method import Method
from logo.baselines.target import target_adapters
from logo.errors import LoGoError, UsageError
from logo.evaluation.answer import Answerer, Facts, dataset_identity, task_of
from logo.evaluation.metrics import by_measure, extra, judge, load, scale_of
from logo.evaluation.results import RUN, Partial, check_begun, differences, is_done, official_files, read_run
from logo.evaluation.statistics import means
from logo.recorded import versions

if TYPE_CHECKING:
    from logo.evaluation.datasets import Dataset

Block = tuple["Dataset", range]
Answered = tuple[list[dict[str, Any]], Mapping[str, Any]]  # the records of a block, and what the method found out
Work = Callable[[Iterable[Block]], Iterable[tuple[Block, Answered]]]  # blocks -> each with what came of it


@dataclass(frozen=True)
class Done:
    """The result of one dataset, in `folder`; `skipped`: it was there before, and `note` says under which other
    versions."""

    dataset: str
    folder: Path
    skipped: bool
    note: str = ""


def in_this_process(answerer: Answerer) -> Work:
    """Answers blocks one after the other."""
    return lambda blocks: ((block, answerer.answer(*block)) for block in blocks)


@dataclass(frozen=True)
class Run:
    """How datasets are answered, and where results are written.

    Attributes:
        folder: of the run; results are in `folder / dataset`.
        facts: of the engine that answers.
        work: answers blocks of rows with it.
        method: selects for it; None: the engine selects.
        batch_size: rows that are answered together.
        overwrite: begin again, also where there is a result.
        loading: seconds that opening the engine took.
        command: of the user, for `run.json`.
        tell: called with a dataset and the number of its rows that are done.
    """

    folder: Path
    facts: Facts
    work: Work
    method: Method | None = None
    batch_size: int = 1
    overwrite: bool = False
    loading: float = 0.0
    command: Mapping[str, Any] = field(default_factory=dict)
    tell: Callable[[Dataset, int], None] = lambda dataset, done: None


def answer_datasets(datasets: Sequence[Dataset], run: Run) -> Iterator[Done]:
    """Answers datasets that are not done yet, and yields each when its result is there.

    Raises:
        UsageError: a result or an unfinished one is another run's, before anything is answered; or, before its own
            rows are, another process works on it.
        DataError: the method is `target`, and a dataset has no adapter, before anything is answered.
        LoGoError: the first rows (a whole batch, at least two) are refused for the same reason, which is not that no
            adapter is made for them.
        StorageError: a result cannot be written.
    """
    if run.method is not None and run.method.needs == "target":
        for dataset in datasets:
            target_adapters(task_of(dataset), list(run.facts.identity["pool"]))
    plans = [_DatasetPlan.of(dataset, run) for dataset in datasets]
    for plan in plans:
        if not (plan.was_done or run.overwrite):
            check_begun(plan.folder, plan.begun)
        load(plan.dataset.metric)
    for plan in plans:
        skipped = plan.was_done or not _answered(plan, run)
        changes = differences(run.facts.environment, read_run(plan.folder)["environment"]) if skipped else []
        note = ", ".join(f"{name} {was} (now {now})" for name, now, was in changes)
        yield Done(plan.dataset.name, plan.folder, skipped, note)


@dataclass(frozen=True)
class _DatasetPlan:
    """What is to be done for one dataset.

    Attributes:
        folder: of its result.
        identity: what the result depends on.
        begun: what an unfinished result depends on: the environment, too, and not the metric, by which answers that
            are there are judged anew.
        was_done: whether the result is there.
    """

    dataset: Dataset
    folder: Path
    identity: Mapping[str, Any]
    begun: Mapping[str, Any]
    was_done: bool = False

    @classmethod
    def of(cls, dataset: Dataset, run: Run) -> _DatasetPlan:
        """The plan for a dataset."""
        identity = {**run.facts.identity, **dataset_identity(dataset, run.method)}
        begun = {name: value for name, value in identity.items() if name not in ("metric", "metric_plugin")}
        begun["environment"] = dict(run.facts.environment)
        plan = cls(dataset, run.folder / dataset.name, identity, begun)
        return plan if run.overwrite else replace(plan, was_done=plan.is_done())

    def is_done(self) -> bool:
        """Whether the result is there by now; errors as `results.is_done`."""
        return is_done(self.folder, self.identity, self.begun)


def _answered(plan: _DatasetPlan, run: Run) -> bool:
    """Answers the rows of a dataset and writes its result; False if another process has done it meanwhile."""
    dataset = plan.dataset
    started = datetime.now(timezone.utc)
    stands = None if run.overwrite else plan.is_done
    fresh = run.overwrite or run.facts.order is not None  # a row that depends on those before it cannot be continued
    with closing(Partial(plan.folder, plan.begun, fresh=fresh, stands=stands)) as partial:
        if partial.done:
            return False
        for index, record in partial.records.items():
            gold = dataset.rows[index].completion
            record["value"] = judge(dataset.metric, record["prediction"], gold, failed=bool(record["error"]))
        found_out = _answer_missing(dataset, partial, run)
        records = [partial.records[index] for index in range(len(dataset.rows))]
        adapters = {name for record in records for name in record["scores"]}
        columns = [name for name in run.facts.identity["pool"] if name in adapters]
        about = {
            "date": started.isoformat(timespec="seconds"),
            "device": run.facts.device,
            "command": dict(run.command),
            "settings": dict(run.facts.settings),
            "identity": dict(plan.identity),
            "environment": dict(run.facts.environment),
            "versions": versions(),
            "found_out": dict(found_out),
            "score_columns": columns,
        }
        files = official_files(records, run.facts.signal, run.loading, columns)
        partial.finish({**files, RUN: {**_scored(dataset, records), **about}})
    return True


def _scored(dataset: Dataset, records: Sequence[Mapping[str, Any]]) -> dict[str, Any]:
    """What `run.json` says of the answers: seconds, dataset, metric and scores."""
    measured = by_measure(dataset.metric, [record["value"] for record in records])
    scale = scale_of(dataset.metric)
    predictions = [record["prediction"] for record in records]
    more = extra(dataset.metric, predictions, [row.golds for row in dataset.rows])
    return {
        "duration": sum(record["seconds"]["inference"] for record in records),
        "dataset": {"name": dataset.name, "file": str(dataset.file), "rows": len(dataset.rows)},
        "metric": dataset.metric,
        "scale": scale,
        "scores": {**means(measured, scale), "extra": more},
    }


def _answer_missing(dataset: Dataset, partial: Partial, run: Run) -> Mapping[str, Any]:
    """Answers the missing rows; returns what the method found out about the dataset."""
    waiting: list[dict[str, Any]] = []  # until a row has an answer: the run may fail in all of them
    first_rows = set(range(max(2, min(run.batch_size, len(dataset.rows)))))  # workers answer in any order
    found_out: Mapping[str, Any] = {}
    run.tell(dataset, len(partial.records))
    missing: Iterable[range] = blocks(dataset, partial.records, run.batch_size)
    if len(partial.records) == len(dataset.rows):
        missing = [range(0)]  # the method is asked for no row, to find out again what it knows
    for _, (records, record_of_method) in run.work((dataset, block) for block in missing):
        found_out = record_of_method
        waiting += records
        if not partial.records and _is_refused(waiting):
            if {record["index"] for record in waiting} >= first_rows:
                raise LoGoError(f"dataset {dataset.name!r}: {waiting[0]['error']}")
            if len(waiting) < len(dataset.rows):
                continue
        partial.add(waiting)
        waiting = []
        run.tell(dataset, len(partial.records))
    return found_out


def _is_refused(records: Sequence[Mapping[str, Any]]) -> bool:
    """Whether all rows are refused for the same reason; where it is that no adapter fits, they have a confidence."""
    errors = {record["error"] for record in records}
    return len(errors) == 1 and None not in errors and records[0].get("confidence") is None


def blocks(dataset: Dataset, answered: Mapping[int, object], size: int) -> Iterator[range]:
    """The rows of a dataset that are not answered, in blocks of at most `size`, cut where a run without answered rows
    cuts them."""
    for start in range(0, len(dataset.rows), size):
        first = start
        end = min(start + size, len(dataset.rows))
        for index in range(start, end + 1):
            if index == end or index in answered:
                if first < index:
                    yield range(first, index)
                first = index + 1


def warn_of_copies(dataset: Dataset, method: Method | None) -> None:
    """Warns if a method learns from rows that are tested, too."""
    if method is None or method.needs != "train":
        return
    tested = {row.context for row in dataset.rows}
    shared = sum(row.context in tested for row in dataset.train)
    if shared:
        warnings.warn(
            f"dataset {dataset.name!r}: {shared} of {len(dataset.train)} training rows are test rows too, and method "
            f"{method.name!r} chose by them: the result may be too good",
            UserWarning,
            stacklevel=2,
        )


def check_workers(facts: Facts) -> None:
    """Raises UsageError where rows depend on those before them, so that several processes cannot answer them."""
    if facts.order is not None:
        raise UsageError(f"workers: a row's result must not depend on other rows, but {facts.order}")
