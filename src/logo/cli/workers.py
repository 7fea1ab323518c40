"""Options of commands whose rows several processes answer, and the processes."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from rich.progress import Progress, TaskID

from logo.adapters.pool import AdapterPool
from logo.backends.cluster import Layout
from logo.cli.choices import Preset
from logo.cli.opening import open_pool
from logo.cli.options import EngineOptions, rare, usual
from logo.cli.output import note
from logo.cli.places import PROCESSES, Cpus, Gpus, Ray, processes, starting
from logo.errors import DataError

if TYPE_CHECKING:
    from logo.backends.ray import Workers
    from logo.evaluation.resume import Plan
    from logo.evaluation.session import Evaluation


@dataclass(frozen=True)
class WorkerOptions:
    """Several processes, on this machine or on a cluster."""

    workers: int | None = usual(
        None, "Processes that answer, each with the model (needs Ray).", False, metavar="N", min=1
    )
    ray: Ray = None
    gpus_per_worker: Gpus = None
    cpus_per_worker: Cpus = None
    deadline: float = rare(
        3600.0,
        "Seconds that one batch may take before its process is ended and another one gets the batch.",
        panel=PROCESSES,
    )


def layout_of(options: WorkerOptions, engine: EngineOptions) -> Layout | None:
    """The worker processes that the options ask for; None: this process answers."""
    needed, deadline = "--workers or --ray", options.deadline
    return processes(options, engine, options.workers, "workers", "worker", needed, "deadline", deadline=deadline)


def only(pool: AdapterPool, names: Sequence[str]) -> AdapterPool:
    """The adapters of these names, as far as the pool has them.

    Raises:
        DataError: the pool has none of them.
    """
    found = [name for name in pool.names if name in set(names)]
    if not found:
        raise DataError(f"pool: expected adapters named like the rows' tasks ({', '.join(names[:3])}, ...), found none")
    return pool.subset(found)


def opened(
    layout: Layout,
    options: EngineOptions,
    base_model: str,
    open_: Callable[[], Any],
    describe: Callable[[Any], Any],
    preset: Preset | None = None,
    among: Sequence[str] | None = None,
) -> Workers[Any]:
    """Starts worker processes, and returns them when those that there is room for are ready.

    Args:
        options, base_model, preset: of the pool that they have to have open.
        open_, describe: as `Workers`.
        among: they use the adapters of these names only; None: all.
    """
    from logo.backends.ray import Workers
    from logo.evaluation.workers import differs

    whole_pool = open_pool(options, base_model, preset)
    pool = (whole_pool if among is None else only(whole_pool, among)).sha256()
    whole = "skip" not in (options.on_bad_adapter, options.unscorable)
    note(starting(layout, "workers"))
    workers: Workers[Any] = Workers(layout, open_, describe, differs(pool, whole=whole))
    return workers


def progress_of(bar: Progress, session: Evaluation, plans: Sequence[Plan]) -> Callable[[Plan, int], None]:
    """A function that shows a session's progress: a bar for each dataset, or one bar for all if workers answer."""
    from logo.evaluation.workers import InWorkers

    tasks: dict[int, TaskID] = {}
    done: dict[int, int] = {}

    def of_one(plan: Plan, count: int) -> None:
        if id(plan) not in tasks:
            tasks[id(plan)] = bar.add_task(plan.job.dataset, total=len(plan.job.rows))
        bar.update(tasks[id(plan)], completed=count)

    if not isinstance(session, InWorkers):
        return of_one
    workers = session.workers
    total = sum(len(plan.job.rows) for plan in plans if not plan.done)
    task = bar.add_task("workers", total=total)

    def of_all(plan: Plan, count: int) -> None:
        done[id(plan)] = count
        speeds = " · ".join(f"{name.split()[-1]}: {speed:.2f}/s" for name, speed in list(workers.speeds.items())[:8])
        bar.update(task, completed=sum(done.values()), description=f"workers {speeds}")

    return of_all
