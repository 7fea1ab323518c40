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
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass
from functools import cached_property
from pathlib import Path
from typing import TYPE_CHECKING, Any, Protocol

from logo.errors import DataError, UsageError, closest
from logo.evaluation.identity import digests, environment, pool_digests, rows_digest
from logo.evaluation.journal import Journal
from logo.evaluation.results import versions
from logo.evaluation.summary import Measured, Section, summary
from logo.folders import replace_file
from logo.rows import Row, read_rows

if TYPE_CHECKING:
    from logo.engine import LoGo
    from logo.selection.selector import Selection


@dataclass(frozen=True)
class Task:
    """One file of rows; `name` is what an adapter would be called that was made for it."""

    name: str
    file: Path
    rows: tuple[Row, ...]


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
    chosen: set[str] = set()
    for item in wanted:
        matching = [name for name in names if name == item or fnmatch.fnmatchcase(name, item)]
        if not matching:
            raise DataError(f"task {item!r}: no such file in {str(root)!r}{closest(item, names)}")
        chosen.update(matching)
    return [Task(name, files[name], tuple(read_rows(files[name], limit))) for name in sorted(chosen)]


@dataclass(frozen=True)
class Facts:
    """What a study records of the engines that it compares, in a form that another process can be told.

    Attributes:
        names: of the adapters.
        pool: their SHA-256 by name.
        settings: dtype, device, and of each signal.
        digests: of the base model (`logo.evaluation.identity.digests`).
        environment: see `logo.evaluation.identity.environment`.
        in_order: whether a selection depends on the prompts before.
    """

    names: tuple[str, ...]
    pool: Mapping[str, str]
    settings: Mapping[str, Any]
    digests: Mapping[str, Any]
    environment: Mapping[str, str]
    in_order: bool


class Measuring(Protocol):
    """What measures rows."""

    @property
    def facts(self) -> Facts: ...

    def __call__(self, rows: Iterable[tuple[Task, int]]) -> Iterator[Measured]:
        """A record for each row of a task, in any order; see `Arms`."""


class Arms:
    """Engines in this process: one per signal, by name, on one model and one pool."""

    def __init__(self, engines: Mapping[str, LoGo]) -> None:
        self._engines = engines

    @cached_property
    def facts(self) -> Facts:
        """What is recorded of them. Pools are calibrated, if they were not yet."""
        scorer = next(iter(self._engines.values()))
        return Facts(
            names=scorer.names,
            pool=pool_digests(scorer),
            settings=_engine_settings(self._engines),
            digests=digests(scorer),
            environment=environment(scorer),
            in_order=any(_depends_on_order(logo) for logo in self._engines.values()),
        )

    def __call__(self, rows: Iterable[tuple[Task, int]]) -> Iterator[Measured]:
        """Measures rows of tasks, in order.

        Raises:
            DataError: a row cannot be scored (names the file and the line).
        """
        for task, index in rows:
            yield self.measured(task.name, f"{task.file}:{index + 1}", index, task.rows[index])

    def measured(self, task: str, where: str, index: int, row: Row) -> Measured:
        """Measures one row; `where` names it in errors, which are those of `__call__`."""
        return _measure(self._engines, task, where, index, row)


def study(
    measuring: Measuring,
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
        measuring: measures them.
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
    facts, tell = measuring.facts, on_progress or (lambda name: None)
    settings = {**settings, **facts.settings, "seed": seed}
    run = _identity(facts, tasks, settings)
    if facts.in_order:
        Journal(journal_file, run).close()  # refused if it is another study's
    with Journal(journal_file, run, fresh=facts.in_order) as journal:  # there is no going on in the middle
        rows = {(row.task, row.index): row for row in (Measured(**record) for record in journal.records)}
        for name, _ in rows:
            tell(name)
        every = [(task, index) for task in tasks for index in range(len(task.rows))]
        for measured in measuring((task, index) for task, index in every if (task.name, index) not in rows):
            journal.append(asdict(measured))
            rows[measured.task, measured.index] = measured
            tell(measured.task)
    ordered = [rows[task.name, index] for task, index in every]
    report = summary(ordered, facts.names, seed=seed)
    report |= {"settings": settings, "seconds": _seconds(ordered, loading), "versions": versions()}
    return Study(report, tuple(ordered))


def journal_of(report: Path) -> Path:
    """Where the rows of an unfinished study are kept, beside its report."""
    return report.with_name(f"{report.name}.partial.jsonl")


def write_report(file: Path, report: Mapping[str, object]) -> None:
    """Writes the report as JSON, complete or not at all.

    Raises:
        StorageError: the file cannot be written.
    """
    replace_file(file, (json.dumps(report, indent=2, ensure_ascii=False) + "\n").encode())


# -- measuring one row ------------------------------------------------------------------------------------------


def _measure(engines: Mapping[str, LoGo], task: str, where: str, index: int, row: Row) -> Measured:
    scorer = next(iter(engines.values()))
    picked, seconds = {}, {}
    for signal, logo in engines.items():
        started = time.perf_counter()
        picked[signal] = logo.select(row.context)
        seconds[signal] = time.perf_counter() - started
    own = task if task in scorer.names else None
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
        raise DataError(f"{where}: {error}") from error
    parts: dict[str, Section] = {"answers": {}, "left_out": {}}
    for (part, kind, name), value in zip(plan, scored, strict=True):
        metrics = {"exact_match": float(value.exact_match), "nll": value.nll}
        if part == "answers" and kind == "signals" and own is not None:
            metrics = rank_metrics(picked[name].scores, own) | metrics
        parts[part].setdefault(kind, {})[name] = metrics
    return Measured(
        task=task,
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
    names = [name for name in next(iter(engines.values())).names if name != own]
    signals = {name: logo.reselect(picked[name].scores, candidates=names).mixture for name, logo in engines.items()}
    return {"signals": signals, "mixtures": _fixed_mixtures(names, None)}


# -- what it stands on ------------------------------------------------------------------------------------------


def _engine_settings(engines: Mapping[str, LoGo]) -> dict[str, Any]:
    model = next(iter(engines.values())).model
    signals = {
        name: {
            **asdict(logo.settings),
            "k": logo.k,
            "points": [point.module for point in logo.scorer.points],
            "activations": [str(one) for one in logo.fitted.activations if logo.fitted.read_once],
            "reads": logo.reads,
        }
        for name, logo in engines.items()
    }
    return {"dtype": str(model.dtype).removeprefix("torch."), "device": str(model.device), "signals": signals}


def _depends_on_order(logo: LoGo) -> bool:
    """Whether a selection depends on the prompts before."""
    return logo.settings.probe_context == "carry" or logo.settings.baseline == "running"


def _identity(facts: Facts, tasks: Sequence[Task], settings: Mapping[str, object]) -> dict[str, object]:
    """Everything that a row's record depends on."""
    return {
        "environment": facts.environment,
        **facts.digests,
        **{key: settings.get(key) for key in ("base_model", "dtype", "signals")},
        "pool": facts.pool,
        "rows_sha256": {task.name: rows_digest(task.rows) for task in tasks},
    }


def _seconds(rows: Iterable[Measured], loading: float) -> dict[str, Any]:
    select: dict[str, float] = {}
    score = 0.0
    for row in rows:
        score += row.seconds["score"]
        for signal, seconds in row.seconds["select"].items():
            select[signal] = select.get(signal, 0.0) + seconds
    return {"loading": loading, "select": select, "score": score}
