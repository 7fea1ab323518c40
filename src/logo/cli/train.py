"""`logo train`: makes a pool from a folder of examples."""

from __future__ import annotations

import time
from collections.abc import Callable, Sequence
from dataclasses import asdict
from datetime import timedelta
from pathlib import Path
from typing import TYPE_CHECKING

import typer
from rich.markup import escape
from rich.text import Text

from logo.cli.expanded import command_line, expanded
from logo.cli.opening import device_of, quiet_transformers
from logo.cli.options import Json, rare, usual
from logo.cli.output import err, note, out, plain_table, print_json, write_json
from logo.cli.train_options import CourseOptions, DeviceOptions, RecipeOptions

if TYPE_CHECKING:
    from logo.training.learner import Course
    from logo.training.prepared import Prepared
    from logo.training.running import Trained


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
    """Make a pool: one LoRA adapter per task.

    A row is `{"context": ..., "completion": ...}`, or `{"messages": [...]}` that ends with the assistant's answer. The
    same command trains the tasks that an interrupted run has not finished, and those that were added since.

    Example: `logo train --base-model Qwen/Qwen2.5-0.5B --rows examples/ --out pool/ --lr 1e-3 --epochs 2`
    """
    from logo.training.running import Wanted
    from logo.training.running import train as run
    from logo.training.tasks import find_tasks
    from logo.training.trainer import Opening

    recipes = recipe.recipes()
    found = find_tasks(rows, only=tasks, columns=[name.strip() for name in columns.split(",")])
    opening = Opening(
        base_model=base_model,
        model_dir=device.model_dir,
        device=device_of(device.device),
        dtype=device.dtype,
        device_map=device.device_map,
        pass_tokens=course.pass_tokens,
        recompute=course.recompute,
    )
    note("loading the base model")
    quiet_transformers()
    with err.status("") as status:
        screen = Screen(status.update if err.is_terminal else None)

        def planned(todo: Sequence[Prepared], done: int) -> None:
            screen.planned(todo, done)
            write_json(output / "train.json", {"command": command_line()})  # before hours in which a run may be killed

        try:
            trained = run(
                Wanted(found, recipes, output.absolute(), opening, course.retrain, course.examples),
                planned,
                screen.tell,
            )
        except KeyboardInterrupt:
            note("Trained adapters are kept: repeat the command to train the others.")
            raise
    if json:
        print_json({"pool": str(output), **asdict(trained)})
    else:
        _print(output, trained)
    if trained.failed:
        raise typer.Exit(1)


class Screen:
    """The progress of a training in one line, which a terminal shows all the time and a log file now and then.

    Args:
        show: shows a line on a terminal; None: there is no terminal.
    """

    _LINE_EVERY = 30.0

    def __init__(self, show: Callable[[str], None] | None) -> None:
        self._show, self._began = show, time.monotonic()
        self._said = self._began
        self._expected: dict[str, float] = {}
        self._seen: dict[str, int] = {}  # tokens of each task that has begun

    def planned(self, todo: Sequence[Prepared], done: int) -> None:
        """Prints the number of adapters to train."""
        self._expected, self._began = {task.name: task.tokens for task in todo}, time.monotonic()
        note(f"adapters to train: {len(todo)}" + (f", {done} trained already" if done else ""))

    def tell(self, task: Prepared, course: Course) -> None:
        """Updates the display with the progress of a task."""
        now = time.monotonic()
        self._seen[task.name] = course.tokens
        if self._show is not None:
            self._show(escape(self._line(task, course, now)))
        elif now - self._said >= self._LINE_EVERY:
            self._said = now
            err.print(self._line(task, course, now), markup=False)

    def _line(self, task: Prepared, course: Course, now: float) -> str:
        speed = sum(self._seen.values()) / max(now - self._began, 1e-9)
        later = sum(tokens for name, tokens in self._expected.items() if name not in self._seen)
        left = timedelta(seconds=round((max(0.0, task.tokens - course.tokens) + later) / speed)) if speed else "?"
        held_out = course.measured[-1].held_out if course.measured else None
        named = (("loss", course.last), ("held out", held_out))
        losses = "".join(f", {name} {loss:.3f}" for name, loss in named if loss is not None)
        return (
            f"{len(self._seen) - 1} of {len(self._expected)} done · {task.name} {course.step}/{task.steps}{losses} · "
            f"{speed:.0f} tokens/s · eta {left}"
        )


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
    for name, count in trained.copies.items():
        out.print(f"{name}: {count} rows are copies of held-out rows and were not trained on", markup=False)
    for name, reason in trained.failed.items():
        out.print(Text.assemble(("failed ", "red"), (name, "bold"), f": {reason}"))
    stood = f", {len(trained.done)} stood already" if trained.done else ""
    out.print(f"{output}: {len(trained.trained)} adapters trained{stood}, {len(trained.failed)} failed", markup=False)
