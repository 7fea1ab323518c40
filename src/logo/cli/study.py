"""`logo study`: which signal finds the right adapters on this pool, and what that is worth."""

from __future__ import annotations

import functools
import time
from collections.abc import Mapping, Sequence
from contextlib import ExitStack
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer
from rich.table import Table
from rich.text import Text

from logo.cli.opening import open_engine
from logo.cli.options import EngineOptions, IndexKind, expanded
from logo.cli.output import err, note, progress, screen
from logo.cli.places import absolute, everywhere
from logo.cli.prompts import or_demo
from logo.cli.workers import WorkerOptions, layout_of, opened
from logo.errors import UsageError

if TYPE_CHECKING:
    from logo.backends.cluster import Layout
    from logo.engine import LoGo
    from logo.evaluation.study import Arms, Measuring, Study, Task
    from logo.evaluation.workers import MeasuredInWorkers

SIGNALS = "calibrated,norm,entropy"

# Heading, part of the report (None: own tasks with the whole pool), metric.
COLUMNS: tuple[tuple[str, str | None, str], ...] = (
    ("top-1", None, "top1"),
    ("top-3", None, "top3"),
    ("MRR", None, "mrr"),
    ("EM\nown", None, "exact_match"),
    ("NLL\nown", None, "nll"),
    ("EM\nleft out", "left_out", "exact_match"),
    ("EM\nunseen", "unseen", "exact_match"),
    ("NLL\nunseen", "unseen", "nll"),
)
WIDTH = 100  # what the table needs with its intervals; a narrower terminal gets it without


@expanded
def study(
    engine: EngineOptions,
    cluster: WorkerOptions,
    rows: Annotated[
        str,
        typer.Option(metavar="DIR", help="Folder of NAME.jsonl; rows of an adapter's name are that adapter's own."),
    ],
    json: Annotated[Path, typer.Option("--json", metavar="OUT", help="The JSON file to write all numbers to.")],
    signals: Annotated[
        str | None,
        typer.Option(
            help="Signals to compare, separated by commas; `calibrated/0.5` is one with softmax weights of temperature "
            "0.5 instead of its own weighting.",
            show_default=SIGNALS,
        ),
    ] = None,
    tasks: Annotated[str, typer.Option(help="Names or patterns, `a,b*`, of the files to use; empty: all.")] = "",
    limit: Annotated[int | None, typer.Option(help="Only the first rows of each task.", show_default="all")] = None,
    seed: Annotated[int, typer.Option(help="Random seed of the intervals.", min=0)] = 0,
    heatmap: Annotated[
        Path | None,
        typer.Option(help="Picture of the first signal's mean weights.", show_default="OUT with .png"),
    ] = None,
) -> None:
    """Compare signals on a pool: do they find each prompt's own adapter, and how good is the gold answer under the mix?

    An interrupted study goes on where it stopped when the same command is given again.

    Example: `logo study --base-model M --adapters DIR --rows ROWS --limit 8 --json study.json`
    """
    from logo.evaluation.study import find_tasks, journal_of, write_report
    from logo.evaluation.workers import MeasuredInWorkers
    from logo.folders import replace_file

    found = find_tasks(rows, tasks, limit)
    arms = _signals(signals or engine.selection_strategy or SIGNALS)
    if engine.index is IndexKind.TWO_STAGE:
        raise UsageError("--index two-stage: a study ranks all adapters of the pool; leave it out")
    picture = _checked(json, heatmap)
    started = time.perf_counter()
    layout = layout_of(cluster, engine)
    engine, base_model = or_demo(engine)
    settings = {"base_model": base_model, "adapters": engine.adapters, "rows": rows, "tasks": tasks, "limit": limit}
    with ExitStack() as stack:
        measuring = _arms(engine, base_model, arms) if layout is None else _in_workers(layout, engine, base_model, arms)
        if isinstance(measuring, MeasuredInWorkers):
            stack.enter_context(measuring.workers)
        _say_what(found, measuring.facts.names)
        for name, of_signal in measuring.facts.settings["signals"].items():
            if of_signal["activations"]:  # of plain adapters, each signal reads what its page says
                note(f"{name} reads {of_signal['reads']}")
        result = _measure(measuring, found, json, settings, seed, time.perf_counter() - started)
    write_report(json, result.report)
    replace_file(picture, _picture(result, next(iter(arms))))
    journal_of(json).unlink(missing_ok=True)
    shown = screen(WIDTH)
    shown.print(_table(result.report, intervals=shown.width >= WIDTH))
    note(f"{json} · {picture}")


def _signals(text: str) -> dict[str, dict[str, Any]]:
    """What each entry of a list asks for, as settings; every signal and temperature checked."""
    from logo.selection.settings import SelectionSettings

    arms: dict[str, dict[str, Any]] = {}
    for entry in (part.strip() for part in text.split(",") if part.strip()):
        signal, slash, temperature = entry.partition("/")
        arms[entry] = {"signal": signal}
        if slash:
            try:
                arms[entry] |= {"weighting": "softmax", "weight_temperature": float(temperature)}
            except ValueError:
                raise UsageError(
                    f"signals: {entry!r}: expected a temperature after the slash, as in {signal}/0.5"
                ) from None
        SelectionSettings(**arms[entry])
    if not arms:
        raise UsageError(f"signals {text!r}: expected names separated by commas, found none")
    return arms


def _checked(json: Path, heatmap: Path | None) -> Path:
    """The picture's place, when both files can be written: looked at before hours are spent."""
    from logo.folders import check_writable

    picture = json.with_suffix(".png") if heatmap is None else heatmap
    if picture.resolve() == json.resolve():
        raise UsageError(f"--json and --heatmap are both {json}: expected two files")
    for option, file in (("--json", json), ("--heatmap", picture)):
        if file.is_dir():
            raise UsageError(f"{option} {file}: expected a file to write, found a folder")
        check_writable(file.parent, option)
    return picture


def _in_workers(
    layout: Layout, options: EngineOptions, base_model: str, arms: Mapping[str, Mapping[str, Any]]
) -> MeasuredInWorkers:
    from logo.evaluation.workers import MeasuredInWorkers, study_facts_of

    open_ = functools.partial(_arms, everywhere(options), absolute(base_model), arms)
    return MeasuredInWorkers(opened(layout, options, base_model, open_, study_facts_of))


def _arms(options: EngineOptions, base_model: str, arms: Mapping[str, Mapping[str, Any]]) -> Arms:
    """One engine per entry, on one model and one pool."""
    from logo.engine import LoGo
    from logo.evaluation.study import Arms

    signals = [str(arm["signal"]) for arm in arms.values()]
    first = open_engine(replace(options, selection_strategy=signals[0]), base_model)
    engines: dict[str, LoGo] = {}
    for name, arm in arms.items():
        settings = replace(first.settings, **arm)
        engines[name] = (
            first
            if settings == first.settings
            else LoGo(
                first.model,
                first.tokenizer,
                first.pool,
                settings=settings,
                adapter_memory_gb=options.adapter_memory_gb,
                adapter_cache_gb=options.adapter_cache_gb,
                on_bad_adapter=options.on_bad_adapter.value,
            )
        )
    return Arms(engines)


def _say_what(tasks: Sequence[Task], names: Sequence[str]) -> None:
    adapters = set(names)
    own = sum(task.name in adapters for task in tasks)
    note(f"adapters: {len(adapters)} · tasks with an adapter of their own: {own} · unseen tasks: {len(tasks) - own}")
    if not own:
        err.print("logo: warning: no file of rows is named like an adapter, so nothing says which is right")


def _measure(
    measuring: Measuring,
    tasks: Sequence[Task],
    json: Path,
    settings: Mapping[str, object],
    seed: int,
    loading: float,
) -> Study:
    from logo.evaluation.study import journal_of
    from logo.evaluation.study import study as run_study

    journal = journal_of(json)
    total = sum(len(task.rows) for task in tasks)
    with progress(disable=not err.is_terminal) as shown:
        bar = shown.add_task("rows", total=total)
        try:
            return run_study(
                measuring,
                tasks,
                journal,
                settings=settings,
                seed=seed,
                loading=loading,
                on_progress=lambda name: shown.update(bar, advance=1, description=name),
            )
        except KeyboardInterrupt:
            note(f"What is done is kept in {journal}: the same command goes on from there.")
            raise


def _picture(result: Study, signal: str) -> bytes:
    from logo.evaluation.heatmap import heatmap
    from logo.evaluation.summary import mean_weights

    title = f"{signal}: mean weight of each adapter, by task"
    return heatmap(mean_weights(result.rows, signal), result.report["pool"], title)


def _table(report: Mapping[str, Any], *, intervals: bool) -> Table:
    """Signals and fixed mixtures as rows; under each number its interval."""
    table = Table(box=None, pad_edge=False, header_style="dim", padding=(0, 2, 0, 0))
    table.add_column("", overflow="fold")
    for heading, _, _ in COLUMNS:
        table.add_column(heading, justify="right", no_wrap=True)
    parts: dict[str | None, Mapping[str, Any]] = {None: report}
    parts |= {name: report[name] or {} for name in ("left_out", "unseen")}
    for kind in ("signals", "mixtures"):
        for name in dict.fromkeys(name for part in parts.values() for name in part.get(kind) or {}):
            entries = {part: (values.get(kind) or {}).get(name) for part, values in parts.items()}
            table.add_row(Text(name), *(_cell(entries[part], metric, intervals) for _, part, metric in COLUMNS))
    table.caption = "Means of the tasks' means" + (", 95 % intervals below." if intervals else ".")
    table.caption_justify = "left"
    return table


def _cell(entry: Mapping[str, Any] | None, metric: str, intervals: bool) -> Text:
    if entry is None or metric not in entry:
        return Text("-", style="dim")
    number = f"{entry[metric]:.2f}"
    if not intervals or entry["intervals"][metric] is None:
        return Text(number)
    low, high = entry["intervals"][metric]
    return Text.assemble(f"{number}\n", (f"{low:.2f}–{high:.2f}", "dim"))
