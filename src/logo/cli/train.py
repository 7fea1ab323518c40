"""`logo train`: makes a pool from a folder of examples."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import asdict
from itertools import accumulate
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

from cyclopts import Group, Parameter
from rich.text import Text

from logo.cli.opening import MODEL_DIR, device_of, quiet_transformers
from logo.cli.options import device_name, said
from logo.cli.output import err, note, out, plain_table, print_json, progress
from logo.training.config import TrainingConfig

if TYPE_CHECKING:
    from logo.training.pool import Trained

TRAINING = Group("Training", sort_key=2)


def train(
    *,
    rows: Path,
    output: Annotated[Path, Parameter(name="--out")],
    base_model: str = "demo",
    tasks: Annotated[str, said("all")] = "",
    overwrite: bool = False,
    device: Annotated[str, Parameter(converter=device_name, n_tokens=1)] = "auto",
    json: bool = False,
    config: Annotated[TrainingConfig, Parameter(name="*", group=TRAINING)] = TrainingConfig(),
) -> int:
    """Make a pool: one LoRA adapter per task.

    A row is `{"context": ..., "completion": ...}`, or `{"messages": [...]}` that ends with the assistant's answer. The
    same command trains the tasks that an interrupted run has not finished, and those that were added since.

    Example: logo train --base-model Qwen/Qwen2.5-0.5B --rows examples/ --out pool/ --lr 1e-3 --epochs 2

    Args:
        rows: Folder of TASK.jsonl or TASK.csv.
        output: Folder of the pool.
        base_model: Hub id, folder or short name.
        tasks: Names or patterns of tasks, `a,b*`.
        overwrite: Replace adapters that were trained from other rows or with another config.
        device: auto: the first GPU, if there is one.
        json: Print what was trained as JSON.
    """
    from logo.training.pool import train as run

    note("loading the base model")
    quiet_transformers()
    with progress(disable=not err.is_terminal) as bar:
        before: dict[str, int] = {}  # steps of the tasks before each one
        line = bar.add_task("", total=None)

        def planned(steps: Mapping[str, int], done: int) -> None:
            note(f"adapters to train: {len(steps)}" + (f", {done} trained already" if done else ""))
            before.update(zip(steps, accumulate(steps.values(), initial=0), strict=False))
            bar.update(line, total=sum(steps.values()))

        def tell(name: str, step: int, loss: float) -> None:
            bar.update(line, completed=before[name] + step, description=f"{name} {loss:.3f}")
            if step == 1 and not err.is_terminal:
                note(f"training {name}")

        trained = run(
            rows,
            base_model,
            output,
            config,
            tasks=tasks,
            overwrite=overwrite,
            device=device_of(device),
            model_dir=MODEL_DIR,
            planned=planned,
            tell=tell,
        )
    if json:
        print_json({"pool": str(output), **asdict(trained)})
    else:
        _print(output, trained)
    return int(bool(trained.failed))


def _print(output: Path, trained: Trained) -> None:
    table = plain_table("adapter", ">steps", ">best", ">loss", ">held out", "")
    for name, record in trained.trained.items():
        result = record["result"]
        losses = ("" if loss is None else f"{loss:.3f}" for loss in (result["train_loss"], result["held_out_loss"]))
        early = Text("early" if result["early"] else "", style="dim")
        table.add_row(Text(name), str(result["steps"]), str(result["best_step"]), *losses, early)
    if trained.trained:
        out.print(table)
    for name, record in {**trained.done, **trained.trained}.items():
        told = {
            "cut": "prompts were longer than --max-length or the model's context and lost their beginning",
            "copies": "rows are copies of held-out rows and were not trained on",
        }
        for key, words in told.items():
            if record["rows"][key]:
                out.print(f"{name}: {record['rows'][key]} {words}", markup=False)
    for name, reason in trained.failed.items():
        out.print(Text.assemble(("failed ", "red"), (name, "bold"), f": {reason}"))
    stood = f", {len(trained.done)} stood already" if trained.done else ""
    out.print(f"{output}: {len(trained.trained)} adapters trained{stood}, {len(trained.failed)} failed", markup=False)
