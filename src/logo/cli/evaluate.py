"""`logo evaluate`: datasets through the engine, with the official metrics and result files."""

from __future__ import annotations

import functools
import time
from collections.abc import Sequence
from dataclasses import asdict, dataclass, replace
from datetime import datetime, timezone
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer
from rich.progress import Progress, TaskID

from logo.cli.options import OFFICIAL_SIGNAL, EngineOptions, Preset, expanded, open_engine
from logo.cli.output import err, print_json, progress

if TYPE_CHECKING:
    from logo.engine import Generation, LoGo
    from logo.evaluation.datasets import Row
    from logo.evaluation.runner import DatasetResult

OFFICIAL_BASE = "Llama-3.1-8B"


@dataclass(frozen=True)
class RunOptions:
    """What is evaluated, and where results go."""

    dataset: Annotated[
        str, typer.Option(help="Name, list `a,b` or pattern `bbh.*`; empty: all in the data folder.")
    ] = ""
    data_dir: Annotated[str, typer.Option(help="Rows are read from DATA_DIR/main/sub/test.jsonl.")] = "./data"
    result_dir: Annotated[str, typer.Option(help="Where result folders are made.")] = "results"
    seed: Annotated[int, typer.Option(help="Random seed; part of the result folder's name.")] = 0
    limit: Annotated[int | None, typer.Option(help="Only the first rows of each dataset.", show_default="all")] = None
    batch_size: Annotated[
        int, typer.Option(help="Prompts per forward pass; `--probe-context carry` still probes one by one.")
    ] = 1
    max_new_tokens: Annotated[int, typer.Option(help="Longest answer, in tokens.")] = 256
    generation_early_stop: Annotated[
        bool, typer.Option("--generation-early-stop", help="Stop generating at the first newline.")
    ] = False
    save_dir: Annotated[str, typer.Option(help="Accepted for the official command line; not used.", hidden=True)] = ""
    preset: Annotated[
        Preset | None,
        typer.Option(help="`official`: all as the authors' script does (see docs), so that numbers can be compared."),
    ] = None


@dataclass(frozen=True)
class Configured:
    """The engine with this run's generation options filled in."""

    logo: LoGo
    options: dict[str, Any]

    def generate(self, prompts: list[str], *, max_new_tokens: int, batch_size: int) -> Sequence[Generation]:
        return self.logo.generate(prompts, max_new_tokens=max_new_tokens, batch_size=batch_size, **self.options)


@dataclass(frozen=True)
class Job:
    """One dataset, read and checked before the model is loaded."""

    dataset: str
    rows: list[Row]
    file: Path
    sha256: str
    folder: Path


@expanded
def evaluate(
    engine: EngineOptions,
    run: RunOptions,
    json: Annotated[bool, typer.Option("--json", help="Print a JSON summary instead of the lines.")] = False,
) -> None:
    """Evaluate on datasets; writes one result folder for each.

    Example: `logo evaluate --dataset bbh.boolean_expressions --base_model Llama-3.1-8B --gpu 0`
    """
    from logo.decoding import Truncation
    from logo.evaluation.metrics import mean, metric_kind, summary_line
    from logo.evaluation.results import result_files, run_record, write_results

    base_model = engine.base_model or OFFICIAL_BASE
    engine = replace(engine, selection_strategy=engine.selection_strategy or OFFICIAL_SIGNAL)
    official = run.preset is Preset.OFFICIAL
    jobs = _jobs(engine, run, base_model)

    started = time.perf_counter()
    truncation = Truncation(2048, "right") if official else None
    logo = open_engine(engine, base_model, preset=run.preset, truncation=truncation)
    options = {"base_model": base_model, **asdict(engine), **asdict(run), **_resolved(logo)}
    digests = logo.pool.sha256()
    loading = time.perf_counter() - started
    configured = Configured(logo, _generation_options(logo, official, run.generation_early_stop))
    _seed(run.seed)

    summaries = []
    with progress(disable=not err.is_terminal) as bar:
        for job in jobs:
            result, record = _run(configured, job, run, bar)
            record |= {"options": options, "pool": {name: digests[name] for name in logo.names}}
            strategy = logo.settings.signal
            files = result_files(
                result, strategy=strategy, loading_seconds=loading, run=run_record(**record, device=_device_name(logo))
            )
            write_results(job.folder, files)
            kind = metric_kind(job.dataset)
            summaries.append({"dataset": job.dataset, **mean(kind, result.eval_results), "folder": str(job.folder)})
            if not json:
                heading = [job.dataset] if len(jobs) > 1 else []
                print(*heading, summary_line(kind, result.eval_results), job.folder, sep="\n", flush=True)
    if json:
        print_json(summaries)


def _jobs(engine: EngineOptions, run: RunOptions, base_model: str) -> list[Job]:
    """Everything that can be wrong with data and results, looked at before hours are spent."""
    from logo.evaluation.datasets import dataset_file, file_sha256, find_datasets, load_rows
    from logo.evaluation.folders import check_writable
    from logo.evaluation.results import result_folder

    found = find_datasets(run.data_dir, run.dataset)
    if found.missing:
        err.print(f"logo: warning: not in {run.data_dir}, left out: {', '.join(found.missing)}", markup=False)
    jobs = []
    for name in found.names:
        folder = result_folder(run.result_dir, base_model, str(engine.selection_strategy), engine.k, run.seed, name)
        file = dataset_file(run.data_dir, name)
        jobs.append(Job(name, load_rows(run.data_dir, name, run.limit), file, file_sha256(file), folder))
    check_writable(run.result_dir)
    for parent in {job.folder.parent for job in jobs if job.folder.parent.exists()}:
        check_writable(parent)
    return jobs


def _run(engine: Configured, job: Job, run: RunOptions, bar: Progress) -> tuple[DatasetResult, dict[str, Any]]:
    """Answers one dataset; returns the result and what `run_record` has to know about it."""
    from logo.evaluation.runner import evaluate as evaluate_rows

    task = bar.add_task(job.dataset, total=len(job.rows))
    began = datetime.now(timezone.utc)
    result = evaluate_rows(
        engine,
        job.rows,
        dataset=job.dataset,
        batch_size=run.batch_size,
        max_new_tokens=run.max_new_tokens,
        on_progress=functools.partial(_advance, bar, task),
    )
    return result, {
        "dataset": job.dataset,
        "data_file": job.file,
        "data_sha256": job.sha256,
        "rows": len(job.rows),
        "started": began,
        "seconds": result.seconds["inference"],
    }


def _advance(bar: Progress, task: TaskID, done: int) -> None:
    bar.update(task, completed=done)


def _generation_options(logo: LoGo, official: bool, early_stop: bool) -> dict[str, Any]:
    if not official:
        return {"stop_at_newline": early_stop}
    return {
        "stop_at_newline": "official" if early_stop else False,
        "generation_config": logo.model.generation_config,
    }


def _seed(seed: int) -> None:
    import torch

    torch.manual_seed(seed)


def _resolved(logo: LoGo) -> dict[str, Any]:
    """The settings as they were used, presets applied."""
    points = [point.name for point in logo.router.points]
    return {**asdict(logo.settings), "points": points, "dtype": str(logo.model.dtype).removeprefix("torch.")}


def _device_name(logo: LoGo) -> str:
    import torch

    device = logo.model.device
    return f"{device} ({torch.cuda.get_device_name(device)})" if device.type == "cuda" else str(device)
