"""One engine under one set of options, and the datasets it answers: each is planned, answered, judged and written.

What a command or a sweep needs between opening an engine and showing numbers. A dataset's result does not depend on
those before it: the seed is set anew and the engine forgets its prompts.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from datetime import datetime, timezone
from functools import cached_property
from typing import TYPE_CHECKING, Any, Protocol

from logo.errors import UsageError
from logo.evaluation.identity import engine_identity, order_dependence, rows_digest
from logo.evaluation.jobs import Job
from logo.evaluation.results import LOGO, result_files, run_record, write_results
from logo.evaluation.resume import Plan, open_journal, part_of, plan
from logo.evaluation.runner import collect, evaluate

if TYPE_CHECKING:
    from logo.engine import Generation, LoGo
    from logo.selection.selector import Selection


class Method(Protocol):
    """Chooses adapters in the place of LoGo's own selection."""

    def prepare(self, job: Job) -> None:
        """Makes ready for a dataset, before the first of its prompts."""

    def select(self, prompts: list[str], batch_size: int) -> list[Selection]:
        """One selection per prompt."""


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
        method_name: its name; `method_options`: everything else that its choices depend on.
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
    method_name: str = LOGO
    method_options: Mapping[str, Any] = field(default_factory=dict)

    def generate(self, prompts: list[str], *, max_new_tokens: int, batch_size: int) -> Sequence[Generation]:
        """Answers prompts with this session's options; what `logo.evaluation.runner` asks of an engine."""
        started = time.perf_counter()
        chosen = None if self.method is None else self.method.select(prompts, batch_size)
        share = (time.perf_counter() - started) / len(prompts)
        answers = self.logo.generate(
            prompts, adapters=chosen, max_new_tokens=max_new_tokens, batch_size=batch_size, **self.generation
        )
        if chosen is None:
            return answers
        return [replace(answer, seconds={**answer.seconds, "select": share}) for answer in answers]

    def plans(self, jobs: Sequence[Job], *, overwrite: bool = False) -> list[Plan]:
        """What is to be done about each job; looked at before the first one begins.

        Raises:
            UsageError: a journal of another run lies in the way, or rows depend on each other and cannot be cut into
                shards.
        """
        reason = order_dependence(self.logo, self.generation)
        if reason is not None and any(job.shard is not None for job in jobs):
            raise UsageError(f"shards: a row's result must not depend on other rows, but {reason}")
        pool = dict(self.pool)
        return [
            plan(job, {**self._identity(job), "pool": pool}, overwrite=overwrite, in_order=reason is not None)
            for job in jobs
        ]

    def run(self, plan: Plan, on_progress: Callable[[int], None] | None = None) -> dict[str, object]:
        """Answers what is not yet answered of a job, writes its result, and returns the files' content by name.

        Args:
            on_progress: gets the number of rows done so far.

        Raises:
            LoGoError: as `logo.evaluation.runner.evaluate`; the journal stays, and an earlier result.
            StorageError: journal or result cannot be written.
        """
        job = plan.job
        rows = [job.rows[place] for place in job.places]
        began = datetime.now(timezone.utc)
        self._begin(job)
        with open_journal(plan) as journal:
            if rows:
                result = evaluate(
                    self,
                    rows,
                    dataset=job.dataset,
                    batch_size=self.batch_size,
                    max_new_tokens=self.max_new_tokens,
                    journal=journal,
                    on_progress=on_progress,
                )
            else:  # more shards than blocks
                result = collect(job.dataset, [], inference=0.0)
            record = run_record(
                options=self.options,
                pool=self.pool,
                dataset=job.dataset,
                data_file=job.file,
                data_sha256=job.sha256,
                rows=len(rows),
                device=self._device,
                started=began,
                seconds=result.seconds["inference"],
                identity=self._identity(job),
                shard=part_of(job),
            )
            strategy = self.logo.settings.signal
            files = result_files(
                result, rows, strategy=strategy, loading_seconds=self.loading, run=record, seed=self.seed
            )
            write_results(job.folder, files)
        journal.path.unlink(missing_ok=True)
        return files

    @cached_property
    def _engine(self) -> dict[str, Any]:
        return engine_identity(self.logo, self.base_model, self.generation)

    @property
    def _device(self) -> str:
        import torch

        device = self.logo.model.device
        return f"{device} ({torch.cuda.get_device_name(device)})" if device.type == "cuda" else str(device)

    def _identity(self, job: Job) -> dict[str, Any]:
        return {
            **self._engine,
            "method": self.method_name,
            "method_options": dict(self.method_options),
            "seed": self.seed,
            "max_new_tokens": self.max_new_tokens,
            "dataset": job.dataset,
            "rows_sha256": rows_digest(job.rows),
        }

    def _begin(self, job: Job) -> None:
        import torch

        torch.manual_seed(self.seed)
        self.logo.restart()
        if self.method is not None:
            self.method.prepare(job)
