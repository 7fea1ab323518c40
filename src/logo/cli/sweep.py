"""`logo eval sweep`: datasets under every combination of some options; one table, and a picture for every axis."""

from __future__ import annotations

import functools
from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack
from dataclasses import asdict
from pathlib import Path
from typing import TYPE_CHECKING, Any

import typer
from rich.markup import escape
from rich.table import Table as RichTable

from logo.cli.axes import Common, Skipped, make_cells, read_grid
from logo.cli.evaluate import jobs_of
from logo.cli.evaluate_options import RowOptions, as_evaluated
from logo.cli.expanded import command_line, expanded
from logo.cli.methods import MethodOptions
from logo.cli.options import OFFICIAL_SIGNAL, EngineOptions, Json, usual
from logo.cli.output import err, natural_width, note, out, print_json, progress, rich_table, screen, write_json
from logo.cli.prompts import or_demo
from logo.cli.sweep_sessions import CellSessions, CellsInWorkers
from logo.cli.workers import WorkerOptions, layout_of
from logo.evaluation import tables
from logo.evaluation.tables import Cell as TableCell
from logo.evaluation.tables import Column, Table, as_csv, as_parquet, counted, number, numbers, p_value, row, words
from logo.extras import install, installed, need
from logo.folders import check_writable, replace_file
from logo.models import DEMO

if TYPE_CHECKING:
    from logo.evaluation.jobs import Job
    from logo.evaluation.paired import Paired
    from logo.evaluation.session import Evaluation
    from logo.evaluation.sweep.grid import Axis, Value
    from logo.evaluation.sweep.means import Standing
    from logo.evaluation.sweep.running import Cell, Swept

MOOT = "·"  # in place of a value that makes no difference
MOST_GROUPS = 7  # of datasets that have a column of their own
SHOWN = 20  # lines about what failed


@functools.partial(expanded, defaults={"signal": OFFICIAL_SIGNAL, "prefix_cache_gb": "0"})
def sweep(
    engine: EngineOptions,
    rows: RowOptions,
    method: MethodOptions,
    cluster: WorkerOptions,
    grid: list[str] = usual(
        ..., "An option and its values, `k=1,3,20`; repeat for each axis.", False, metavar="AXIS=VALUES"
    ),
    output: Path = usual(
        Path("sweep"), "Folder for table, pictures and result folders.", True, "--output", "-o", metavar="DIR"
    ),
    seed: int = usual(0, "Random seed.", min=0),
    list_: bool = usual(False, "Show the cells and stop.", True, "--list"),
    json: Json = False,
) -> None:
    """Evaluate under every combination of some options: k, signal, weighting, method, merge, ...

    Writes tables, a picture per axis and a result folder per cell and dataset. Repeat the command to continue.

    Example: `logo eval sweep --base-model M --adapters DIR --rows ROWS --grid k=1,3,20 --grid signal=norm,calibrated`
    """
    from logo.evaluation.sweep.running import runs

    need("this command", "matplotlib")
    axes = read_grid(grid)
    base_model = DEMO if list_ else or_demo(engine)  # to list cells, no model is opened
    engine = as_evaluated(engine)
    cells, skipped = make_cells(axes, Common(engine, method, seed))
    _say_skipped(skipped)
    if list_:
        _list(axes, cells, skipped, json=json)
        return
    layout = layout_of(cluster, engine)
    jobs = _jobs(rows, cells, output)
    with ExitStack() as stack:
        opener: Callable[[Cell], Evaluation]
        if layout is None:
            opener = CellSessions(engine, rows, base_model, command_line())
        else:
            opener = inside = CellsInWorkers(layout, engine, rows, base_model, runs(cells)[0])
            stack.enter_context(inside.workers)
        swept = _answered(opener, cells, jobs, output, rows)
    written = _written(axes, swept, output, seed) if swept.outcomes else []  # the table of an earlier sweep stays
    _show(axes, swept, skipped, written, seed, json=json)
    if swept.failures:
        raise typer.Exit(1)


def _jobs(options: RowOptions, cells: Sequence[Cell], output: Path) -> list[Job]:
    """The jobs. Errors in data and result folders are raised here, before the long part of the work."""
    from logo.evaluation.jobs import train_rows

    jobs = jobs_of(options, output)
    if any(cell.method is not None and "train" in cell.method.needs for cell in cells):
        for job in jobs:
            train_rows(job)
    check_writable(output, "--output")
    return jobs


def _answered(
    opener: Callable[[Cell], Evaluation], cells: Sequence[Cell], jobs: Sequence[Job], output: Path, rows: RowOptions
) -> Swept:
    from logo.evaluation.resume import ResumePolicy
    from logo.evaluation.sweep.running import runs
    from logo.evaluation.sweep.running import sweep as run_sweep

    total = len(runs(cells)) * sum(len(job.rows) for job in jobs)
    command = output / "sweep.json"
    earlier = command.read_bytes() if command.is_file() else None
    write_json(command, {"command": command_line()})  # before hours in which a run may be killed
    with progress(disable=not err.is_terminal) as shown:
        bar = shown.add_task("rows", total=total)
        try:
            swept = run_sweep(
                cells,
                jobs,
                output,
                opener,
                policy=ResumePolicy(rows.overwrite, rows.mix_environments, "another --output keeps both"),
                on_progress=lambda what, done: shown.update(bar, completed=done, description=_short(what)),
            )
        except KeyboardInterrupt:
            note("Finished rows are kept: repeat the command to continue.")
            raise
    if earlier is not None and not swept.outcomes:
        replace_file(command, earlier)  # what is in the folder is still of the earlier command
    return swept


def _written(axes: Sequence[Axis], swept: Swept, output: Path, seed: int) -> list[Path]:
    """The files of the whole sweep, in the order they are written."""
    from logo.evaluation.sweep.plots import plots
    from logo.evaluation.sweep.table import table

    found = table(axes, swept.outcomes)
    contents = {output / "sweep.csv": as_csv(found)}
    if installed("pyarrow"):
        contents[output / "sweep.parquet"] = as_parquet(found)
    else:
        line = f"logo: warning: no sweep.parquet, since pyarrow is not installed: {install('eval')}"
        err.print(line, markup=False)
    contents |= {output / "plots" / name: picture for name, picture in plots(axes, swept.outcomes, seed=seed).items()}
    for file, content in contents.items():
        replace_file(file, content)
    return list(contents)


def _list(axes: Sequence[Axis], cells: Sequence[Cell], skipped: Sequence[Skipped], *, json: bool) -> None:
    from logo.evaluation.sweep.running import runs

    chosen = runs(cells)
    if json:
        print_json(
            {
                "cells": [{"values": cell.values, "moot": sorted(cell.moot), "folder": cell.name} for cell in cells],
                "runs": len(chosen),
                "skipped": [{"values": one.values, "reason": one.reason} for one in skipped],
            }
        )
        return
    columns = (*_axis_columns(axes), *words("folder"))
    rows = [row(*_values(axes, cell), TableCell(cell.name, emphasis="faint")) for cell in chosen]
    _print(rich_table(Table(columns, tuple(rows))))
    shared = f", {len(cells)} cells" if len(cells) > len(chosen) else ""
    note(f"{counted(len(chosen), 'run')} of every dataset{shared}")
    if len(cells) > len(chosen):
        note(f"{MOOT} makes no difference: these cells share a run")


def _show(
    axes: Sequence[Axis],
    swept: Swept,
    skipped: Sequence[Skipped],
    written: Sequence[Path],
    seed: int,
    *,
    json: bool,
) -> None:
    from logo.evaluation.sweep.means import datasets_of, standings
    from logo.evaluation.sweep.running import runs

    chosen = {cell.key for cell in runs([outcome.cell for outcome in swept.outcomes])}
    best = standings([outcome for outcome in swept.outcomes if outcome.cell.key in chosen], seed=seed)
    if json:
        print_json(
            {
                "datasets": datasets_of(swept.outcomes),
                "cells": [_as_dict(standing) for standing in best],
                "failures": [asdict(failure) for failure in swept.failures],
                "skipped": [{"values": one.values, "reason": one.reason} for one in skipped],
                "files": [str(file) for file in written],
            }
        )
    elif best:
        count = len(datasets_of(swept.outcomes))
        shown = rich_table(_table(axes, best, count))
        if out.is_terminal and natural_width(shown) > out.width:  # the files have the groups, too
            shown = rich_table(_table(axes, best, count, groups=False))
        _print(shown)
        note(" · ".join(str(file) for file in written))
    for failure in swept.failures[:SHOWN]:
        where, message = failure.name, failure.message
        if failure.dataset is not None:
            where = f"{where}, dataset {failure.dataset!r}"
            message = message.removeprefix(f"dataset {failure.dataset!r}: ")  # some messages name it themselves
        err.print(f"logo: error: cell {where}: {message}", markup=False)
    if len(swept.failures) > SHOWN:
        err.print(f"logo: error: and {len(swept.failures) - SHOWN} more")


def _print(shown: RichTable) -> None:
    """Prints a table as wide as the terminal, or elsewhere at its full width."""
    screen(natural_width(shown)).print(shown)


def _table(axes: Sequence[Axis], best: Sequence[Standing], datasets: int, *, groups: bool = True) -> tables.Table:
    """A line for each run, best first, in percent; a column for each group of datasets where they are few."""
    names = list(dict.fromkeys(group for standing in best for group in standing.groups))
    names = names if groups and 1 < len(names) <= MOST_GROUPS else []
    lacking = not all(standing.complete for standing in best)
    columns = [*_axis_columns(axes), Column("mean", interval="95 % interval")]
    compared = any(standing.behind for standing in best)
    if compared:
        columns += [Column("to the best", interval="95 % interval"), Column("p Holm")]
    columns += numbers(*names, *(["datasets"] if lacking else []), "seconds")
    rows = []
    for standing in best:
        means = [standing.groups.get(group) for group in names]
        rows.append(
            row(
                *_values(axes, standing.cell),
                number(standing.mean.value, interval=standing.mean.interval),
                *(_behind(standing.behind) if compared else ()),
                *(mean and number(mean.value) for mean in means),
                *([f"{standing.mean.datasets} of {datasets}"] if lacking else []),
                f"{standing.seconds:.1f}",
            )
        )
    return Table(tuple(columns), tuple(rows), note=" ".join(_captions(best)))


def _captions(best: Sequence[Standing]) -> Iterator[str]:
    from logo.evaluation.paired import ALPHA, tests_in_words

    if any(standing.cell.moot for standing in best):
        yield f"{MOOT} makes no difference."
    used = [standing.behind.significance for standing in best if standing.behind]
    if used:
        yield (
            "to the best: the difference from the first line, paired row by row. "
            f"p Holm: by {tests_in_words(used)}, corrected for all lines by Holm's method; bold below {ALPHA}."
        )


def _behind(behind: Paired | None) -> tuple[tables.Cell | None, str | None]:
    """The difference between a cell and the best one, and its p-value."""
    from logo.evaluation.paired import ALPHA

    if behind is None:
        return None, None
    found = behind.difference
    emphasis: tables.Emphasis = "bold" if behind.p_holm < ALPHA else ""
    return number(found.value, "+.2f", found.interval, emphasis=emphasis), p_value(behind.p_holm)


def _axis_columns(axes: Sequence[Axis]) -> list[tables.Column]:
    from logo.evaluation.sweep.grid import numbers

    return [tables.Column(axis.name, numeric=numbers(axis.values) is not None) for axis in axes]


def _values(axes: Sequence[Axis], cell: Cell) -> list[tables.Cell]:
    moot = tables.Cell(MOOT, emphasis="faint")
    return [moot if axis.name in cell.moot else tables.Cell(str(cell.values[axis.name])) for axis in axes]


def _as_dict(standing: Standing) -> dict[str, Any]:
    """For JSON; means as fractions of one."""
    return {
        "values": standing.cell.values,
        "moot": sorted(standing.cell.moot),
        "folder": standing.cell.name,
        "mean": asdict(standing.mean),
        "behind": None if standing.behind is None else asdict(standing.behind),
        "complete": standing.complete,
        "groups": {group: asdict(mean) for group, mean in standing.groups.items()},
        "seconds": standing.seconds,
    }


def _say_skipped(skipped: Sequence[Skipped]) -> None:
    """A line for each reason, with what the combinations of that reason have in common."""
    from logo.evaluation.sweep.grid import label

    for reason in dict.fromkeys(one.reason for one in skipped):
        some = [one.values for one in skipped if one.reason == reason]
        common: dict[str, Value] = {axis: v for axis, v in some[0].items() if all(v == other[axis] for other in some)}
        note(f"left out {counted(len(some), 'cell')} ({label(common)}): {reason}")


def _short(what: str) -> str:
    """The end of a text, cut so that the progress bar has room."""
    room = max(16, err.width // 3)
    return escape(what if len(what) <= room else f"…{what[1 - room :]}")
