"""Runs every cell of a sweep in a session, and collects outcomes and failures.

A cell's results are ordinary result folders, at `{out}/runs/{name of the cell}/{dataset}`: finished ones are known,
interrupted ones continue, and every tool that reads results can read them. If a cell fails, the others still run. Cells
in which an axis makes no difference share a run.
"""

from __future__ import annotations

import functools
import warnings
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

from logo.errors import LoGoError
from logo.evaluation.jobs import Job
from logo.evaluation.stored import Result, read_result
from logo.evaluation.sweep.grid import Value, cell_name

if TYPE_CHECKING:
    from logo.baselines import Method
    from logo.evaluation.resume import ResumePolicy
    from logo.evaluation.session import Evaluation
    from logo.selection.settings import SelectionSettings

RUNS = "runs"


@dataclass(frozen=True)
class Cell:
    """One combination of values, and what it means.

    Attributes:
        values: by axis, as the table shows them.
        settings: of selection.
        method: chooses adapters instead of the engine; None: the engine does.
        seed: of sampling, the method and intervals.
        moot: axes whose value makes no difference here, such as the signal where a method does not select by it.
        options: every option, for `run.json`.
    """

    values: Mapping[str, Value]
    settings: SelectionSettings
    method: Method | None = None
    seed: int = 0
    moot: frozenset[str] = frozenset()
    options: Mapping[str, Any] = field(default_factory=dict)

    @property
    def key(self) -> tuple[tuple[str, Value], ...]:
        """The values, which distinguish a cell from all others."""
        return tuple(self.values.items())

    @property
    def name(self) -> str:
        """The name of its folder below `runs`; cells that do the same share one."""
        return cell_name({axis: value for axis, value in self.values.items() if axis not in self.moot})


@dataclass(frozen=True)
class Outcome:
    """What a cell answered on one dataset, and the result's folder relative to the sweep's."""

    cell: Cell
    result: Result
    folder: str

    @property
    def dataset(self) -> str:
        """The name of the dataset."""
        return self.result.dataset


@dataclass(frozen=True)
class Failure:
    """A dataset of which a cell could not answer all rows; `dataset` is None if the whole cell failed."""

    name: str
    dataset: str | None
    message: str


@dataclass(frozen=True)
class Swept:
    """The results of a sweep: outcomes in the order of cells and datasets, and failures in the order they happened."""

    outcomes: tuple[Outcome, ...]
    failures: tuple[Failure, ...]


def sweep(
    cells: Sequence[Cell],
    jobs: Sequence[Job],
    out: Path,
    open_session: Callable[[Cell], Evaluation],
    *,
    policy: ResumePolicy | None = None,
    on_progress: Callable[[str, int], None] | None = None,
) -> Swept:
    """Answers every dataset in every cell, as far as that is not done yet.

    Args:
        jobs: the datasets; their folders are not looked at.
        out: the sweep's folder.
        open_session: makes the session of a cell. Cells of the same settings come one after the other, so that an
            engine can serve all of them, and none is needed again once others have come.
        policy: what is allowed with existing results; None: those of other runs are not touched.
        on_progress: called with `cell · dataset`, and the number of finished rows of all runs.
    """
    results: dict[tuple[str, str], Result] = {}  # by cell and dataset
    failures: list[Failure] = []
    rows = 0
    tell = on_progress or (lambda what, count: None)
    for cell in _runs(cells):
        try:
            session = open_session(cell)
        except (LoGoError, RuntimeError) as error:
            failures.append(_failure(cell, None, error))
            rows += sum(len(job.rows) for job in jobs)
            continue
        for job in jobs:
            what, before = f"{cell.name} · {job.dataset}", rows
            tell(what, rows)
            try:
                [plan] = session.plans([replace(job, folder=out / _folder(cell, job))], policy)
                if plan.done and plan.note:
                    warnings.warn(
                        f"{what} was answered under other versions or on another kind of device: {plan.note}",
                        UserWarning,
                        stacklevel=2,
                    )
                if not plan.done:
                    session.run(plan, functools.partial(_tell_from, tell, what, before))
                results[cell.name, job.dataset] = _read(plan.job)
            except (LoGoError, RuntimeError) as error:
                failures.append(_failure(cell, job.dataset, error))
            rows = before + len(job.rows)
            tell(what, rows)
    outcomes = tuple(
        Outcome(cell, results[cell.name, job.dataset], _folder(cell, job))
        for cell in cells
        for job in jobs
        if (cell.name, job.dataset) in results
    )
    return Swept(outcomes, (*failures, *_unanswered(outcomes)))


def runs(cells: Sequence[Cell]) -> list[Cell]:
    """The first of all cells that do the same, for each such set."""
    first: dict[str, Cell] = {}
    for cell in cells:
        first.setdefault(cell.name, cell)
    return list(first.values())


def _runs(cells: Sequence[Cell]) -> list[Cell]:
    """The cells that are to be run, sorted by settings in order of their first use."""
    chosen = runs(cells)
    settings = [cell.settings for cell in chosen]
    return sorted(chosen, key=lambda cell: settings.index(cell.settings))


def _tell_from(tell: Callable[[str, int], None], what: str, before: int, count: int) -> None:
    tell(what, before + count)


def _folder(cell: Cell, job: Job) -> str:
    """The folder of a result, relative to the sweep's."""
    return f"{RUNS}/{cell.name}/{job.dataset}"


def _read(job: Job) -> Result:
    try:
        return read_result(job.folder, job.dataset)
    except LoGoError as error:
        raise LoGoError(f"{error}; answer it again with --overwrite") from error


def _failure(cell: Cell, dataset: str | None, error: Exception) -> Failure:
    return Failure(cell.name, dataset, " ".join(str(error).split()))


def _unanswered(outcomes: Sequence[Outcome]) -> Iterable[Failure]:
    for outcome in {outcome.folder: outcome for outcome in outcomes}.values():
        errors = outcome.result.errors
        if errors:
            some = "1 row has" if len(errors) == 1 else f"{len(errors)} rows have"
            index, message = next(iter(errors.items()))
            first = f"row {index + 1}: {message}"
            yield Failure(outcome.cell.name, outcome.dataset, f"{some} no answer; {first}")
