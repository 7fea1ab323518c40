"""Datasets answered by several processes (`logo.backends.ray`), with the plans, journals and results of a single
process.

    missing rows -> blocks of one batch each -> any process -> answered batches -> the journal of their dataset

Blocks are cut where one process would cut its batches, so that a row is in the same batch and its result is bit-equal.
Finished pieces are recorded at once, in any order.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import ExitStack, closing
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from logo.backends.host import Shared
from logo.backends.items import Item, Lost
from logo.backends.ray import Workers
from logo.baselines.method import Answering
from logo.errors import LoGoError, UsageError
from logo.evaluation.arms import Arms
from logo.evaluation.contest import Lesson, Lessons
from logo.evaluation.jobs import Job
from logo.evaluation.resume import Plan
from logo.evaluation.runner import AnsweredBatch, answers, placed
from logo.evaluation.session import Evaluation, Facts, Session, Underway
from logo.evaluation.study import Facts as StudyFacts
from logo.evaluation.study import Task
from logo.evaluation.summary import Measured
from logo.identity import library_versions
from logo.rows import Row

if TYPE_CHECKING:
    from logo.baselines import Method

Report = Callable[[Plan, int], None]


class Incomplete(LoGoError, RuntimeError):
    """Some rows have no answer because every process that got them has died; everything else is done."""


# -- in a process -----------------------------------------------------------------------------------------------------


class Answerer:
    """Answers blocks of any dataset in an open session.

    Raises:
        LoGoError: the method of the session cannot be used on this machine.
    """

    def __init__(self, session: Session) -> None:
        if session.method is not None:
            session.method.check()
        self.session = session
        self._of: Path | None = None
        self._engine: Session | Answering | None = None
        self._proven = False

    def answer(
        self, job: Job, learnt: Mapping[str, Any] | None, stretch: range, proven: bool
    ) -> tuple[list[AnsweredBatch], Mapping[str, Any] | None]:
        """Pieces of a stretch of a job's rows, and what the method found out about the dataset.

        Args:
            learnt: what the method has learnt about it.
            proven: some process has answered a row of it, so that an error concerns its row and not the run.
        """
        session = self.session
        if self._engine is None or job.folder != self._of:
            self._engine, self._of, self._proven = session.answering(job, learnt), job.folder, False
        batches = answers(
            self._engine,
            job.rows[stretch.start : stretch.stop],
            metric=job.metric,
            batch_size=session.batch_size,
            max_new_tokens=session.max_new_tokens,
            proven=proven or self._proven,
        )
        found = list(placed(stretch.start, batches))
        self._proven = self._proven or any(one.error is None for batch in found for one in batch.instances)
        return found, self._engine.record if isinstance(self._engine, Answering) else None

    def learn(self, job: Job) -> dict[str, Any]:
        """What the method of the session learns about a dataset."""
        self._engine = None
        return self.session.learn(job)


def facts_of(answerer: Answerer) -> Facts:
    """The facts of the session."""
    return answerer.session.facts


def _answer(answerer: Answerer, job: Shared, learnt: Shared | None, stretch: range, proven: bool) -> Any:
    return answerer.answer(job.get(), None if learnt is None else learnt.get(), stretch, proven)


# -- in the driver ----------------------------------------------------------------------------------------------------


def differs(pool: Mapping[str, str], *, whole: bool) -> Callable[[Any, Any], str | None]:
    """A function for `Workers` that says how a process differs from this one or from the first one, in words. Processes
    describe themselves by `Facts`, or by those of a study.

    Args:
        pool: SHA-256 by name of the adapters, as this process reads them.
        whole: whether every process has to have all of them.
    """

    def why(own: Facts | StudyFacts, first: Facts | StudyFacts) -> str | None:
        for name, version in library_versions().items():
            if own.environment.get(name) != version:
                return f"it has {name} {own.environment.get(name)}, and the driver has {version}"
        for name, digest in own.pool.items():
            if pool.get(name) != digest:
                return f"adapter {name!r} of its pool differs from the driver's: put the same files in both places"
        lacking = [name for name in pool if whole and name not in own.pool]
        if lacking:
            return f"its pool lacks adapter {lacking[0]!r}, which the driver's has: put the same files in both places"
        names = _differing(_compared(own), _compared(first))
        return f"{', '.join(names)} differ from the first worker's" if names else None

    return why


def _compared(facts: Facts | StudyFacts) -> dict[str, Any]:
    own = facts.identity if isinstance(facts, Facts) else {**facts.digests, **facts.settings}
    return {**own, "pool": facts.pool, "environment": facts.environment}


def _differing(one: Mapping[str, Any], other: Mapping[str, Any]) -> list[str]:
    return [name for name in {**one, **other} if one.get(name) != other.get(name)]


@dataclass(frozen=True)
class _Block(Item):
    """A batch of missing rows of a dataset."""

    dataset: Underway
    stretch: range


class Trial:
    """Whether a dataset can be answered at all. Until a row has an answer, its batches are held back: a run that cannot
    work fails in every row, and ends before anything is recorded, as in a single process.

    Attributes:
        held: the batches that are held back.
    """

    def __init__(self, dataset: Underway, batch_size: int) -> None:
        self._dataset = dataset
        self._enough = max(2, min(batch_size, len(dataset.plan.job.rows)))
        self._proven = dataset.answered.proven
        self.held: list[AnsweredBatch] = []

    def passed(self, found: Sequence[AnsweredBatch]) -> list[AnsweredBatch]:
        """Takes further batches, and returns those that may be recorded now.

        Raises:
            LoGoError: all rows so far fail for one and the same reason, and they are as many as a batch.
        """
        self.held += found
        errors = [instance.error for batch in self.held for instance in batch.instances]
        every = len(errors) == len(self._dataset.plan.job.rows) - len(self._dataset.answered)
        if not self._proven and errors and len(set(errors)) == 1 and errors[0] is not None:
            if len(errors) >= self._enough:
                raise LoGoError(errors[0])
            if not every:
                return []
        self._proven = self._proven or bool(errors)
        passed, self.held = self.held, []
        return passed


class InWorkers(Evaluation):
    """Datasets answered by other processes.

    Args:
        workers: processes with an open `Answerer`.
        seed, batch_size, max_new_tokens, method: as in `Evaluation`, and in the sessions of the processes.
        shared: the engine makes batches of its own, so that the rows of a dataset may be divided equally among the
            processes; otherwise every process gets one batch after the other, cut as one process would cut them.
    """

    def __init__(
        self,
        workers: Workers[Answerer],
        *,
        seed: int,
        batch_size: int,
        max_new_tokens: int,
        method: Method | None,
        shared: bool = False,
    ) -> None:
        self.workers, self._shared = workers, shared
        self.seed, self.batch_size, self.max_new_tokens, self.method = seed, batch_size, max_new_tokens, method

    @property
    def facts(self) -> Facts:
        found: Facts = self.workers.description
        return found

    def plans(self, jobs: Sequence[Job], *, overwrite: bool = False) -> list[Plan]:
        """As `Evaluation.plans`.

        Raises:
            UsageError: rows depend on those before them, too.
        """
        if self.facts.order is not None:
            raise UsageError(f"workers: a row's result must not depend on other rows, but {self.facts.order}")
        return super().plans(jobs, overwrite=overwrite)

    def learn(self, job: Job) -> dict[str, Any]:
        learnt: dict[str, Any] = self.workers.ask(Answerer.learn, job)
        return learnt

    def results(
        self, plans: Sequence[Plan], on_progress: Report | None = None
    ) -> Iterator[tuple[Plan, dict[str, object]]]:
        """As `Evaluation.results`; the next dataset begins while the last blocks of the one before are being answered,
        so that no process waits.

        Raises:
            LoGoError: the first rows of a dataset fail for one and the same reason.
            Incomplete: some rows have no answer, because every process that got them has died.
        """
        report = on_progress or (lambda one, done: None)
        lost: list[str] = []
        trials: dict[Underway, Trial] = {}
        with ExitStack() as stack:
            for block, outcome in self.workers.map(self._blocks(plans, stack, report), _answer):
                dataset, stretch = block.dataset, block.stretch
                if isinstance(outcome, Lost):
                    where = f"{dataset.plan.job.dataset!r}, rows {stretch.start + 1} to {stretch.stop}"
                    lost.append(f"{where}: {outcome.reason}")
                    continue
                found, dataset.found_out = outcome
                trial = trials.setdefault(dataset, Trial(dataset, self.batch_size))
                for batch in trial.passed(found):
                    dataset.answered.add(batch)
                report(dataset.plan, len(dataset.answered))
                if len(dataset.answered) == len(dataset.plan.job.rows):
                    files = dataset.write()
                    dataset.close()
                    yield dataset.plan, files
            for dataset, trial in trials.items():  # held back where other rows are lost
                for batch in trial.held:
                    dataset.answered.add(batch)
        if lost:
            raise Incomplete(
                f"no answer to dataset {'; '.join(lost)}. Everything else is done; repeat the command to try again"
            )

    def _blocks(self, plans: Sequence[Plan], stack: ExitStack, report: Report) -> Iterator[_Block]:
        """The missing blocks of all datasets; a dataset is begun when its first block is asked for."""
        for one in plans:
            dataset = stack.enter_context(closing(Underway(self, one)))
            if len(dataset.answered):
                report(one, len(dataset.answered))
            job = self.workers.shared(one.job)
            learnt = None if dataset.learnt is None else self.workers.shared(dataset.learnt)
            size = self.batch_size
            if self._shared:
                size = max(1, min(size, -(-len(one.job.rows) // max(1, self.workers.count))))
            for stretch in dataset.answered.missing or [range(0)]:
                # If no row is missing, one block without rows still makes the result be written.
                for start in range(stretch.start, max(stretch.stop, 1), size):
                    part = range(start, min(start + size, stretch.stop))
                    yield _Block((job, learnt, part, dataset.answered.proven), len(part), dataset, part)


class MeasuredInWorkers:
    """Rows of a study, measured by processes with open `Arms`."""

    def __init__(self, workers: Workers[Arms]) -> None:
        self.workers = workers
        self.facts: StudyFacts = workers.description

    def learn(self, lessons: Iterable[Lesson]) -> Iterator[tuple[Lesson, Mapping[str, Any]]]:
        """Each lesson with the state that its method has learnt, in the order in which they are done.

        Raises:
            DataError: rows that are missing or cannot be scored.
            Incomplete: some are not learnt, because every process that got them has died.
        """
        for item, learnt in self._done((Item((lesson,), 1) for lesson in lessons), Arms.learnt, "not learnt"):
            yield item.args[0], learnt

    def __call__(self, rows: Iterable[tuple[Task, int]], lessons: Lessons) -> Iterator[Measured]:
        """Records of rows, in the order in which they are done.

        Raises:
            UsageError: rows depend on those before them.
            DataError: a row cannot be scored (names the file and the line).
            Incomplete: some rows have no record, because every process that got them has died.
        """
        if self.facts.in_order:
            raise UsageError("workers: a signal's selection depends on the prompts before; measure in one process")
        shared = self.workers.shared(lessons)
        items = (
            Item((task.name, f"{task.file}:{index + 1}", index, task.rows[index], shared), 1) for task, index in rows
        )
        for _, measured in self._done(items, _measured, "not measured"):
            yield measured

    def _done(self, items: Iterable[Item], what: Callable[..., Any], failed: str) -> Iterator[tuple[Item, Any]]:
        lost = []
        for item, outcome in self.workers.map(items, what):
            if isinstance(outcome, Lost):
                which = " ".join(item.args[0]) if isinstance(item.args[0], Lesson) else item.args[1]
                lost.append(f"{which}: {outcome.reason}")
            else:
                yield item, outcome
        if lost:
            raise Incomplete(f"{failed}: {'; '.join(lost)}. Repeat the command to try again")


def _measured(arms: Arms, task: str, where: str, index: int, row: Row, lessons: Shared) -> Measured:
    return arms.measured(task, where, index, row, lessons.get())
