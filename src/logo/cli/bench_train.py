"""`logo bench train`: what training a pool takes, beside PEFT with transformers' Trainer."""

from __future__ import annotations

import statistics
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING

from rich.table import Table

from logo.cli.expanded import expanded
from logo.cli.opening import device_of
from logo.cli.options import Json, usual
from logo.cli.output import err, note, out, plain_table, print_json, size, write_json
from logo.cli.train_options import DeviceOptions, RecipeOptions
from logo.errors import UsageError

if TYPE_CHECKING:
    from logo.bench.training import Arm

SHOWN = {"trainer": "PEFT with Trainer", "one": "one by one", "many": "many at once"}


@expanded
def train(
    recipe: RecipeOptions,
    device: DeviceOptions,
    rows: str = usual(..., "Folder of TASK.jsonl, as `logo train` takes it.", metavar="DIR"),
    base_model: str = usual("demo", "Hub id, folder, short name or `demo`."),
    tasks: str = usual("", "Names or patterns of tasks, `a,b*`; empty: all."),
    arms: str = usual("trainer,one,many", "Arms to measure, in this order."),
    pass_tokens: int = usual(2048, "Tokens of one forward pass of our own loop.", min=1),
    threads: int | None = usual(None, "Threads of each arm.", "as PyTorch has it", min=1),
    save: Path | None = usual(None, "Write all measurements to this JSON file.", metavar="FILE"),
    json: Json = False,
) -> None:
    """Train the same tasks in three ways, each in its own process, and compare speed, memory and held-out loss.

    Example: `logo bench train --base-model M --rows examples/ --steps 16 --lr 1e-3`
    """
    from logo.bench.training import ARMS, Wanted, bench_training
    from logo.training.tasks import find_tasks
    from logo.training.trainer import Opening

    names = [name.strip() for name in arms.split(",") if name.strip()]
    for name in names:
        if name not in ARMS:
            raise UsageError(f"--arms {name!r}: expected some of {', '.join(ARMS)}")
    if not names:
        raise UsageError(f"--arms: expected some of {', '.join(ARMS)}, found none")
    recipes = recipe.recipes()
    if recipes.other:
        raise UsageError("--recipe: the arms have one recipe for all tasks; leave out `tasks:`")
    if recipes.usual.activation != "everywhere":
        raise UsageError("the arms train plain adapters: leave out --activated, --invocation and --last")
    found = find_tasks(rows, only=tasks)
    for name, reason in found.refused.items():
        raise UsageError(f"task {name!r}: {reason}")
    for task in found.tasks:
        if not recipes.usual.held_out_rows(len(task.pairs)):
            raise UsageError(
                f"task {task.name!r}: no row is held out to measure on; give it 10 rows, and --held-out 0.1"
            )
    opening = Opening(
        base_model, device.model_dir, device_of(device.device), device.dtype, device.device_map, pass_tokens
    )
    wanted = Wanted(opening, found.tasks, recipes.usual, threads)
    with err.status("") as status:
        measured = bench_training(wanted, names, lambda name: status.update(f"{SHOWN[name]} ..."))
    content = {"recipe": recipes.usual.as_dict(), "arms": [arm.as_dict() for arm in measured]}
    if json:
        print_json(content)
    else:
        out.print(_table(measured))
        for line in _ratios(measured):
            out.print(line, markup=False)
    if save is not None:
        write_json(save, content)
        note(f"written to {save}")


def _table(arms: Sequence[Arm]) -> Table:
    table = plain_table("arm", ">tokens", ">seconds", ">tokens/s", ">peak memory", ">held-out loss")
    for arm in arms:
        loss = statistics.fmean(arm.losses.values())
        row = (f"{arm.tokens:,}", f"{arm.seconds:.1f}", f"{arm.speed:.0f}", size(arm.peak), f"{loss:.4f}")
        table.add_row(SHOWN[arm.name], *row)
    return table


def _ratios(arms: Sequence[Arm]) -> list[str]:
    """Each arm beside the first one, in words."""
    lines = []
    first = arms[0]
    for arm in arms[1:]:
        apart = max(abs(arm.losses[name] / loss - 1) for name, loss in first.losses.items())
        lines.append(
            f"{SHOWN[arm.name]}: {arm.speed / first.speed:.2f} times as fast as {SHOWN[first.name]}; the held-out "
            f"losses of single tasks differ by {apart:.2%} at most"
        )
    return lines
