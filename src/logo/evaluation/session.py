"""One engine under one set of options, and the datasets it answers: each is planned, answered, judged and written.

What a command or a sweep needs between opening an engine and showing numbers. A dataset's result does not depend on
those before it: the seed is set anew and the engine forgets its prompts.
"""

from __future__ import annotations

import functools
import warnings
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from datetime import datetime, timezone
from functools import cached_property
from typing import TYPE_CHECKING, Any

from logo.baselines.method import Answering, Learned, Task
from logo.errors import UsageError
from logo.evaluation.identity import engine_identity, environment, order_dependence, rows_digest
from logo.evaluation.jobs import Job, train_rows, trained_and_tested
from logo.evaluation.results import LOGO, result_files, run_record, write_results
from logo.evaluation.resume import (
    Learnt,
    Plan,
    Wish,
    check_place,
    environments,
    finish,
    learn_once,
    open_journal,
    part_of,
    plan,
)
from logo.evaluation.runner import collect, evaluate

if TYPE_CHECKING:
    from logo.baselines import Method
    from logo.calls import Calls
    from logo.decoder import Generation


@dataclass(frozen=True)
class Session:
    """An engine with all it is to be used with.

    Attributes:
        logo: the engine.
        base_model: as the user names it.
        pool: SHA-256 by name of the adapters in use.
        seed: of sampling and of intervals.
        batch_size: prompts at once; `max_new_tokens`: of each answer.
        generation: further options of `LoGo.generate`.
        options: every option of the command, for `run.json`.
        loading: seconds that opening the engine took.
        method: chooses adapters instead of the engine; None: the engine does.
    """

    logo: Calls
    base_model: str
    pool: Mapping[str, str]
    seed: int
    batch_size: int
    max_new_tokens: int
    generation: Mapping[str, Any] = field(default_factory=dict)
    options: Mapping[str, Any] = field(default_factory=dict)
    loading: float = 0.0
    method: Method | None = None

    def generate(self, prompts: list[str], *, max_new_tokens: int, batch_size: int) -> Sequence[Generation]:
        """Answers prompts with this session's options; what `logo.evaluation.runner` asks of an engine."""
        return self.logo.generate(prompts, max_new_tokens=max_new_tokens, batch_size=batch_size, **self.generation)

    def plans(self, jobs: Sequence[Job], wish: Wish | None = None) -> list[Plan]:
        """What is to be done about each job; looked at before the first one begins.

        Args:
            wish: what may become of what is there already; None: nothing of another run is touched.

        Raises:
            UsageError: a result or a journal of another run is there, or one that was begun in another environment; or
                rows depend on each other and cannot be cut into shards, or nobody said where the training rows are that
                the method needs.
            DataError: those training rows are missing or malformed.
        """
        for job in jobs if self._learns else ():
            self._warn_of_overlap(job)
        reason = order_dependence(self.logo, self.generation)
        if reason is not None and any(job.shard is not None for job in jobs):
            raise UsageError(f"shards: a row's result must not depend on other rows, but {reason}")
        return [
            plan(
                job,
                {**self._identity(job), "pool": dict(self.pool)},
                self._environment,
                wish=wish,
                in_order=reason is not None,
                learns=self._learns,
            )
            for job in jobs
        ]

    def run(self, plan: Plan, on_progress: Callable[[int], None] | None = None) -> dict[str, object]:
        """Answers what is not yet answered of a job, writes its result, and returns the files' content by name.

        Args:
            on_progress: gets the number of rows done so far.

        Raises:
            UsageError: another process is on this job, or the result of another run has appeared in its place.
            LoGoError: as `logo.evaluation.runner.evaluate`; the journal stays, and an earlier result.
            StorageError: journal or result cannot be written.
        """
        job = plan.job
        rows = [job.rows[place] for place in job.places]
        began = datetime.now(timezone.utc)
        engine, learnt = self._answering(plan)
        with open_journal(plan, learnt) as journal:
            if rows:
                result = evaluate(
                    engine,
                    rows,
                    dataset=job.dataset,
                    metric=job.metric,
                    batch_size=self.batch_size,
                    max_new_tokens=self.max_new_tokens,
                    journal=journal,
                    on_progress=on_progress,
                )
            else:  # more shards than blocks
                result = collect(job.dataset, [], inference=0.0, metric=job.metric)
            record = run_record(
                options=self.options,
                pool=self.pool,
                dataset=job.dataset,
                metric=job.metric,
                data_file=job.file,
                data_sha256=job.sha256,
                rows=len(rows),
                device=self._device,
                started=began,
                seconds=result.seconds["inference"],
                identity=self._identity(job),
                shard=part_of(job),
                found_out={**engine.record, **self._overlap(job)} if isinstance(engine, Answering) else {},
                learnt=None if learnt is None else learnt.sha256,
                environments=environments(plan, journal, learnt),
                folding=self.logo.folding,
            )
            strategy = self.logo.settings.signal
            files = result_files(
                result, rows, strategy=strategy, loading_seconds=self.loading, run=record, seed=self.seed
            )
            check_place(job, plan.run, plan.keep_both)
            write_results(job.folder, files)
            finish(plan)  # while no other process can have the journal
        return files

    @cached_property
    def _engine(self) -> dict[str, Any]:
        return engine_identity(self.logo, self.base_model, self.generation)

    @cached_property
    def _environment(self) -> dict[str, str]:
        return environment(self.logo)

    @property
    def _learns(self) -> bool:
        """Whether the method looks at labelled training rows."""
        return isinstance(self.method, Learned)

    def _overlap(self, job: Job) -> dict[str, int]:
        """For `run.json`: training rows that the method may learn from and that are answered too."""
        return {"train_rows_also_tested": trained_and_tested(job)} if self._learns else {}

    def _warn_of_overlap(self, job: Job) -> None:
        shared = trained_and_tested(job)
        if shared and self.method is not None:
            warnings.warn(
                f"dataset {job.dataset!r}: {shared} of its {len(train_rows(job))} training rows are test rows too "
                f"(they have the same context), and method {self.method.name!r} learns from training rows: its result "
                "may be too good",
                UserWarning,
                stacklevel=2,
            )

    @property
    def _device(self) -> str:
        import torch

        device = self.logo.devices[0]
        return f"{device} ({torch.cuda.get_device_name(device)})" if device.type == "cuda" else str(device)

    def _identity(self, job: Job) -> dict[str, Any]:
        return {
            **self._engine,
            **({"train_sha256": rows_digest(train_rows(job))} if self._learns else {}),
            "method": {"method": LOGO} if self.method is None else self.method.as_dict(),
            "seed": self.seed,
            "max_new_tokens": self.max_new_tokens,
            "dataset": job.dataset,
            "metric": job.metric,
            "rows": len(job.rows),
            "rows_sha256": rows_digest(job.rows),
        }

    def _answering(self, plan: Plan) -> tuple[Session | Answering, Learnt | None]:
        """What answers this dataset, with nothing left over from those before, and what was learnt for it."""
        self._begin()
        if self.method is None:
            return self, None
        task = self._task(plan.job)
        if not isinstance(self.method, Learned):
            return Answering(self.logo, self.method, task, **self.generation), None
        learnt = learn_once(plan, functools.partial(self._learn, self.method, task))
        self._begin()  # as if it had been learnt long ago
        prepared = self.method.recall(learnt.content)
        return Answering(self.logo, self.method, task, prepared=prepared, **self.generation), learnt

    def rehearsal(self, job: Job) -> Session | Answering:
        """What answers this dataset when it is run; here nothing is kept, not even what a method learns."""
        self._begin()
        if self.method is None:
            return self
        return Answering(self.logo, self.method, self._task(job), **self.generation)

    def _task(self, job: Job) -> Task:
        return Task(
            job.dataset,
            prompts=[row.context for row in job.rows],
            train=train_rows(job) if self._learns else (),
            adapters=[row.adapter for row in job.rows],
        )

    def _learn(self, method: Learned, task: Task) -> dict[str, Any]:
        self.logo.merge = method.merging
        return method.learn(self.logo, task)

    def _begin(self) -> None:
        import torch

        torch.manual_seed(self.seed)
        self.logo.restart()
