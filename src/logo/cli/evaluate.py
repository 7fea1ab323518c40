"""`logo eval run` and the official `logo evaluate`: datasets through the engine, with official metrics and files."""

from __future__ import annotations

import functools
import operator
import time
from collections.abc import Sequence
from contextlib import ExitStack, closing
from dataclasses import asdict, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

from rich.progress import TaskID

from logo.cli.belonging import check_method_options
from logo.cli.cluster import WorkerOptions, absolute, anywhere, everywhere, expected
from logo.cli.evaluate_options import Asked, RunOptions, as_evaluated
from logo.cli.expanded import command_line, given
from logo.cli.methods import MethodOptions, make_method
from logo.cli.opening import open_any
from logo.cli.options import EngineOptions, Json, RunnerOptions
from logo.cli.output import check_writable, err, note, progress
from logo.cli.scoreboard import Score, show
from logo.cluster.processes import Layout
from logo.errors import UsageError
from logo.evaluation.metrics import checked_kind

if TYPE_CHECKING:
    from logo.baselines import Method
    from logo.cluster.rows import Answerer
    from logo.engine import LoGo
    from logo.evaluation.datasets import Dataset
    from logo.evaluation.resume import Plan
    from logo.evaluation.session import Evaluation, Session

OFFICIAL_BASE = "Llama-3.1-8B"
VLLM_BATCH = 256

# The help of `logo evaluate`, which stays as it is: the official script's names and defaults.
OFFICIAL = """Evaluate on datasets, with the option names of the official script.

Example: `logo evaluate --dataset bbh.boolean_expressions --base_model Llama-3.1-8B --gpu 0`
"""


def evaluate(
    engine: EngineOptions,
    runner: RunnerOptions,
    run: RunOptions,
    method: MethodOptions,
    cluster: WorkerOptions,
    json: Json = False,
) -> None:
    """Evaluate on datasets, with one result folder for each.

    Repeat the command to continue an interrupted run; finished datasets are not answered again.

    Example: `logo eval run --dataset bbh.boolean_expressions --base-model Llama-3.1-8B`
    """
    base_model = engine.base_model or OFFICIAL_BASE
    engine = as_evaluated(engine)
    if runner.engine == "vllm":
        # vLLM schedules rows itself, so it gets many at once, unless the user says how many.
        several = max(1, VLLM_BATCH // (cluster.workers or 1))
        run = replace(run, batch_size=run.batch_size if "batch_size" in given() else several)
    asked = Asked(engine, runner, run, _method(method, engine, run), base_model, command_line())
    layout = cluster.layout(engine)
    if layout is not None and asked.carries:
        raise UsageError("workers: with --probe-context carry each row depends on the one before; use one process")
    folder, jobs = _jobs(asked)
    with ExitStack() as stack:
        session: Evaluation
        if layout is None:
            session = _open(asked)
            stack.enter_context(closing(session.logo))
        else:
            session = _in_workers(layout, asked, stack)
        scores = _answered(session, session.plans(jobs, folder, overwrite=run.overwrite), json=json)
    show(scores, json=json)


def _answered(session: Evaluation, plans: Sequence[Plan], *, json: bool) -> list[Score]:
    """The scores of all datasets, printed as they come."""
    for plan in plans:
        if plan.note and not plan.done:
            note(f"{plan.job.name} is answered again: {plan.note}")
    scores: list[Score] = []
    with progress(disable=not err.is_terminal) as bar:
        tasks: dict[int, TaskID] = {}

        def advanced(plan: Plan, count: int) -> None:
            if id(plan) not in tasks:
                tasks[id(plan)] = bar.add_task(plan.job.name, total=len(plan.job.rows))
            bar.update(tasks[id(plan)], completed=count)

        results = session.results([plan for plan in plans if not plan.done], advanced)
        for plan in plans:
            try:
                score = _stored(plan) if plan.done else Score.of(*next(results))
            except KeyboardInterrupt:
                note("Finished rows are kept: repeat the command to continue.")
                raise
            scores.append(score)
            if not json:
                heading = [score.dataset] if len(plans) > 1 else []
                print(*heading, score.line, score.folder, sep="\n", flush=True)
    return scores


def _method(options: MethodOptions, engine: EngineOptions, run: RunOptions) -> Method | None:
    """The method; None for the engine's own selection."""
    from logo.evaluation.results import LOGO

    method = make_method(options, k=engine.n_selected_modules, seed=run.seed)
    check_method_options([method])
    return None if method.name == LOGO else method


def _jobs(asked: Asked) -> tuple[Path, list[Dataset]]:
    """The run's folder, and the datasets that the options name. Errors in data and result folders are raised here,
    before the long part of the work."""
    from logo.evaluation.datasets import find_datasets
    from logo.evaluation.results import LOGO, run_folder

    run, method = asked.run, asked.method
    label = LOGO if method is None else method.name
    folder = run_folder(
        run.result_dir, asked.base_model, str(asked.engine.signal), asked.k, run.seed, label, run.run_name
    )
    if run.rows is not None and run.data_dir != RunOptions.data_dir:
        raise UsageError(f"--data_dir {run.data_dir} and --rows {run.rows}: expected one of them, found both")
    jobs = find_datasets(
        run.data_dir if run.rows is None else run.rows,
        run.dataset,
        train_rows=run.train_rows,
        limit=run.limit,
        metric=None if run.metric is None else checked_kind(run.metric, "--metric"),
        official=asked.official,
    )
    first = [job.name for job in jobs if job.metric == "em_first"]
    if first:
        err.print(
            f"logo: warning: {', '.join(first)}: answers are compared with the first gold text only, as the official "
            "script does; --metric em_multi accepts any of them",
            markup=False,
        )
    for place in (Path(run.result_dir), folder):
        if place != folder or folder.exists():
            check_writable(place)
    return folder, jobs


def _open(asked: Asked) -> Session:
    from logo.evaluation.identity import pool_digests
    from logo.evaluation.results import LOGO
    from logo.evaluation.session import Session
    from logo.opening import OFFICIAL_TRUNCATION

    run, method, base_model = asked.run, asked.method, asked.base_model
    started = time.perf_counter()
    truncation = OFFICIAL_TRUNCATION if asked.official else None
    how: Any = {"preset": run.preset, "probe_context": run.probe_context, "truncation": truncation}
    logo = open_any(asked.engine, asked.runner, base_model, **how)
    pool = pool_digests(logo)
    loading = time.perf_counter() - started
    options = {"base_model": base_model, **asdict(asked.engine), **asdict(asked.runner), **asdict(run)}
    named = {"method": LOGO if method is None else method.name}
    return Session(
        logo,
        base_model,
        pool=pool,
        seed=run.seed,
        batch_size=run.batch_size,
        max_new_tokens=run.max_new_tokens,
        generation=_generation_options(logo, asked.official, run.generation_early_stop),
        options={**options, **resolved(logo), **named, "command": asked.command},
        loading=loading,
        method=method,
    )


def _in_workers(layout: Layout, asked: Asked, stack: ExitStack) -> Evaluation:
    from logo.cluster.rows import InWorkers
    from logo.cluster.workers import opened

    run = asked.run
    there = replace(
        asked, engine=everywhere(asked.engine), method=anywhere(asked.method), base_model=absolute(asked.base_model)
    )
    found = expected(layout, asked.engine, asked.base_model, run.preset)
    facts = operator.attrgetter("facts")
    return InWorkers(
        stack.enter_context(opened(layout, found, functools.partial(_answerer, there), facts)),
        seed=run.seed,
        batch_size=run.batch_size,
        max_new_tokens=run.max_new_tokens,
        method=asked.method,
    )


def _answerer(asked: Asked) -> Answerer:
    """What a worker opens."""
    from logo.cluster.rows import Answerer

    return Answerer(_open(asked))


def _stored(plan: Plan) -> Score:
    """The score of a dataset that was finished before; prints a note about it."""
    from logo.evaluation.results import read_results

    under = f"; it was answered under other versions or on another kind of device: {plan.note}" if plan.note else ""
    note(f"{plan.job.name} is done already (--overwrite answers it again){under}")
    return Score(plan.job.name, plan.folder, read_results(plan.folder), skipped=True)


def _generation_options(logo: LoGo, official: bool, early_stop: bool) -> dict[str, Any]:
    if not official:
        return {"stop_at_newline": early_stop}
    return {"stop_at_newline": "official" if early_stop else False, "generation_config": logo.model.generation_config}


def resolved(logo: LoGo) -> dict[str, Any]:
    """The settings as they were used, presets applied."""
    points = list(logo.points)
    return {
        **asdict(logo.settings),
        "probe_context": logo.probe_context,
        "k": logo.k,
        "points": points,
        "dtype": str(logo.model.dtype).removeprefix("torch."),
    }
