"""Rows of evaluations and studies answered by Ray actors, with the plans, journals and results of a single process.

    missing rows -> blocks of one batch each -> any worker -> answered batches -> the journal of their dataset

Blocks are cut where one process would cut its batches, so that a row is in the same batch and its result is bit-equal.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import ExitStack, closing
from pathlib import Path
from typing import TYPE_CHECKING, Any

from logo.baselines.method import Answering
from logo.cluster.workers import Workers
from logo.errors import LoGoError, UsageError
from logo.evaluation.arms import Arms
from logo.evaluation.contest import Lesson, Lessons
from logo.evaluation.datasets import Dataset
from logo.evaluation.resume import Plan
from logo.evaluation.runner import AnsweredBatch, answers, placed
from logo.evaluation.session import Evaluation, Facts, Session, Underway
from logo.evaluation.study import Facts as StudyFacts
from logo.evaluation.summary import Measured

if TYPE_CHECKING:
    from logo.baselines import Method

Report = Callable[[Plan, int], None]


class Answerer:
    """What a worker opens: a session that answers blocks of any dataset."""

    def __init__(self, session: Session) -> None:
        self.session = session
        self._engine: Session | Answering = session
        self._of: str | None = None  # the dataset that `_engine` answers

    @property
    def facts(self) -> Facts:
        return self.session.facts

    def learn(self, job: Dataset) -> dict[str, Any]:
        """What the method of the session learns about a dataset."""
        self._of = None
        return self.session.learn(job)

    def answer(
        self, job: Dataset, learnt: Mapping[str, Any] | None, block: range
    ) -> tuple[list[AnsweredBatch], Mapping[str, Any] | None]:
        """The answered batches of a block of a dataset's rows, where a refusal is that of its row alone; and what the
        method has found out about the dataset."""
        if job.name != self._of:
            self._engine, self._of = self.session.answering(job, learnt), job.name
        batches = answers(
            self._engine,
            job.rows[block.start : block.stop],
            metric=job.metric,
            batch_size=self.session.batch_size,
            max_new_tokens=self.session.max_new_tokens,
            proven=True,
        )
        found = list(placed(block.start, batches))
        return found, self._engine.record if isinstance(self._engine, Answering) else None


class InWorkers(Evaluation):
    """Datasets answered by workers with an open `Answerer`; the other arguments are those of `Evaluation`, and of the
    sessions of the workers."""

    def __init__(
        self, workers: Workers[Answerer], *, seed: int, batch_size: int, max_new_tokens: int, method: Method | None
    ) -> None:
        self._workers = workers
        self.seed, self.batch_size, self.max_new_tokens, self.method = seed, batch_size, max_new_tokens, method

    @property
    def facts(self) -> Facts:
        found: Facts = self._workers.facts
        return found

    def plans(self, jobs: Sequence[Dataset], folder: Path, *, overwrite: bool = False) -> list[Plan]:
        """As `Evaluation.plans`; UsageError, too, where rows depend on those before them."""
        if self.facts.order is not None:
            raise UsageError(f"workers: a row's result must not depend on other rows, but {self.facts.order}")
        return super().plans(jobs, folder, overwrite=overwrite)

    def learn(self, job: Dataset) -> dict[str, Any]:
        learnt: dict[str, Any] = self._workers.ask(Answerer.learn, job)
        return learnt

    def results(
        self, plans: Sequence[Plan], on_progress: Report | None = None
    ) -> Iterator[tuple[Plan, dict[str, object]]]:
        """As `Evaluation.results`, with the errors of `Workers.map`, too; the next dataset begins while the last blocks
        of the one before are being answered."""
        report = on_progress or (lambda one, done: None)
        held: dict[Underway, list[AnsweredBatch]] = {}  # what may not be recorded yet
        begun = set[Underway]()  # of which something was recorded
        with ExitStack() as stack:
            for dataset, (found, found_out) in self._workers.map(self._blocks(plans, stack), Answerer.answer):
                dataset.found_out = found_out
                batches = held.pop(dataset, []) + found
                if dataset not in begun and self._may_be_all(dataset, batches):
                    held[dataset] = batches
                    continue
                begun.add(dataset)
                for batch in batches:
                    dataset.answered.add(batch)
                report(dataset.plan, len(dataset.answered))
                if len(dataset.answered) == len(dataset.plan.job.rows):
                    files = dataset.write()
                    dataset.close()
                    yield dataset.plan, files

    def _may_be_all(self, dataset: Underway, batches: Sequence[AnsweredBatch]) -> bool:
        """Whether the first answers of a dataset are refusals for one reason, as all others may be. A run that cannot
        work ends before anything is recorded, as in a single process: LoGoError when they are as many as a batch."""
        rows = len(dataset.plan.job.rows)
        errors = [instance.error for batch in batches for instance in batch.instances]
        if dataset.answered.proven or not errors or errors[0] is None or len(set(errors)) > 1:
            return False
        if len(errors) >= max(2, min(self.batch_size, rows)):
            raise LoGoError(errors[0])
        return len(errors) < rows - len(dataset.answered)

    def _blocks(self, plans: Sequence[Plan], stack: ExitStack) -> Iterator[tuple[Underway, tuple[Any, ...]]]:
        """The missing blocks of all datasets; a dataset is begun when its first block is asked for."""
        for plan in plans:
            dataset = stack.enter_context(closing(Underway(self, plan)))
            job, learnt = self._workers.shared(plan.job), self._workers.shared(dataset.learnt)
            for missing in dataset.answered.missing or [range(0)]:
                # If no row is missing, one block without rows still makes the result be written.
                for start in range(missing.start, max(missing.stop, 1), self.batch_size):
                    yield dataset, (job, learnt, range(start, min(start + self.batch_size, missing.stop)))


class MeasuredInWorkers:
    """Rows of a study, measured by workers with open `Arms`; a `logo.evaluation.study.Measuring`."""

    def __init__(self, workers: Workers[Arms]) -> None:
        self._workers = workers
        self.facts: StudyFacts = workers.facts

    def learn(self, lessons: Iterable[Lesson]) -> Iterator[tuple[Lesson, Mapping[str, Any]]]:
        """Each lesson with the state that its method has learnt; errors as of `Arms.learn` and `Workers.map`."""
        return self._workers.map(((lesson, (lesson,)) for lesson in lessons), Arms.learnt)

    def __call__(self, rows: Iterable[tuple[Dataset, int]], lessons: Lessons) -> Iterator[Measured]:
        """Records of rows; errors as of `Arms.__call__` and `Workers.map`, and UsageError where rows depend on those
        before them."""
        if self.facts.in_order:
            raise UsageError("workers: a signal's selection depends on the prompts before; measure in one process")
        known = self._workers.shared(lessons)
        work = ((None, (task.name, f"{task.file}:{index + 1}", index, task.rows[index], known)) for task, index in rows)
        for _, measured in self._workers.map(work, Arms.measured):
            yield measured
