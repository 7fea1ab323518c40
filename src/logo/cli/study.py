"""`logo eval study`: which signal or method finds the right adapters on this pool, and what that is worth."""

from __future__ import annotations

import functools
import operator
import time
from collections.abc import Callable, Mapping, Sequence
from contextlib import ExitStack
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

from logo.cli.belonging import check_method_options, check_selection_options
from logo.cli.cluster import WorkerOptions, absolute, anywhere, everywhere, expected
from logo.cli.contests import contest_of, methods_of
from logo.cli.expanded import command_line, expanded
from logo.cli.field_table import WIDTH as FIELD_WIDTH
from logo.cli.field_table import field_table
from logo.cli.methods import MethodOptions
from logo.cli.opening import Opened, open_base, selection_settings
from logo.cli.options import EngineOptions, Json, rare, usual
from logo.cli.output import (
    check_writable,
    err,
    natural_width,
    note,
    print_json,
    progress,
    rich_table,
    screen,
    write_json,
)
from logo.cli.prompts import or_demo
from logo.cluster.processes import Layout
from logo.errors import DataError, UsageError
from logo.evaluation.datasets import find_datasets
from logo.evaluation.tables import Cell, Column, Table, number, numbers, row

if TYPE_CHECKING:
    from logo.adapters.pool import AdapterPool
    from logo.engine import LoGo
    from logo.evaluation.arms import Arms
    from logo.evaluation.contest import Contest, Lesson
    from logo.evaluation.datasets import Dataset
    from logo.evaluation.study import Measuring, Study

Names = tuple[str, ...] | None  # of adapters; None: all of the pool

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
    method: MethodOptions,
    cluster: WorkerOptions,
    rows: str = usual(
        ...,
        "Folder of NAME.jsonl, or of main/sub/test.jsonl; NAME is the adapter whose rows they are.",
        metavar="DIR",
    ),
    save: Path = usual(..., "The JSON file to write all numbers to.", metavar="FILE"),
    signals: str | None = usual(
        None,
        "Signals to compare, `a,b`.",
        SIGNALS,
        metavar="SIGNAL,...",
    ),
    tasks: str = usual("", "Names or patterns, `a,b*`, of tasks to use; empty: all."),
    limit: int | None = usual(None, "Only the first rows of each task.", "all"),
    protocol: str = rare(
        "own,left-out,unseen",
        "own: each row's target adapter is in the pool; left-out: it is removed; unseen: tasks without an adapter.",
        metavar="own,left-out,unseen",
    ),
    generate: int | None = usual(
        None, "Also generate answers of up to N new tokens, and judge them.", "no", metavar="N", min=1
    ),
    metric: str | None = rare(
        None,
        "How generated answers are judged, in all tasks.",
        "from NAME.yaml beside NAME.jsonl, else from the task's name",
        metavar="METRIC",
    ),
    train_rows: Path | None = rare(
        None,
        "Folder of NAME.jsonl with training rows, for methods that learn from them.",
        "none, or the held-out rows",
        metavar="DIR",
    ),
    hold_out: int = rare(
        0,
        "Do not measure the last N rows of each task; methods use them as training rows or samples where no folder of "
        "them is named.",
        min=0,
    ),
    own_adapters_only: bool = rare(False, "Leave adapters without rows of their own out of the pool."),
    batch_size: int = usual(8, "Answers that are generated at once.", min=1),
    overwrite: bool = rare(False, "Begin again, and replace a report that --save names."),
    so_far: bool = usual(False, "Show the results so far of an unfinished study."),
    seed: int = usual(0, "Random seed of the intervals and of methods.", min=0),
    json: Json = False,
) -> None:
    """Compare signals on a pool: how often they find the target adapter, and how likely the gold answer is.

    `--method lorahub,loraretriever` adds other methods, and `--generate N` generates answers; a second
    table then shows each relative to the oracle. Repeat the command to continue an interrupted study.

    Example: `logo eval study --base-model M --adapters DIR --rows ROWS --limit 8 --save study.json`
    """
    from logo.evaluation.study import cut, is_begun, journal_of, report_in, study_so_far

    if so_far:
        _show(study_so_far(journal_of(save), seed).report, json=json)
        return
    if signals and engine.signal:
        raise UsageError(
            f"--signal {engine.signal}: a study compares the signals of --signals; leave out one of the two"
        )
    compared = _signals(signals or engine.signal or SIGNALS)
    if save.is_dir():
        raise UsageError(f"--save {save}: expected a file to write, found a folder")
    check_writable(save.parent)
    if save.exists() and not overwrite and not is_begun(journal_of(save)):
        report_in(save)  # another file is refused before anything is loaded
    layout = cluster.layout(engine)
    base_model = or_demo(engine)
    found, held = cut(find_datasets(rows, tasks, train_rows=train_rows), limit, hold_out)
    methods = methods_of(method, engine.n_selected_modules, seed, held)
    check_method_options(list(methods.values()), selects=True)
    check_selection_options([replace(selection_settings(engine), signal=signal) for signal in compared])
    contest = contest_of(found, protocol, generate, methods, metric, {} if train_rows else held)
    names = tuple(task.name for task in found) if own_adapters_only else None
    opener = functools.partial(_arms, signals=compared, batch_size=batch_size, names=names)
    started = time.perf_counter()
    settings = {"base_model": base_model, "adapters": engine.adapters, "rows": rows, "tasks": tasks, "limit": limit}
    settings |= {"hold_out": hold_out} if hold_out else {}
    with ExitStack() as stack:
        measuring: Measuring = (
            opener(engine, base_model, contest)
            if layout is None
            else _in_workers(layout, engine, base_model, contest, opener, stack)
        )
        _say_what(found, measuring.facts.names)
        for name, of_signal in measuring.facts.settings["signals"].items():
            if of_signal["activations"]:  # for plain adapters, the documentation says it
                note(f"{name} reads {of_signal['reads']}")
        loading = time.perf_counter() - started
        result = _measure(measuring, found, save, settings, contest, seed, loading, overwrite=overwrite)
    if not result.rows:
        under = "; it was measured under other versions or on another kind of device: " if result.note else ""
        note(f"{save} is done already (--overwrite measures it again){under}{result.note}")
        _show({name: part for name, part in result.report.items() if name != "command"}, json=json)
        return
    write_json(save, {**result.report, "command": command_line()})
    journal_of(save).unlink(missing_ok=True)
    _show(result.report, json=json)
    note(str(save))


def _show(report: Mapping[str, Any], *, json: bool) -> None:
    if json:
        print_json(report)
        return
    # Without a terminal, the table is as wide as its content, since a method's name may be long.
    whole = rich_table(_table(report, intervals=True))
    shown = screen(max(WIDTH, natural_width(whole)))
    shown.print(whole if shown.width >= WIDTH else rich_table(_table(report, intervals=False), intervals=False))
    for signal, found in report.get("confidence", {}).items():
        note(_confidence(signal, found))
    if "relative" in report:
        screen(FIELD_WIDTH).print("", rich_table(field_table(report)), sep="\n")


def _confidence(signal: str, found: Mapping[str, Any]) -> str:
    """How well the confidence of a signal separates prompts with an adapter from others, in a line."""
    values = [
        f"{found['auroc'][name]:.2f} against {what}"
        for name, what in (("unseen", "unseen tasks"), ("left_out", "left-out adapters"))
        if found["auroc"][name] is not None
    ]
    error = "" if found["error"] is None else f", reliability error {found['error']:.2f}"
    values = values or ["unknown, nothing to compare with"]
    return f"{signal}: AUROC of the confidence {', '.join(values)}{error}"


def _signals(text: str) -> list[str]:
    """The signals that `--signals` names."""
    from logo.selection.signals import get_signal

    signals = list(dict.fromkeys(part.strip() for part in text.split(",") if part.strip()))
    for signal in signals:
        get_signal(signal)
    if not signals:
        raise UsageError(f"signals {text!r}: expected names separated by commas, found none")
    return signals


def _in_workers(
    layout: Layout,
    options: EngineOptions,
    base_model: str,
    contest: Contest,
    arms: Callable[..., Arms],
    stack: ExitStack,
) -> Measuring:
    from logo.cluster.rows import MeasuredInWorkers
    from logo.cluster.workers import opened

    methods = {label: one for label, method in contest.methods.items() if (one := anywhere(method)) is not None}
    there = replace(contest, methods=methods)
    open_ = functools.partial(arms, everywhere(options), absolute(base_model), there)
    workers = opened(layout, expected(layout, options, base_model), open_, operator.attrgetter("facts"))
    return MeasuredInWorkers(stack.enter_context(workers))


def _arms(
    options: EngineOptions,
    base_model: str,
    contest: Contest,
    *,
    signals: Sequence[str],
    batch_size: int,
    names: Names,
) -> Arms:
    """One engine per signal, on one model and one pool, restricted to the adapters of these names."""
    from logo.evaluation.arms import Arms

    # The options are checked for all signals together, because one that only some of them read is right here.
    settings = selection_settings(replace(options, signal=signals[0]))
    first = open_base(options, base_model).engine(options, settings)
    whole = first.pool.value
    pool = whole if names is None else _only(whole, names)
    base = Opened(first.model, first.tokenizer, pool)
    engines: dict[str, LoGo] = {}
    for signal in signals:
        is_first = signal == signals[0] and pool is whole
        engines[signal] = first if is_first else base.uncalibrated(options, replace(first.settings, signal=signal))
    return Arms(engines, contest, batch_size)


def _only(pool: AdapterPool, names: Sequence[str]) -> AdapterPool:
    """The adapters of these names, as far as the pool has them; DataError where it has none."""
    found = [name for name in pool.names if name in set(names)]
    if not found:
        raise DataError(f"pool: expected adapters named like the rows' tasks ({', '.join(names[:3])}, ...), found none")
    return pool.subset(found)


def _say_what(tasks: Sequence[Dataset], names: Sequence[str]) -> None:
    adapters = set(names)
    own = sum(task.name in adapters for task in tasks)
    note(f"adapters: {len(adapters)} · tasks with an adapter of their own: {own} · unseen tasks: {len(tasks) - own}")
    if not own:
        err.print("logo: warning: no file of rows is named like an adapter, so the right adapter of a row is unknown")


def _measure(
    measuring: Measuring,
    tasks: Sequence[Dataset],
    save: Path,
    settings: Mapping[str, object],
    contest: Contest,
    seed: int,
    loading: float,
    *,
    overwrite: bool,
) -> Study:
    from logo.evaluation.study import asked_of, journal_of
    from logo.evaluation.study import study as run_study

    journal = journal_of(save)
    for method in contest.methods.values():
        method.check_pool(measuring.facts.names)
    asked = asked_of(tasks, contest, measuring.facts.names)
    lessons = contest.lessons([task.name for task in asked], measuring.facts.names)
    with progress(disable=not err.is_terminal) as shown:
        learning = shown.add_task("learning", total=len(lessons), visible=bool(lessons))
        measured = shown.add_task("rows", total=sum(len(task.rows) for task in asked))

        def learnt(lesson: Lesson) -> None:
            shown.update(learning, advance=1, description=f"{lesson.method}: {lesson.of}")

        try:
            return run_study(
                measuring,
                tasks,
                journal,
                settings=settings,
                contest=contest,
                seed=seed,
                loading=loading,
                finished=save,
                overwrite=overwrite,
                on_progress=lambda name: shown.update(measured, advance=1, description=name),
                on_lesson=learnt,
            )
        except KeyboardInterrupt:
            without = " without --overwrite" if overwrite else ""
            note(f"Finished rows are kept in {journal}: repeat the command{without} to continue.")
            raise


def _table(report: Mapping[str, Any], *, intervals: bool) -> Table:
    """Signals, methods and fixed mixtures as rows, with the intervals of their numbers."""
    parts: dict[str | None, Mapping[str, Any]] = {None: report}
    parts |= {name: report[name] or {} for name in ("left_out", "unseen")}
    rows = []
    for kind in ("signals", "methods", "mixtures"):
        for name in dict.fromkeys(name for part in parts.values() for name in part.get(kind) or {}):
            entries = {part: (values.get(kind) or {}).get(name) for part, values in parts.items()}
            rows.append(row(name, *(_cell(entries[part], metric) for _, part, metric in COLUMNS)))
    columns = (Column("", numeric=False, wraps=True), *numbers(*(heading for heading, _, _ in COLUMNS)))
    return Table(
        columns, tuple(rows), note="Means of the tasks' means" + (", 95 % intervals below." if intervals else ".")
    )


def _cell(entry: Mapping[str, Any] | None, metric: str) -> Cell | None:
    return number(entry[metric], interval=entry["intervals"][metric], scale=1) if entry and metric in entry else None
