"""`logo train`: makes a pool from a folder of examples."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import asdict
from itertools import accumulate
from pathlib import Path
from time import monotonic
from typing import TYPE_CHECKING, Annotated

from cyclopts import Group, Parameter
from rich.progress import Progress
from rich.text import Text

from logo.cli.opening import MODEL_DIR, device_of, quiet_transformers
from logo.cli.options import device_name, in_words
from logo.cli.output import err, note, out, plain_table, print_json, progress
from logo.training.config import TrainingConfig

if TYPE_CHECKING:
    from logo.training.pool import Trained

TRAINING = Group("Training", sort_key=2)
# A count of a task's rows -> what it counts.
REMARKS = {
    "cut": "prompts were longer than --max-length or the model's context and lost their beginning",
    "copies": "rows are copies of held-out rows and were not trained on",
}


def train(
    *,
    rows: Path,
    save: Annotated[Path, Parameter(name=("--save", "--out"))],
    base_model: str = "demo",
    tasks: Annotated[str, in_words("all")] = "",
    overwrite: bool = False,
    device: Annotated[str, Parameter(converter=device_name, n_tokens=1)] = "auto",
    json: bool = False,
    config: Annotated[TrainingConfig, Parameter(name="*", group=TRAINING)] = TrainingConfig(),
) -> int:
    """Make a pool: one LoRA adapter per task.

    A row is `{"context": ..., "completion": ...}`, or `{"messages": [...]}` that ends with the assistant's answer. The
    same command trains the tasks that an interrupted run has not finished, and those that were added since.

    Example: logo train --base-model Qwen/Qwen2.5-0.5B --rows examples/ --save pool/ --lr 1e-3 --epochs 2

    Args:
        rows: Folder of TASK.jsonl or TASK.csv.
        save: Folder of the pool.
        base_model: Hub id, folder or short name.
        tasks: Names or patterns of tasks, `a,b*`.
        overwrite: Replace adapters that were trained from other rows or with another config.
        device: auto: the first GPU, if there is one.
        json: Print what was trained as JSON.
    """
    from logo.training.pool import train as train_pool

    note("loading the base model")
    quiet_transformers()
    with progress(disable=not err.is_terminal) as bars:
        bar = _TrainingBar(bars)
        trained = train_pool(
            rows,
            base_model,
            save,
            config,
            tasks=tasks,
            overwrite=overwrite,
            device=device_of(device),
            model_dir=MODEL_DIR,
            planned=bar.planned,
            tell=bar.step,
        )
    if json:
        print_json({"pool": str(save), **asdict(trained)})
    else:
        _print(save, trained)
    return int(bool(trained.failed))


class _TrainingBar:
    """A bar over the steps of all tasks, or on no terminal a line for each task."""

    def __init__(self, bars: Progress) -> None:
        self.bars = bars
        self.bar = bars.add_task("", total=None)
        self.steps: dict[str, int] = {}  # of each task, at most
        self.steps_before: dict[str, int] = {}  # each task -> steps of the tasks before it
        self.last_step = 0.0  # when it ended

    def planned(self, steps: Mapping[str, int], done: int) -> None:
        """Says how many adapters are trained, with these steps at most, and how many are done."""
        note(f"adapters to train: {len(steps)}" + (f", {done} trained already" if done else ""))
        self.steps = dict(steps)
        self.steps_before = dict(zip(steps, accumulate(steps.values(), initial=0), strict=False))
        self.bars.update(self.bar, total=sum(steps.values()))
        self.last_step = monotonic()

    def step(self, task: str, step: int, loss: float) -> None:
        """Shows the loss of a step; after the first one of a task, how long they may all take."""
        self.bars.update(self.bar, completed=self.steps_before[task] + step, description=f"{task} {loss:.3f}")
        if step == 1 and not err.is_terminal:
            steps = self.steps[task]
            seconds = (monotonic() - self.last_step) * steps
            note(f"training {task}: {steps} steps, about {seconds:.0f} s")
        self.last_step = monotonic()


def _print(output: Path, trained: Trained) -> None:
    table = plain_table("adapter", ">steps", ">best", ">loss", ">held out", "")
    for name, record in trained.trained.items():
        fitted = record["result"]
        losses = ("" if loss is None else f"{loss:.3f}" for loss in (fitted["train_loss"], fitted["held_out_loss"]))
        early = Text("early" if fitted["early"] else "", style="dim")
        table.add_row(Text(name), str(fitted["steps"]), str(fitted["best_step"]), *losses, early)
    if trained.trained:
        out.print(table)
    for name, record in {**trained.done, **trained.trained}.items():
        for count, words in REMARKS.items():
            if record["rows"][count]:
                out.print(f"{name}: {record['rows'][count]} {words}", markup=False)
    for name, reason in trained.failed.items():
        out.print(Text.assemble(("failed ", "red"), (name, "bold"), f": {reason}"))
    done = f", {len(trained.done)} stood already" if trained.done else ""
    out.print(f"{output}: {len(trained.trained)} adapters trained{done}, {len(trained.failed)} failed", markup=False)
