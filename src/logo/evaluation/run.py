"""`evaluate`: datasets through an `Answerer`, each into a result folder.

    datasets -> done already, unfinished or new -> blocks of missing rows -> `Answerer.answer` -> rows.jsonl -> files

Blocks are answered in this process, or by workers (`logo.cluster`), which get the same blocks in any order.
"""

from __future__ import annotations

import functools
import warnings
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import closing
from dataclasses import dataclass
from datetime import datetime, timezone
from pathlib import Path
from typing import TYPE_CHECKING, Any

from logo.baselines.method import Method
from logo.errors import LoGoError, UsageError
from logo.evaluation.answer import Answerer, Facts, dataset_identity
from logo.evaluation.metrics import by_measure, extra, judge, load
from logo.evaluation.results import RUN, Partial, check_begun, differences, is_done, official_files, read_run
from logo.evaluation.statistics import scores
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


def evaluate(
    datasets: Sequence[Dataset],
    folder: Path,
    facts: Facts,
    work: Work,
    *,
    method: Method | None = None,
    batch_size: int = 1,
    overwrite: bool = False,
    loading: float = 0.0,
    command: Mapping[str, Any] | None = None,
    tell: Callable[[Dataset, int], None] = lambda dataset, done: None,
) -> Iterator[Done]:
    """Answers datasets that are not done yet, and yields each when its result is there.

    Args:
        folder: of the run; results are in `folder / dataset`.
        facts: of the engine that answers; `work`: answers blocks of rows with it; `method`: selects for it.
        batch_size: rows that are answered together.
        overwrite: begin again, also where there is a result.
        loading: seconds that opening the engine took.
        command: of the user, for `run.json`.
        tell: called with a dataset and the number of its rows that are done.

    Raises:
        UsageError: a result or an unfinished one is another run's, before anything is answered; or, before its own
            rows are, another process works on it.
        LoGoError: the first rows (a whole batch, at least two) are refused for the same reason, which is not that no
            adapter is made for them.
        StorageError: a result cannot be written.
    """
    plans = []
    # Rows that depend on those before them cannot be continued in the middle.
    fresh = overwrite or facts.order is not None
    for dataset in datasets:
        identity = {**facts.identity, **dataset_identity(dataset, method)}
        # Another metric judges the answers anew.
        begun = {name: value for name, value in identity.items() if name not in ("metric", "metric_plugin")}
        begun["environment"] = dict(facts.environment)
        stands = None if overwrite else functools.partial(is_done, folder / dataset.name, identity, begun)
        done = stands is not None and stands()
        if not (done or overwrite):
            check_begun(folder / dataset.name, begun)
        plans.append((dataset, identity, begun, stands, done))
        load(dataset.metric)
    for dataset, identity, begun, stands, done in plans:
        place = folder / dataset.name
        if not done:
            started = datetime.now(timezone.utc)
            # Another run may have finished or begun it while those before it were answered.
            with closing(Partial(place, begun, fresh=fresh, stands=stands)) as partial:
                done = partial.done
                if not done:
                    for index, one in partial.records.items():
                        answer, gold = one["prediction"], dataset.rows[index].completion
                        one["value"] = judge(dataset.metric, answer, gold, failed=bool(one["error"]))
                    found_out = _answer(dataset, partial, work, batch_size, tell)
                    records = [partial.records[index] for index in range(len(dataset.rows))]
                    about = {
                        **{"date": started.isoformat(timespec="seconds"), "device": facts.device},
                        **{"command": dict(command or {}), "settings": dict(facts.settings), "identity": identity},
                        **{"environment": dict(facts.environment), "versions": versions()},
                        "found_out": dict(found_out),
                    }
                    partial.finish(_files(dataset, records, facts, loading, about))
        other = differences(facts.environment, read_run(place)["environment"]) if done else []
        yield Done(dataset.name, place, done, ", ".join(f"{name} {there} (now {here})" for name, here, there in other))


def _files(
    dataset: Dataset, records: Sequence[dict[str, Any]], facts: Facts, loading: float, about: Mapping[str, Any]
) -> dict[str, object]:
    """The files of a result: the official ones, and `run.json`, with what is known `about` the run."""
    scored = {name for one in records for name in one["scores"]}
    columns = [name for name in facts.identity["pool"] if name in scored]
    values, golds = [one["value"] for one in records], [row.golds for row in dataset.rows]
    more = extra(dataset.metric, [one["prediction"] for one in records], golds)
    run = {
        "duration": sum(one["seconds"]["inference"] for one in records),
        "dataset": {"name": dataset.name, "file": str(dataset.file), "rows": len(dataset.rows)},
        "metric": dataset.metric,
        "scores": {**scores(by_measure(dataset.metric, values)), "extra": more},
        **about,
        "score_columns": columns,
    }
    return {**official_files(records, facts.signal, loading, columns), RUN: run}


def _answer(
    dataset: Dataset, partial: Partial, work: Work, batch_size: int, tell: Callable[[Dataset, int], None]
) -> Mapping[str, Any]:
    """Answers the missing rows; returns what the method found out about the dataset."""
    held: list[dict[str, Any]] = []  # until a row has an answer: the run may fail in all of them
    first = set(range(max(2, min(batch_size, len(dataset.rows)))))  # workers answer in any order
    found_out: Mapping[str, Any] = {}
    tell(dataset, len(partial.records))
    # If all rows were answered before, the method is asked for none, to find it out again.
    missing = blocks(dataset, partial.records, batch_size) if len(partial.records) < len(dataset.rows) else [range(0)]
    for _, (records, found) in work((dataset, block) for block in missing):
        held, found_out = [*held, *records], found
        same = len({one["error"] for one in held}) == 1 and held[0]["error"] is not None
        if same and not partial.records and held[0].get("confidence") is None:  # it has one where no adapter fits
            if {one["index"] for one in held} >= first:
                raise LoGoError(f"dataset {dataset.name!r}: {held[0]['error']}")
            if len(held) < len(dataset.rows):
                continue
        partial.add(held)
        held = []
        tell(dataset, len(partial.records))
    return found_out


def blocks(dataset: Dataset, known: Mapping[int, object], size: int) -> Iterator[range]:
    """The rows of a dataset that are not known, in blocks of at most `size`, cut where a run without known rows cuts
    them."""
    for start in range(0, len(dataset.rows), size):
        missing = [index for index in range(start, min(start + size, len(dataset.rows))) if index not in known]
        while missing:
            end = next((n for n, index in enumerate(missing) if index != missing[0] + n), len(missing))
            yield range(missing[0], missing[0] + end)
            missing = missing[end:]


def warn_of_copies(dataset: Dataset, method: Method | None) -> None:
    """Warns if a method learns from rows that are tested, too."""
    if method is None or method.needs != "train":
        return
    tested = {row.context for row in dataset.rows}
    if shared := sum(row.context in tested for row in dataset.train):
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
