"""`logo train`: makes a pool from a folder of examples."""

from __future__ import annotations

import math
import os
import time
from collections.abc import Sequence
from contextlib import nullcontext
from dataclasses import asdict
from pathlib import Path
from typing import TYPE_CHECKING

import typer
from rich.live import Live
from rich.table import Table
from rich.text import Text

from logo.cli.expanded import command_line, expanded
from logo.cli.opening import device_of, quiet_transformers
from logo.cli.options import Json, rare, usual
from logo.cli.output import err, note, out, plain_table, print_json, write_json
from logo.cli.places import absolute, processes, starting
from logo.cli.train_options import CourseOptions, DeviceOptions, RecipeOptions

if TYPE_CHECKING:
    from logo.training.plan import Plan
    from logo.training.progress import Status
    from logo.training.running import Trained

SHOWN = 24  # rows of the table of progress
RUNNING = "running"


@expanded
def train(
    recipe: RecipeOptions,
    course: CourseOptions,
    device: DeviceOptions,
    rows: str = usual(
        ..., "Folder of TASK.jsonl, .csv or .parquet; or a Hub data set `org/name`.", metavar="DIR_OR_REPO"
    ),
    output: Path = usual(..., "Folder of the pool.", False, "--out", "-o", metavar="POOL"),
    base_model: str = usual("demo", "Hub id, folder, short name or `demo`."),
    tasks: str = usual("", "Names or patterns of tasks, `a,b*`; empty: all."),
    columns: str = rare(
        "context,completion", "Columns of CSV and Parquet files and on the Hub.", metavar="PROMPT,COMPLETION"
    ),
    json: Json = False,
) -> None:
    """Make a pool: one LoRA adapter per task, many trained at once.

    A row is `{"context": ..., "completion": ...}`, or `{"messages": [...]}` that ends with the assistant's answer. The
    same command continues an interrupted run, and trains tasks that were added since.

    Example: `logo train --base-model Qwen/Qwen2.5-0.5B --rows examples/ --out pool/ --lr 1e-3 --epochs 2`
    """
    from logo.training.running import Wanted
    from logo.training.running import train as run
    from logo.training.tasks import find_tasks
    from logo.training.trainer import Opening

    recipes = recipe.recipes()
    layout = processes(course, device, course.jobs, "processes", "worker", "--jobs", deadline=math.inf)
    found = find_tasks(rows, only=tasks, columns=[name.strip() for name in columns.split(",")])
    opening = Opening(
        base_model=absolute(base_model),
        model_dir=os.path.abspath(device.model_dir),
        device=device_of(device.device) if layout is None else "auto",
        dtype=device.dtype,
        device_map=device.device_map,
        pass_tokens=course.pass_tokens,
        recompute=course.recompute,
    )
    root = output.absolute()
    how = (course.at_once, course.checkpoint_every, course.retrain, course.calibrate, course.examples)
    wanted = Wanted(found, recipes, root, opening, *how)
    note("loading the base model" if layout is None else starting(layout, "processes"))
    quiet_transformers()
    screen = Screen()
    with screen.live:

        def planned(plan: Plan) -> None:
            screen.planned(plan)
            write_json(output / "train.json", {"command": command_line()})  # before hours in which a run may be killed

        try:
            trained = run(wanted, layout, screen.tell, planned)
        except KeyboardInterrupt:
            note("Trained adapters and the last checkpoints are kept: repeat the command to continue.")
            raise
    if json:
        print_json({"pool": str(output), **asdict(trained)})
    else:
        _print(output, trained)
    if trained.failed:
        raise typer.Exit(1)


class Screen:
    """The progress display of a training: on a terminal a table inside `live`, else a line now and then."""

    _LINE_EVERY = 30.0

    def __init__(self) -> None:
        self.live = Live(console=err, refresh_per_second=2, transient=True) if err.is_terminal else nullcontext()
        self._states: dict[str, Status] = {}
        self._expected: dict[str, float] = {}
        self._began: dict[str, tuple[float, int]] = {}
        self._said = time.monotonic()

    def planned(self, plan: Plan) -> None:
        """Prints the numbers of adapters and groups to train."""
        self._expected = {task.name: task.tokens for group in plan.groups for task in group.tasks}
        count = len(self._expected)
        done = f", {len(plan.done)} trained already" if plan.done else ""
        note(f"adapters to train: {count}, in groups: {len(plan.groups)}{done}")

    def tell(self, states: Sequence[Status]) -> None:
        """Updates the display with the progress of tasks."""
        now = time.monotonic()
        for state in states:
            self._began.setdefault(state.task, (now, state.tokens))
            self._states[state.task] = state
        if isinstance(self.live, Live):
            self.live.update(self._table(now))
        elif now - self._said >= self._LINE_EVERY:
            self._said = now
            err.print(self._line(now), markup=False)

    def _line(self, now: float) -> str:
        ended = sum(state.status != RUNNING for state in self._states.values())
        speed, left = self._pace(now)
        steps = [f"{one.task} {one.step}/{one.steps}" for one in self._states.values() if one.status == RUNNING]
        return f"{ended} of {len(self._expected)} done · {speed:.0f} tokens/s · eta {left} · {', '.join(steps[:4])}"

    def _pace(self, now: float) -> tuple[float, str]:
        """Tokens per second since this run began, and the time that is left at that pace."""
        since = min((began for began, _ in self._began.values()), default=now)
        tokens = sum(state.tokens - self._began[name][1] for name, state in self._states.items())
        speed = tokens / (now - since) if now > since else 0.0
        known = self._states
        left = sum(
            0.0
            if name in known and known[name].status != RUNNING
            else max(0.0, expected - (known[name].tokens if name in known else 0))
            for name, expected in self._expected.items()
        )
        return speed, _clock(left / speed) if speed else "?"

    def _table(self, now: float) -> Table:
        speed, left = self._pace(now)
        ended = sum(state.status != RUNNING for state in self._states.values())
        title = f"{ended} of {len(self._expected)} tasks done · {speed:.0f} tokens/s · eta {left}"
        table = Table(box=None, pad_edge=False, header_style="dim", title=title, title_justify="left")
        table.add_column("task", overflow="ellipsis", no_wrap=True)
        for name in ("step", "loss", "held out"):
            table.add_column(name, justify="right")
        table.add_column("")
        states = sorted(self._states.values(), key=lambda one: (one.status != RUNNING, one.task))
        for state in states[:SHOWN]:
            table.add_row(
                Text(state.task),
                f"{state.step}/{state.steps}",
                "" if state.loss is None else f"{state.loss:.3f}",
                "" if state.held_out is None else f"{state.held_out:.3f}",
                Text("" if state.status == RUNNING else state.status, style="dim"),
            )
        if len(states) > SHOWN:
            table.add_row(Text(f"and {len(states) - SHOWN} more", style="dim"), "", "", "", "")
        return table


def _clock(seconds: float) -> str:
    minutes, rest = divmod(round(seconds), 60)
    hours, minutes = divmod(minutes, 60)
    return f"{hours}:{minutes:02}:{rest:02}"


def _print(output: Path, trained: Trained) -> None:
    from logo.training.pool import record_of

    table = plain_table("adapter", ">steps", ">best", ">loss", ">held out", "")
    for name in trained.trained:
        course = (record_of(output / name) or {}).get("course", {})
        held_out, loss = course.get("held_out_loss"), course.get("train_loss")
        table.add_row(
            Text(name),
            str(course.get("steps")),
            str(course.get("best_step")),
            "" if loss is None else f"{loss:.3f}",
            "" if held_out is None else f"{held_out:.3f}",
            Text("" if course.get("status") == "done" else str(course.get("status")), style="dim"),
        )
    if trained.trained:
        out.print(table)
    for name, count in trained.cut.items():
        out.print(
            f"{name}: {count} prompts were longer than --max-length or the model's context and lost their beginning",
            markup=False,
        )
    for name, reason in trained.failed.items():
        out.print(Text.assemble(("failed ", "red"), (name, "bold"), f": {reason}"))
    stood = f", {len(trained.done)} stood already" if trained.done else ""
    out.print(f"{output}: {len(trained.trained)} adapters trained{stood}, {len(trained.failed)} failed", markup=False)
