"""`logo eval run` and the official `logo evaluate`: datasets through the engine, with official metrics and files."""

from __future__ import annotations

import functools
import time
from collections.abc import Sequence
from contextlib import ExitStack, closing
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer
from rich.markup import escape

from logo.cli.forecast import forecast
from logo.cli.forecast import show as show_forecast
from logo.cli.methods import MethodOptions, make_method
from logo.cli.opening import asked_k, open_any
from logo.cli.options import (
    OFFICIAL_SIGNAL,
    Choice,
    Context,
    Engine,
    EngineOptions,
    Preset,
    RunnerOptions,
    expanded,
)
from logo.cli.output import err, note, progress
from logo.cli.places import absolute, anywhere, everywhere
from logo.cli.scoreboard import Score, show
from logo.cli.workers import WorkerOptions, layout_of, opened, progress_of
from logo.errors import UsageError
from logo.evaluation.metrics import Kind, checked_kind

if TYPE_CHECKING:
    from logo.backends.cluster import Layout
    from logo.baselines import Method
    from logo.calls import Calls
    from logo.evaluation.jobs import Job
    from logo.evaluation.resume import Plan
    from logo.evaluation.session import Evaluation, Session
    from logo.evaluation.workers import Answerer, Incomplete, InWorkers

OFFICIAL_BASE = "Llama-3.1-8B"
VLLM_BATCH = 256

# The help of `logo evaluate`, which stays as it is: the official script's names and defaults.
OFFICIAL = """`logo eval run` under the official script's names of options.

Example: `logo evaluate --dataset bbh.boolean_expressions --base_model Llama-3.1-8B --gpu 0`
"""


class Metric(Choice):
    EM = "em"
    EM_MULTI = "em_multi"
    EM_FIRST = "em_first"
    BLEU = "bleu"
    ROUGE = "rouge"


@dataclass(frozen=True)
class RowOptions:
    """What is evaluated, and how it is answered."""

    dataset: Annotated[
        str, typer.Option(help="Name, list `a,b` or pattern `bbh.*`; empty: all in the data folder.")
    ] = ""
    data_dir: Annotated[str, typer.Option(help="Rows are read from DATA_DIR/main/sub/test.jsonl.")] = "./data"
    rows: Annotated[
        str | None,
        typer.Option(
            metavar="DIR",
            help="Instead of a data folder: a folder of NAME.jsonl, one dataset each.",
            show_default="none",
        ),
    ] = None
    train_rows: Annotated[
        str | None,
        typer.Option(
            metavar="DIR",
            help="Folder of NAME.jsonl with training rows, for methods that need some.",
            show_default="train.jsonl beside test.jsonl",
        ),
    ] = None
    metric: Annotated[
        Metric | None,
        typer.Option(
            help="What answers are worth, for all datasets: `em_first` is exact match with the first gold text, `em` "
            "and `em_multi` with any of them.",
            show_default="what NAME.yaml says beside NAME.jsonl, else by the dataset's name",
        ),
    ] = None
    limit: Annotated[int | None, typer.Option(help="Only the first rows of each dataset.", show_default="all")] = None
    batch_size: Annotated[
        int,
        typer.Option(
            help="Prompts per forward pass, halved if memory does not suffice; `--probe-context carry` still probes "
            "one by one, and `--engine vllm` is given 256 at once.",
            min=1,
        ),
    ] = 1
    max_new_tokens: Annotated[int, typer.Option(help="Longest answer, in tokens.", min=1)] = 256
    generation_early_stop: Annotated[
        bool, typer.Option("--generation-early-stop", help="Stop generating at the first newline.")
    ] = False
    overwrite: Annotated[
        bool,
        typer.Option(
            "--overwrite", help="Begin again, whatever is done or half done already, even if it is another run's."
        ),
    ] = False
    mix_environments: Annotated[
        bool,
        typer.Option("--mix-environments", help="Go on with what other versions or another kind of device have begun."),
    ] = False


@dataclass(frozen=True)
class RunOptions(RowOptions):
    """The same, and where results go."""

    result_dir: Annotated[str, typer.Option(help="Where result folders are made.")] = "results"
    seed: Annotated[int, typer.Option(help="Random seed; part of the result folder's name.", min=0)] = 0
    shard: Annotated[
        str | None,
        typer.Option(
            metavar="I/N",
            help="Answer only part I of N; `logo eval merge` puts the parts together.",
            show_default="all rows",
        ),
    ] = None
    run_name: Annotated[
        str | None,
        typer.Option(
            metavar="NAME",
            help="Added to the result folder's name, to keep several runs beside each other.",
            show_default="none",
        ),
    ] = None
    save_dir: Annotated[str, typer.Option(help="Accepted for the official command line; not used.", hidden=True)] = ""
    preset: Annotated[
        Preset | None,
        typer.Option(help="`official`: all as the authors' script does (see docs), so that numbers can be compared."),
    ] = None


@expanded
def evaluate(
    engine: EngineOptions,
    runner: RunnerOptions,
    run: RunOptions,
    method: MethodOptions,
    cluster: WorkerOptions,
    estimate: Annotated[
        bool,
        typer.Option("--estimate", help="Say what it takes (downloads, memory, rows, hours), and write no results."),
    ] = False,
    json: Annotated[bool, typer.Option("--json", help="Print JSON instead of the lines.")] = False,
) -> None:
    """Evaluate on datasets; writes one result folder for each.

    A run that was interrupted goes on where it stopped when the same command is given again; datasets that are done are
    not answered again.

    Example: `logo eval run --dataset bbh.boolean_expressions --base-model Llama-3.1-8B`
    """
    from logo.evaluation.identity import check_baseline
    from logo.evaluation.resume import ResumePolicy

    check_baseline(engine.baseline.value)
    base_model = engine.base_model or OFFICIAL_BASE
    engine = replace(
        engine,
        selection_strategy=engine.selection_strategy or OFFICIAL_SIGNAL,
        # What is remembered of other prompts would show in the last digits of scores, and in an interrupted run other
        # prompts came before.
        prefix_cache_gb=0.0 if engine.prefix_cache_gb is None else engine.prefix_cache_gb,
    )
    if runner.engine is Engine.VLLM:
        if estimate:
            raise UsageError("--estimate: what the engine 'vllm' takes is said by `logo plan`")
        # Rows run together as vLLM schedules them: it is given many at once.
        run = replace(run, batch_size=max(run.batch_size, VLLM_BATCH))
    chosen = _method(method, engine, run)
    layout = layout_of(cluster, engine)
    if layout is not None and _carries(engine, run):
        raise UsageError("workers: with --probe-context carry a row depends on the row before; answer rows in one go")
    jobs = _jobs(engine, run, chosen, base_model, writes=not estimate)
    if estimate:
        opened = functools.partial(_open, engine, runner, run, chosen, base_model)
        picks = None if chosen is None else chosen.picks
        found = forecast(engine, base_model, run.preset, jobs, run.batch_size, run.max_new_tokens, opened, picks)
        show_forecast(found, json=json)
        return
    with ExitStack() as stack:
        session: Evaluation
        if layout is None:
            session = _open(engine, runner, run, chosen, base_model)
            stack.enter_context(closing(session.logo))
        else:
            session = _in_workers(layout, engine, runner, run, chosen, base_model)
            stack.enter_context(session.workers)
        plans = session.plans(jobs, ResumePolicy(run.overwrite, run.mix_environments))
        scores, lost = _answered(session, plans, json=json)
    if lost is not None:
        err.print(f"logo: error: {lost}", markup=False)
    if scores:
        show(scores, json=json)
    if lost is not None:
        raise typer.Exit(1)


def _answered(session: Evaluation, plans: Sequence[Plan], *, json: bool) -> tuple[list[Score], Incomplete | None]:
    """Scores of all datasets, shown as they come; and what has no answer, where workers were lost."""
    from logo.evaluation.workers import Incomplete

    for plan in plans:
        if plan.note and not plan.done:
            note(escape(f"{plan.job.dataset} is answered again: {plan.note}"))
    scores: list[Score] = []
    lost = None
    with progress(disable=not err.is_terminal) as bar:
        results = session.results([plan for plan in plans if not plan.done], progress_of(bar, session, plans))
        for plan in plans:
            try:
                score = _stored(plan) if plan.done else Score.of(*next(results))
            except Incomplete as error:  # the last that `results` says
                lost = error
                continue
            except StopIteration:  # another dataset is the one that is not complete
                continue
            except KeyboardInterrupt:
                note("What is done is kept: the same command goes on from there.")
                raise
            scores.append(score)
            if not json:
                heading = [score.dataset] if len(plans) > 1 else []
                print(*heading, score.line, score.folder, sep="\n", flush=True)
    return scores, lost


def _method(options: MethodOptions, engine: EngineOptions, run: RunOptions) -> Method | None:
    """None: the engine's own selection and the exact mixture, which need no method around them."""
    from logo.evaluation.results import LOGO

    method = make_method(options, k=engine.n_selected_modules, seed=run.seed)
    return None if method.label == LOGO else method


def _jobs(engine: EngineOptions, run: RunOptions, method: Method | None, base_model: str, *, writes: bool) -> list[Job]:
    """Everything that can be wrong with data and results, looked at before hours are spent."""
    from logo.evaluation.jobs import find_jobs
    from logo.evaluation.results import LOGO, run_folder
    from logo.evaluation.shards import Shard
    from logo.folders import check_writable
    from logo.pools import default_k

    shard = None if run.shard is None else Shard.parse(run.shard)
    if shard is not None and _carries(engine, run):
        raise UsageError("shard: with --probe-context carry a row depends on the row before; answer all rows in one go")
    k = asked_k(engine, run.preset) or default_k(base_model, engine.adapters)
    k = k if method is None or method.picks is None else method.picks
    label = LOGO if method is None else method.label
    folder = run_folder(run.result_dir, base_model, str(engine.selection_strategy), k, run.seed, label, run.run_name)
    jobs, missing = find_jobs(
        folder,
        run.dataset,
        data_dir=run.data_dir,
        rows=run.rows,
        train_rows=run.train_rows,
        limit=run.limit,
        metric=metric_of(run),
        official=run.preset is Preset.OFFICIAL,
    )
    if missing:
        err.print(f"logo: warning: not in {run.data_dir}, left out: {', '.join(missing)}", markup=False)
    first = [job.dataset for job in jobs if job.metric == "em_first"]
    if first:
        err.print(
            f"logo: warning: {', '.join(first)}: answers are compared with the first gold text only, as the official "
            "script does; --metric em_multi accepts any of them",
            markup=False,
        )
    for place in (Path(run.result_dir), folder) if writes else ():
        if place != folder or folder.exists():
            check_writable(place)
    return jobs if shard is None else [job.cut(shard, run.batch_size) for job in jobs]


def metric_of(rows: RowOptions) -> Kind | None:
    """The metric that the user asked for."""
    return None if rows.metric is None else checked_kind(rows.metric.value, "--metric")


def _carries(engine: EngineOptions, run: RunOptions) -> bool:
    if engine.probe_context is None:
        return run.preset is Preset.OFFICIAL
    return engine.probe_context is Context.CARRY


def _open(
    engine: EngineOptions, runner: RunnerOptions, run: RunOptions, method: Method | None, base_model: str
) -> Session:
    from logo.evaluation.identity import pool_digests
    from logo.evaluation.results import LOGO
    from logo.evaluation.session import Session
    from logo.mixing import EXACT
    from logo.opening import OFFICIAL_TRUNCATION

    official = run.preset is Preset.OFFICIAL
    started = time.perf_counter()
    truncation = OFFICIAL_TRUNCATION if official else None
    merge = EXACT if method is None else method.merging
    logo = open_any(engine, runner, base_model, preset=run.preset, truncation=truncation, merge=merge)
    pool = pool_digests(logo)
    loading = time.perf_counter() - started
    asked = {"base_model": base_model, **asdict(engine), **asdict(runner), **asdict(run)}
    named = {"method": LOGO if method is None else method.label, "merge": logo.merge.kind}
    return Session(
        logo,
        base_model,
        pool=pool,
        seed=run.seed,
        batch_size=run.batch_size,
        max_new_tokens=run.max_new_tokens,
        generation=_generation_options(logo, official, run.generation_early_stop),
        options={**asked, **resolved(logo), **named},
        loading=loading,
        method=method,
    )


def _in_workers(
    layout: Layout,
    engine: EngineOptions,
    runner: RunnerOptions,
    run: RunOptions,
    method: Method | None,
    base_model: str,
) -> InWorkers:
    from logo.evaluation.workers import InWorkers, facts_of

    open_ = functools.partial(_answerer, everywhere(engine), runner, run, anywhere(method), absolute(base_model))
    workers = opened(layout, engine, base_model, open_, facts_of, run.preset)
    return InWorkers(
        workers,
        workers.description,
        seed=run.seed,
        batch_size=run.batch_size,
        max_new_tokens=run.max_new_tokens,
        method=method,
    )


def _answerer(
    engine: EngineOptions, runner: RunnerOptions, run: RunOptions, method: Method | None, base_model: str
) -> Answerer:
    """What a worker opens."""
    from logo.evaluation.workers import Answerer

    session = _open(engine, runner, run, method, base_model)
    return Answerer(lambda key: session)


def _stored(plan: Plan) -> Score:
    """A result that was there."""
    from logo.evaluation.results import read_results

    under = f"; it was answered under other versions or on another kind of device: {plan.note}" if plan.note else ""
    note(escape(f"{plan.job.dataset} is done already (--overwrite answers it again){under}"))
    return Score(plan.job.dataset, plan.job.folder, read_results(plan.job.folder), skipped=True)


def _generation_options(logo: Calls, official: bool, early_stop: bool) -> dict[str, Any]:
    if not official:
        return {"stop_at_newline": early_stop}
    return {
        "stop_at_newline": "official" if early_stop else False,
        "generation_config": logo.model.generation_config,
    }


def resolved(logo: Calls) -> dict[str, Any]:
    """The settings as they were used, presets applied."""
    points = list(logo.points)
    return {
        **asdict(logo.settings),
        "k": logo.k,
        "points": points,
        "dtype": str(logo.model.dtype).removeprefix("torch."),
    }
