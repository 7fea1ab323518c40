"""`logo eval run` and the official `logo evaluate`: datasets through an engine, with official metrics and files."""

from __future__ import annotations

import math
import os
import time
from collections.abc import Sequence
from contextlib import ExitStack, closing
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, Literal

from cyclopts import Group, Parameter
from rich.text import Text

from logo.adapters.pool import DEFAULT_K
from logo.adapters.sources import default_k, pool_sources
from logo.cli.opening import MODEL_DIR, placed, quiet_transformers
from logo.cli.options import (
    Context,
    Engine,
    EngineOptions,
    MethodOptions,
    WorkerOptions,
    arguments,
    device_name,
    not_negative,
    positive,
    said,
    written,
)
from logo.cli.output import check_writable, err, note, plain_table, print_json, progress, screen
from logo.cli.prompts import or_demo
from logo.errors import UsageError
from logo.recorded import without_secrets

if TYPE_CHECKING:
    from logo.evaluation.answer import Opening
    from logo.evaluation.datasets import Dataset
    from logo.evaluation.run import Done

VLLM_BATCH = 256  # rows that vLLM gets at once, since it schedules them itself
SHOWN = 20  # rows without an answer that are named
ROWS = Group("Rows and results", sort_key=2)


@Parameter(name="*", group=ROWS)
@dataclass(frozen=True, kw_only=True)
class RowOptions:
    """Which rows, how they are answered, and where results are written."""

    dataset: Annotated[str, said("all in the data folder")] = ""
    """Name, list `a,b` or pattern `bbh.*`."""

    rows: Annotated[Path, Parameter(name=("--rows", "--data-dir"))] = Path("data")
    """Folder of main/sub/test.jsonl, or of NAME.jsonl."""

    train_rows: Annotated[Path | None, said("beside test.jsonl")] = None
    """Folder of NAME.jsonl to learn from."""

    metric: Annotated[str | None, said("of each dataset")] = None
    """em, em_multi, em_first, bleu, rouge or a plugin's."""

    limit: Annotated[int | None, said("all", validator=positive)] = None
    """Only the first rows of each dataset."""

    batch_size: Annotated[int, Parameter(validator=positive)] = 1
    """Prompts per forward pass."""

    max_new_tokens: Annotated[int, Parameter(validator=positive)] = 256
    """Longest answer, in tokens."""

    result_dir: str = "results"
    """Folder for result folders."""

    run_name: Annotated[str, said("none")] = ""
    """Added to the result folder's name."""

    overwrite: bool = False
    """Start again, replacing finished rows and a result of another run."""

    seed: Annotated[int, Parameter(validator=not_negative)] = 0
    """Random seed; part of the result folder's name."""

    def found(self, official: bool = False) -> list[Dataset]:
        """The datasets, every row checked; with the official script's form of each metric, if asked."""
        from logo.evaluation.datasets import find_datasets
        from logo.evaluation.metrics import checked_kind

        metric = None if self.metric is None else checked_kind(self.metric, "--metric")
        how: dict[str, Any] = {"limit": self.limit, "metric": metric, "train_rows": self.train_rows}
        return find_datasets(self.rows, self.dataset, official=official, **how)


def run(
    *,
    rows: RowOptions = RowOptions(),
    method: MethodOptions = MethodOptions(),
    runner: Annotated[Engine, Parameter(name="--engine")] = "local",
    engine_args: Annotated[str, said("none")] = "",
    workers: WorkerOptions = WorkerOptions(),
    json: bool = False,
    engine: EngineOptions = EngineOptions(),
) -> int:
    """Evaluate on datasets, with one result folder for each.

    Repeat the command to continue an interrupted run; finished datasets are not answered again.

    Example: logo eval run --dataset bbh.boolean_expressions --base-model Llama-3.1-8B

    Args:
        runner: What runs the model: this process, or vLLM.
        engine_args: With --engine vllm: options of vllm.LLM, such as `max_model_len=4096,enforce_eager=true`.
        json: Print scores and folders as JSON.
    """
    from logo.baselines.method import plain_value
    from logo.evaluation.answer import Opening

    workers.check(engine.device)
    base_model = or_demo(engine)
    command = written("eval run", rows, method, engine)
    command["options"] |= {} if runner == "local" else {"engine": runner}
    options: dict[str, Any] = {
        **{"engine": runner, "k": engine.n_selected_modules, "signal": engine.signal or "calibrated"},
        **{"when_unsure": engine.when_unsure, "prior": engine.prior, "dtype": engine.dtype or "auto"},
        **{"model_dir": MODEL_DIR},
        **placed(engine.device),
    }
    if runner == "vllm":  # set before it is imported, so that its messages stay out of this command's output
        os.environ.setdefault("VLLM_LOGGING_LEVEL", "WARNING")
        os.environ.setdefault("VLLM_LOGGING_STREAM", "ext://sys.stderr")
    if engine_args:
        if runner != "vllm":
            raise UsageError("--engine-args is only for --engine vllm; leave it out")
        options["model_kwargs"] = {
            name: plain_value(text) for name, text in arguments("--engine-args", engine_args).items()
        }
        command["options"] |= without_secrets({"engine_args": engine_args})
    made = method.make(engine.n_selected_modules, rows.seed)
    opening = Opening(base_model, engine.sources, options, made, rows.max_new_tokens, rows.seed)
    return answered(opening, rows, workers, command, json=json)


def evaluate(
    *,
    dataset: Annotated[str, said("all in the data folder")] = "",
    base_model: str = "Llama-3.1-8B",
    gpu: Annotated[str, Parameter(name=("--gpu", "--device"), converter=device_name, n_tokens=1)] = "auto",
    selection_strategy: str = "norm",
    n_selected_modules: Annotated[int, Parameter(name=("--n-selected-modules", "-k"), validator=positive)] = DEFAULT_K,
    seed: Annotated[int, Parameter(validator=not_negative)] = 0,
    generation_early_stop: bool = False,
    data_dir: str = "./data",
    model_dir: str = MODEL_DIR,
    result_dir: str = "results",
    save_dir: str = "",
    adapters: Annotated[str | None, said("the base model's own")] = None,
    limit: Annotated[int | None, said("all", validator=positive)] = None,
    max_new_tokens: Annotated[int, Parameter(validator=positive)] = 256,
    batch_size: Annotated[int, Parameter(validator=positive)] = 1,
    probe_context: Annotated[Context | None, said("base; with the preset: carry")] = None,
    preset: Literal["official"] | None = None,
    overwrite: bool = False,
) -> int:
    """Evaluate on datasets, with the option names and defaults of the official script.

    Example: logo evaluate --dataset bbh.boolean_expressions --base_model Llama-3.1-8B --gpu 0

    Args:
        dataset: Name, list `a,b` or pattern `bbh.*`.
        base_model: Hub id, folder or short name.
        gpu: GPU number, if there is one; -1 is the CPU.
        selection_strategy: `norm`, `entropy` or another signal.
        n_selected_modules: Adapters selected per prompt.
        seed: Random seed; part of the result folder's name.
        generation_early_stop: Stop generating at the first newline.
        data_dir: Rows are read from DIR/main/sub/test.jsonl.
        model_dir: Folder that is searched first for base models and adapters.
        result_dir: Folder for result folders.
        save_dir: Accepted for the official command line; not used.
        adapters: Folder, Hub repo or manifest of adapters; several with commas.
        limit: Only the first rows of each dataset.
        max_new_tokens: Longest answer, in tokens.
        batch_size: Prompts per forward pass.
        probe_context: Adapters active while probing: none, the whole pool, or as the official script runs.
        preset: `official`: read and cut prompts exactly as the authors' script does.
        overwrite: Start again, replacing finished rows and a result of another run.
    """
    given = {name: value for name, value in locals().items() if value is not None}
    from logo.evaluation.answer import Opening

    rows = RowOptions(
        dataset=dataset,
        rows=Path(data_dir),
        limit=limit,
        batch_size=batch_size,
        max_new_tokens=max_new_tokens,
        result_dir=result_dir,
        overwrite=overwrite,
        seed=seed,
    )
    options: dict[str, Any] = {"preset": preset, "signal": selection_strategy, "k": n_selected_modules}
    options |= {"model_dir": model_dir, **placed(gpu)}
    options |= {} if probe_context is None else {"probe_context": probe_context}
    opening = Opening(base_model, adapters, options, None, max_new_tokens, seed, generation_early_stop)
    return answered(opening, rows, WorkerOptions(), {"name": "evaluate", "options": given})


def answered(
    opening: Opening, rows: RowOptions, workers: WorkerOptions, command: dict[str, Any], *, json: bool = False
) -> int:
    """Answers datasets, and prints the official line and the folder of each as it is done; returns the exit code."""
    from logo.evaluation.results import run_folder
    from logo.evaluation.run import evaluate, warn_of_copies

    official = opening.options.get("preset") == "official"
    method, batch_size = opening.method, rows.batch_size
    if opening.options.get("engine") == "vllm" and batch_size == 1:
        batch_size = max(1, VLLM_BATCH // (workers.workers or 1))
    k = opening.options["k"] or default_k(pool_sources(opening.pool, opening.base_model, MODEL_DIR), DEFAULT_K)
    label = ("logo", k) if method is None else (method.name, k if method.picks is None else method.picks)
    signal = str(opening.options["signal"])
    folder = run_folder(rows.result_dir, opening.base_model, signal, label[1], rows.seed, label[0], rows.run_name)
    datasets = rows.found(official)
    for one in datasets:
        warn_of_copies(one, method)
    for place in (Path(rows.result_dir), *([folder] if folder.exists() else [])):
        check_writable(place)
    quiet_transformers()
    scored: list[dict[str, Any]] = []
    with ExitStack() as stack, progress(disable=not err.is_terminal) as bar:
        began = time.perf_counter()
        facts, work = _opened(opening, workers, stack)
        loading, tasks = time.perf_counter() - began, dict[str, Any]()

        def tell(dataset: Dataset, done: int) -> None:
            if dataset.name not in tasks:
                tasks[dataset.name] = bar.add_task(dataset.name, total=len(dataset.rows))
            bar.update(tasks[dataset.name], completed=done)

        how: dict[str, Any] = {"method": method, "batch_size": batch_size, "overwrite": rows.overwrite}
        how |= {"loading": loading, "command": command, "tell": tell}
        try:
            for done in evaluate(datasets, folder, facts, work, **how):
                scored.append(_score(done))
                if not json:
                    heading = [done.dataset] if len(datasets) > 1 else []
                    print(*heading, scored[-1]["line"], done.folder, sep="\n", flush=True)
        except KeyboardInterrupt:
            kept = "rows" if facts.order is None else "datasets"
            again = "repeat the command to continue"
            if rows.overwrite:
                again = "repeat the command for the datasets that are left (--dataset)"
                again += ", for the first of them without --overwrite" if facts.order is None else ""
            note(f"Finished {kept} are kept: {again}.")
            raise
    return show(scored, json=json)


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
    run, found = read_run(done.folder), list(lines(done.folder))
    return {
        "dataset": done.dataset,
        "line": summary_line(run["metric"], [one["value"] for one in found]),
        "scores": run["scores"],
        "rows": len(found),
        "errors": [{"row": one["index"] + 1, "message": one["error"]} for one in found if one["error"]],
        "seconds": run["duration"],
        "skipped": done.skipped,
        "folder": str(done.folder),
    }


def show(scored: Sequence[dict[str, Any]], *, json: bool) -> int:
    """Prints what follows the official lines: a table of several datasets, and rows without an answer; the exit code is
    1 if there are any."""
    from logo.evaluation.metrics import LABELS

    if json:
        print_json(scored)
    else:
        shown = plain_table("dataset", ">rows", "metric", ">score", ">95 % interval", ">seconds")
        for one in scored:
            begin, end = [Text(one["dataset"]), Text(str(one["rows"]))], [f"{one['seconds']:.1f}"]
            for name, score in one["scores"].items():
                if name != "extra":
                    low, high = score["interval"] or (math.nan, math.nan)
                    ends = "-" if math.isnan(low) else f"{100 * low:.2f} to {100 * high:.2f}"
                    shown.add_row(*begin, LABELS.get(name, name), f"{100 * score['value']:.2f}", ends, *end)
                    begin, end = [Text(), Text()], [""]
        screen(100, stderr=True).print(shown)
    errors = [(one["dataset"], error) for one in scored for error in one["errors"]]
    for dataset, error in errors[:SHOWN]:
        err.print(f"logo: error: {dataset} row {error['row']} has no answer: {error['message']}", markup=False)
    if len(errors) > SHOWN:
        err.print(f"logo: error: and {len(errors) - SHOWN} more rows; rows.jsonl in each folder names all")
    return int(bool(errors))
