"""`logo eval run` and the official `logo evaluate`: datasets through an engine, with official metrics and files."""

from __future__ import annotations

import math
import os
import time
from collections.abc import Callable, Sequence
from contextlib import ExitStack, closing
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, Literal

from cyclopts import Group, Parameter
from rich.text import Text

from logo.adapters.pool import DEFAULT_K
from logo.adapters.sources import default_k, pool_sources
from logo.cli.opening import DEFAULT_SIGNAL, MODEL_DIR, placed, quiet_transformers
from logo.cli.options import (
    Context,
    Engine,
    EngineOptions,
    MethodOptions,
    WorkerOptions,
    arguments,
    command_record,
    device_name,
    in_words,
    not_negative,
    positive,
)
from logo.cli.output import check_writable, err, note, plain_table, print_json, progress, screen, verbatim
from logo.cli.prompts import or_demo
from logo.errors import UsageError, listed
from logo.evaluation.datasets import Dataset, find_datasets, metric_choices
from logo.recorded import without_secrets

if TYPE_CHECKING:
    from rich.progress import Progress
    from rich.table import Table

    from logo.evaluation.answer import Opening
    from logo.evaluation.run import Done

VLLM_BATCH = 256  # rows that vLLM gets at once, since it schedules them itself
SHOWN = 20  # rows without an answer that are named
ROWS = Group("Rows and results", sort_key=2)


@Parameter(name="*")
@dataclass(frozen=True, kw_only=True)
class EvaluationOptions:
    """Which rows are answered, how, and where results are written."""

    dataset: Annotated[str, in_words("all in the data folder")] = ""
    """Name, list `a,b` or pattern `bbh.*`."""

    limit: Annotated[int | None, in_words("all", validator=positive)] = None
    """Only the first rows of each dataset."""

    batch_size: Annotated[int, Parameter(validator=positive)] = 1
    """Prompts per forward pass."""

    max_new_tokens: Annotated[int, Parameter(validator=positive)] = 256
    """Longest answer, in tokens."""

    result_dir: str = "results"
    """Folder for result folders."""

    overwrite: bool = False
    """Start again, replacing finished rows and a result of another run."""

    seed: Annotated[int, Parameter(validator=not_negative)] = 0
    """Random seed; part of the result folder's name."""


@Parameter(name="*", group=ROWS)
@dataclass(frozen=True, kw_only=True)
class RowOptions(EvaluationOptions):
    """The same, and what the official script does not know."""

    rows: Annotated[Path, Parameter(name=("--rows", "--data-dir"))] = Path("data")
    """Folder of main/sub/test.jsonl, or of NAME.jsonl."""

    dataset: Annotated[str, in_words("all in the folder of rows", name=("--tasks", "--dataset"))] = ""
    """Names or patterns, `a,b*`."""

    train_rows: Annotated[Path | None, in_words("beside test.jsonl")] = None
    """Folder of NAME.jsonl to learn from."""

    result_dir: Annotated[str, Parameter(name=("--save", "--result-dir"))] = "results"
    """Folder for result folders."""

    metric: Annotated[list[str] | None, in_words("of each dataset")] = None
    """em, em_multi, em_first, bleu, rouge or a plugin's; DATASET=METRIC for some (repeatable)."""

    run_name: Annotated[str, in_words("none")] = ""
    """Added to the result folder's name."""


def run(
    *,
    rows: RowOptions = RowOptions(),
    method: MethodOptions = MethodOptions(),
    runner: Annotated[Engine, Parameter(name="--engine")] = "local",
    engine_args: Annotated[str, in_words("none")] = "",
    workers: WorkerOptions = WorkerOptions(),
    json: bool = False,
    engine: EngineOptions = EngineOptions(),
) -> int:
    """Answer rows and score the answers, with one result folder for each dataset.

    Repeat the command to continue an interrupted run; finished datasets are not answered again.

    Example: logo eval run --rows data --tasks bbh.boolean_expressions --base-model Llama-3.1-8B

    Args:
        runner: What runs the model: this process, or vLLM.
        engine_args: With --engine vllm: options of vllm.LLM, such as `max_model_len=4096,enforce_eager=true`.
        json: Print scores and folders as JSON.
    """
    from logo.baselines.method import plain_value
    from logo.evaluation.answer import Opening

    workers.check(engine.device)
    base_model = or_demo(engine)
    command = command_record("eval run", rows, method, engine)
    options: dict[str, Any] = {
        "engine": runner,
        "k": engine.n_selected_modules,
        "signal": engine.signal or DEFAULT_SIGNAL,
        "when_unsure": engine.when_unsure,
        "prior": engine.prior,
        "encoder": engine.encoder,
        "dtype": engine.dtype,
        "model_dir": MODEL_DIR,
        **placed(engine.device),
    }
    if runner == "vllm":
        command["options"]["engine"] = runner
        # Set before it is imported, so that its messages stay out of this command's output.
        os.environ.setdefault("VLLM_LOGGING_LEVEL", "WARNING")
        os.environ.setdefault("VLLM_LOGGING_STREAM", "ext://sys.stderr")
    if engine_args:
        if runner != "vllm":
            raise UsageError("--engine-args is only for --engine vllm; leave it out")
        texts = arguments("--engine-args", engine_args)
        options["model_kwargs"] = {name: plain_value(text) for name, text in texts.items()}
        command["options"] |= without_secrets({"engine_args": engine_args})
    selecting = method.make(engine.n_selected_modules, rows.seed)
    opening = Opening(base_model, engine.sources, options, selecting, rows.max_new_tokens, rows.seed)
    datasets = find_datasets(
        rows.rows, rows.dataset, limit=rows.limit, metrics=metric_choices(rows.metric), train_rows=rows.train_rows
    )
    return answered(opening, datasets, rows, workers, command, run_name=rows.run_name, json=json)


@Parameter(name="*")
@dataclass(frozen=True, kw_only=True)
class OfficialOptions(EvaluationOptions):
    """The options of the official script, by their names there, and some of ours."""

    base_model: str = "Llama-3.1-8B"
    """Hub id, folder or short name."""

    gpu: Annotated[str, Parameter(name=("--gpu", "--device"), converter=device_name, n_tokens=1)] = "0"
    """GPU number, if there is one; -1 is the CPU."""

    selection_strategy: str = "norm"
    """`norm`, `entropy` or another signal."""

    n_selected_modules: Annotated[int, Parameter(name=("--n-selected-modules", "-k"), validator=positive)] = DEFAULT_K
    """Adapters selected per prompt."""

    generation_early_stop: bool = False
    """Stop generating at the first newline."""

    data_dir: str = "./data"
    """Rows are read from DIR/main/sub/test.jsonl."""

    model_dir: str = MODEL_DIR
    """Folder that is searched first for base models and adapters."""

    save_dir: Annotated[str, in_words("none")] = ""
    """Accepted, as by the script, and not used."""

    adapters: Annotated[list[str] | None, in_words("the base model's own")] = None
    """Folder, Hub repo or manifest of adapters; several with commas."""

    probe_context: Annotated[Context | None, in_words("base; with the preset: carry")] = None
    """Adapters active while probing: none, the whole pool, or as the official script runs."""

    preset: Literal["official"] | None = None
    """`official`: read and cut prompts exactly as the authors' script does."""


def evaluate(*, options: OfficialOptions = OfficialOptions()) -> int:
    """The paper's script: `logo eval run` with the authors' option names and defaults.

    Every option may also be written with hyphens: `--base-model` is the same as `--base_model`.

    Example: logo evaluate --dataset bbh.boolean_expressions --base_model Llama-3.1-8B --gpu 0
    """
    from logo.evaluation.answer import Opening

    engine: dict[str, Any] = {
        "preset": options.preset,
        "signal": options.selection_strategy,
        "k": options.n_selected_modules,
        "model_dir": options.model_dir,
        **placed(options.gpu),
    }
    if options.probe_context is not None:
        engine["probe_context"] = options.probe_context
    opening = Opening(
        options.base_model,
        None if options.adapters is None else ",".join(options.adapters),
        engine,
        max_new_tokens=options.max_new_tokens,
        seed=options.seed,
        stop_at_newline=options.generation_early_stop,
    )
    datasets = find_datasets(
        options.data_dir, options.dataset, limit=options.limit, official=options.preset == "official"
    )
    return answered(opening, datasets, options, WorkerOptions(), command_record("evaluate", options))


def answered(
    opening: Opening,
    datasets: Sequence[Dataset],
    options: EvaluationOptions,
    workers: WorkerOptions,
    command: dict[str, Any],
    *,
    run_name: str = "",
    json: bool = False,
) -> int:
    """Answers datasets, and prints the official line and the folder of each as it is done; returns the exit code."""
    from logo.evaluation.run import Run, answer_datasets, warn_of_copies

    # Of a method that picks the whole pool, the number of adapters is missing.
    folder = _run_folder(opening, options, run_name)
    for dataset in datasets:
        warn_of_copies(dataset, opening.method)
    check_writable(options.result_dir)
    if folder.exists():
        check_writable(folder)
    quiet_transformers()
    batch_size = options.batch_size
    if opening.options.get("engine") == "vllm" and batch_size == 1:
        batch_size = max(1, VLLM_BATCH // (workers.workers or 1))
    results: list[dict[str, Any]] = []
    with ExitStack() as stack, progress(disable=not err.is_terminal) as bars:
        began = time.perf_counter()
        facts, work = _opened(opening, workers, stack)
        loading = time.perf_counter() - began
        answering = Run(
            _run_folder(opening, options, run_name, pool_size=len(facts.identity["pool"])),
            facts,
            work,
            opening.method,
            batch_size=batch_size,
            overwrite=options.overwrite,
            loading=loading,
            command=command,
            tell=_shown_in(bars),
        )
        try:
            for done in answer_datasets(datasets, answering):
                results.append(_score(done))
                if not json:
                    heading = [done.dataset] if len(datasets) > 1 else []
                    verbatim("\n".join([*heading, results[-1]["line"], str(done.folder)]))
        except KeyboardInterrupt:
            note(_how_to_continue(options.overwrite, by_row=facts.order is None))
            raise
    return show(results, json=json)


def _run_folder(opening: Opening, options: EvaluationOptions, run_name: str, pool_size: int = 0) -> Path:
    """The folder of a run on a pool of so many adapters; UsageError if the run's name cannot be part of it."""
    from logo.evaluation.results import run_folder

    method = opening.method
    adapters_per_prompt = None if method is None else method.picks
    if adapters_per_prompt is None:
        sources = pool_sources(opening.pool, opening.base_model, MODEL_DIR)
        adapters_per_prompt = opening.options["k"] or default_k(sources, DEFAULT_K)
    return run_folder(
        options.result_dir,
        opening.base_model,
        str(opening.options["signal"]),
        pool_size if adapters_per_prompt == "pool" else adapters_per_prompt,
        options.seed,
        "logo" if method is None else method.name,
        run_name,
    )


def _shown_in(bars: Progress) -> Callable[[Dataset, int], None]:
    """What moves the bar of a dataset, which begins with its first row."""
    tasks: dict[str, Any] = {}

    def tell(dataset: Dataset, done: int) -> None:
        if dataset.name not in tasks:
            tasks[dataset.name] = bars.add_task(dataset.name, total=len(dataset.rows))
        bars.update(tasks[dataset.name], completed=done)

    return tell


def _how_to_continue(overwrite: bool, by_row: bool) -> str:
    """What an interrupted run has left, and what goes on with it; `by_row`: also in the middle of a dataset."""
    finished = "rows" if by_row else "datasets"
    again = "repeat the command to continue"
    if overwrite:
        again = "repeat the command for the datasets that are left (--dataset)"
        if by_row:
            again += ", for the first of them without --overwrite"
    return f"Finished {finished} are kept: {again}."


def _opened(opening: Opening, workers: WorkerOptions, stack: ExitStack) -> Any:
    """The facts of the engine, and what answers blocks of rows: in this process, or in workers."""
    from logo.evaluation.run import check_workers, in_this_process

    if workers.workers is None:
        answerer = opening()
        stack.enter_context(closing(answerer.logo))
        return answerer.facts, in_this_process(answerer)
    from logo.cli.cluster import in_workers
    from logo.evaluation.answer import Answerer

    facts, work = stack.enter_context(in_workers(opening, workers, Answerer.answer))
    check_workers(facts)
    return facts, work


def _score(done: Done) -> dict[str, Any]:
    """What is told of a result, read from its files."""
    from logo.evaluation.metrics import summary_line
    from logo.evaluation.results import lines, read_run

    if done.skipped:
        under = f"; it was answered under other versions or on another device: {done.note}" if done.note else ""
        note(f"{done.dataset} is done already (--overwrite answers it again){under}")
    about = read_run(done.folder)
    rows = list(lines(done.folder))
    cut = [{"row": row["index"] + 1, "tokens": row["cut"]} for row in rows if row.get("cut")]
    if cut:
        longest = max(row["tokens"] for row in cut)
        note(
            f"{done.dataset}: {len(cut)} of {len(rows)} prompts were cut to fit, by up to {longest} tokens: rows "
            f"{listed([str(row['row']) for row in cut], 5)}; `cut` in rows.jsonl has all"
        )
    return {
        "dataset": done.dataset,
        "line": summary_line(about["metric"], [row["value"] for row in rows]),
        "scores": about["scores"],
        "rows": len(rows),
        "errors": [{"row": row["index"] + 1, "message": row["error"]} for row in rows if row["error"]],
        "cut": cut,
        "seconds": about["duration"],
        "skipped": done.skipped,
        "folder": str(done.folder),
    }


def show(results: Sequence[dict[str, Any]], *, json: bool) -> int:
    """Prints what follows the official lines: a table of several datasets, and rows without an answer; the exit code is
    1 if there are any."""
    if json:
        print_json(results)
    else:
        screen(100, stderr=True).print(_table(results))
    errors = [(result["dataset"], error) for result in results for error in result["errors"]]
    for dataset, error in errors[:SHOWN]:
        err.print(f"logo: error: {dataset} row {error['row']} has no answer: {error['message']}", markup=False)
    if len(errors) > SHOWN:
        err.print(f"logo: error: and {len(errors) - SHOWN} more rows; rows.jsonl in each folder names all")
    return int(bool(errors))


def _table(results: Sequence[dict[str, Any]]) -> Table:
    """A line for each dataset and measure."""
    from logo.evaluation.metrics import LABELS

    table = plain_table("dataset", ">rows", "metric", ">score", ">95 % interval", ">seconds")
    for result in results:
        measures = [name for name in result["scores"] if name != "extra"]
        for name in measures:
            score = result["scores"][name]
            low, high = score["interval"] or (math.nan, math.nan)
            ends = "-" if math.isnan(low) else f"{100 * low:.2f} to {100 * high:.2f}"
            is_first = name == measures[0]
            table.add_row(
                Text(result["dataset"] if is_first else ""),
                Text(str(result["rows"]) if is_first else ""),
                LABELS.get(name, name),
                f"{100 * score['value']:.2f}",
                ends,
                f"{result['seconds']:.1f}" if is_first else "",
            )
    return table
