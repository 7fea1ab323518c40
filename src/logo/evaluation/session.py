"""One engine with one set of options, and the datasets that it answers: planned, answered, judged and written.

This is what a command needs between opening an engine and showing numbers. A dataset's result does not
depend on earlier datasets: the seed is set again and the engine forgets its prompts. `Evaluation` is independent of
what answers; `Session` answers in this process.
"""

from __future__ import annotations

import functools
import json
import warnings
from abc import ABC, abstractmethod
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import closing
from dataclasses import dataclass, field
from datetime import datetime, timezone
from functools import cached_property
from pathlib import Path
from typing import TYPE_CHECKING, Any

from logo.baselines.method import Answering, Learned, Task, overlap, tested_too
from logo.evaluation.datasets import Dataset
from logo.evaluation.identity import engine_identity, environment, order_dependence, rows_digest
from logo.evaluation.metrics import METRICS
from logo.evaluation.results import LOGO, result_files, run_record, write_results
from logo.evaluation.resume import Plan, check_place, journal_of, open_journal, plan
from logo.evaluation.runner import Answered
from logo.rows import Row

if TYPE_CHECKING:
    from logo.baselines import Method
    from logo.core import Generation
    from logo.engine import LoGo
    from logo.prompts import Conversation


@dataclass(frozen=True)
class Facts:
    """The recorded facts of an engine, in a form that can be sent to another process.

    Attributes:
        identity: what results depend on (`logo.evaluation.identity.engine_identity`).
        environment: what it runs on (`logo.evaluation.identity.environment`).
        pool: SHA-256 by name of the adapters in use.
        order: why a row's result depends on the rows before it; None if it does not.
        device: in words.
        signal: the signal that scores adapters.
        options: every option of the command, as it was used, for `run.json`.
        loading: seconds that opening the engine took.
    """

    identity: Mapping[str, Any]
    environment: Mapping[str, str]
    pool: Mapping[str, str]
    order: str | None
    device: str
    signal: str
    options: Mapping[str, Any]
    loading: float


class Evaluation(ABC):
    """Plans, judges and writes datasets; a subclass answers the rows.

    Attributes:
        seed: of sampling and of intervals.
        batch_size: prompts at once; `max_new_tokens`: of each answer.
        method: selects adapters instead of the engine; None: the engine selects.
    """

    seed: int
    batch_size: int
    max_new_tokens: int
    method: Method | None

    @property
    @abstractmethod
    def facts(self) -> Facts:
        """The facts of the engine that answers."""

    @abstractmethod
    def results(
        self, plans: Sequence[Plan], on_progress: Callable[[Plan, int], None] | None = None
    ) -> Iterator[tuple[Plan, dict[str, object]]]:
        """Answers the unanswered rows of some jobs, writes their results, and yields each when it is done.

        Args:
            on_progress: called with a plan and the number of its finished rows.

        Raises:
            UsageError: another process works on a job, or the result of another run has appeared in its place.
            LoGoError: as in `logo.evaluation.batches.in_batches`; the journal stays, and an earlier result.
            StorageError: journal or result cannot be written.
        """

    @abstractmethod
    def learn(self, job: Dataset) -> dict[str, Any]:
        """What the method learns about a dataset from its training rows."""

    def plans(self, jobs: Sequence[Dataset], folder: Path, *, overwrite: bool = False) -> list[Plan]:
        """What has to be done for each job, determined before the first one begins.

        Args:
            folder: of the run; the result of a dataset goes into the folder of its name below it.
            overwrite: begin again, even where there is a result.

        Raises:
            UsageError: there is a result or a journal of another run, or one begun in another environment; or the
                method needs training rows and no folder was named.
            DataError: training rows are missing or malformed.
        """
        for job in jobs:
            said = self.learns and overlap(f"dataset {job.name!r}", job.train, job.rows, [self.name])
            if said:
                warnings.warn(said, UserWarning, stacklevel=2)
        facts = self.facts
        return [
            plan(
                job,
                folder / job.name,
                self.identity(job),
                facts.pool,
                facts.environment,
                overwrite=overwrite,
                in_order=facts.order is not None,
            )
            for job in jobs
        ]

    def run(self, plan: Plan, on_progress: Callable[[int], None] | None = None) -> dict[str, object]:
        """`results` of one job.

        Args:
            on_progress: gets the number of rows done so far.
        """
        rows_done = None if on_progress is None else lambda _, done: on_progress(done)
        [(_, files)] = self.results([plan], rows_done)
        return files

    @property
    def name(self) -> str:
        """The name of the method."""
        return LOGO if self.method is None else self.method.name

    @property
    def learns(self) -> bool:
        """Whether the method uses labelled training rows."""
        return isinstance(self.method, Learned)

    def identity(self, job: Dataset) -> dict[str, Any]:
        """The identity of a job's rows, without the pool."""
        return {
            **self.facts.identity,
            **({"train_sha256": rows_digest(job.train)} if self.learns else {}),
            "method": {"method": LOGO} if self.method is None else self.method.as_dict(),
            "seed": self.seed,
            "max_new_tokens": self.max_new_tokens,
            "dataset": job.name,
            "metric": job.metric,
            **({} if METRICS.source(job.metric) is None else {"metric_plugin": METRICS.source(job.metric)}),
            "rows": len(job.rows),
            "rows_sha256": rows_digest(job.rows),
        }


class Underway:
    """A dataset that is being answered; to be closed.

    Args:
        evaluation: the evaluation that it belongs to.
        plan: what has to be done.

    Attributes:
        answered: the answered rows.
        learnt: what the method has learnt about the dataset; None if it does not learn.
        found_out: what the method has found out about it, for `run.json`; None without a method.

    Raises:
        UsageError: another process works on this job, or the journal is of another run.
        StorageError: the journal cannot be written.
    """

    def __init__(self, evaluation: Evaluation, plan: Plan) -> None:
        self.plan, self._evaluation = plan, evaluation
        job = plan.job
        self._began = datetime.now(timezone.utc)
        self.found_out: Mapping[str, Any] | None = None
        self._journal = open_journal(plan)
        try:
            self.learnt = self._learnt() if evaluation.learns else None
            self.answered = Answered(job.name, job.rows, evaluation.batch_size, job.metric, self._journal)
        except BaseException:  # the method or a plugin's metric has failed
            self.close()
            raise

    def _learnt(self) -> dict[str, Any]:
        """What the method learns; it learns once, even if the run is interrupted."""
        for record in self._journal.records:
            if "learnt" in record:
                kept: dict[str, Any] = record["learnt"]
                return kept
        found: dict[str, Any] = json.loads(json.dumps(self._evaluation.learn(self.plan.job)))
        self._journal.append({"learnt": found})
        return found

    def close(self) -> None:
        """Releases the journal for other processes."""
        self._journal.close()

    def write(self) -> dict[str, object]:
        """Writes the result, when all rows are answered, and returns the files' content by name.

        Raises:
            UsageError: the result of another run has appeared in its place.
            StorageError: it cannot be written.
        """
        job, facts, result = self.plan.job, self._evaluation.facts, self.answered.result()
        found_out = dict(self.found_out or {})
        if self.found_out is not None and self._evaluation.learns:
            found_out["train_rows_also_tested"] = tested_too(job.train, job.rows)
        record = run_record(
            options=facts.options,
            pool=facts.pool,
            dataset=job.name,
            metric=job.metric,
            data_file=job.file,
            data_sha256=job.sha256,
            rows=len(job.rows),
            device=facts.device,
            started=self._began,
            seconds=result.seconds["inference"],
            identity=self.plan.identity,
            found_out=found_out,
            environment=self.plan.environment,
        )
        files = result_files(
            result,
            job.rows,
            strategy=facts.signal,
            loading_seconds=facts.loading,
            run=record,
            seed=self._evaluation.seed,
        )
        check_place(self.plan)
        write_results(self.plan.folder, files)
        journal_of(self.plan.folder).unlink(missing_ok=True)  # while this process still has it
        return files


@dataclass(frozen=True)
class Session(Evaluation):
    """An engine in this process with its options; datasets are answered one after the other.

    Attributes:
        logo: the engine.
        base_model: as the user names it.
        pool: SHA-256 by name of the adapters in use.
        seed, batch_size, max_new_tokens, method: as in `Evaluation`.
        generation: further options of `LoGo.generate`.
        options: every option of the command, for `run.json`.
        loading: seconds that opening the engine took.
    """

    logo: LoGo
    base_model: str
    pool: Mapping[str, str]
    seed: int
    batch_size: int
    max_new_tokens: int
    generation: Mapping[str, Any] = field(default_factory=dict)
    options: Mapping[str, Any] = field(default_factory=dict)
    loading: float = 0.0
    method: Method | None = None

    def generate(
        self, prompts: list[str | Conversation], *, max_new_tokens: int, batch_size: int
    ) -> Sequence[Generation]:
        """Answers prompts with this session's options; what `logo.evaluation.runner` asks of an engine."""
        return self.logo.generate(prompts, max_new_tokens=max_new_tokens, batch_size=batch_size, **self.generation)

    @cached_property
    def facts(self) -> Facts:
        return Facts(
            identity=engine_identity(self.logo, self.base_model, self.generation),
            environment=environment(self.logo),
            pool=dict(self.pool),
            order=order_dependence(self.logo, self.generation),
            device=self._device,
            signal=self.logo.settings.signal,
            options=self.options,
            loading=self.loading,
        )

    def results(
        self, plans: Sequence[Plan], on_progress: Callable[[Plan, int], None] | None = None
    ) -> Iterator[tuple[Plan, dict[str, object]]]:
        report = on_progress or (lambda one, done: None)
        for one in plans:
            with closing(Underway(self, one)) as dataset:
                engine = self.answering(one.job, dataset.learnt)
                dataset.found_out = engine.record if isinstance(engine, Answering) else None
                dataset.answered.complete(engine, self.max_new_tokens, functools.partial(report, one))
                files = dataset.write()
            yield one, files

    def learn(self, job: Dataset) -> dict[str, Any]:
        method = self.method
        if not isinstance(method, Learned):
            raise RuntimeError("this session's method learns nothing")
        self._begin()
        return method.learn(self.logo, self._task(job, job.train))

    def answering(self, job: Dataset, learnt: Mapping[str, Any] | None = None) -> Session | Answering:
        """The session or method that answers a dataset, without state of earlier datasets.

        Args:
            learnt: what the method has learnt about it, if it learns.
        """
        self._begin()
        if self.method is None:
            return self
        prepared = None
        if learnt is not None and isinstance(self.method, Learned):
            prepared = self.method.recall(learnt)
        return Answering(self.logo, self.method, self._task(job), prepared=prepared, **self.generation)

    @property
    def _device(self) -> str:
        import torch

        device = self.logo.devices[0]
        return f"{device} ({torch.cuda.get_device_name(device)})" if device.type == "cuda" else str(device)

    def _task(self, job: Dataset, train: Sequence[Row] = ()) -> Task:
        return Task(
            job.name,
            prompts=[row.context for row in job.rows],
            train=train,
            adapters=[row.adapter for row in job.rows],
        )

    def _begin(self) -> None:
        import torch

        torch.manual_seed(self.seed)
        self.logo.restart()
