"""`logo demo`: the bundled model, side by side with and without its adapters."""

from __future__ import annotations

import shutil
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

from rich.bar import Bar
from rich.table import Table
from rich.text import Text

from logo.cli.opening import open_engine
from logo.cli.options import EngineOptions, in_words, positive
from logo.cli.output import err, out, plain_table, print_json, progress, weighty
from logo.demo import adapters_dir, heldout_dir, model_dir
from logo.evaluation.metrics import em
from logo.files import new_folder
from logo.models import DEMO

if TYPE_CHECKING:
    from logo.demo.show import Answer, TaskScore
    from logo.engine import LoGo


def demo(
    *,
    limit: Annotated[int | None, in_words("all", validator=positive)] = None,
    write: Annotated[Path | None, in_words("nothing is written")] = None,
    json: bool = False,
) -> None:
    """Answer prompts with the bundled model, side by side with its base model, and measure every task.

    Example: logo demo --limit 10

    Args:
        limit: Held-out rows of each task.
        write: Only write the bundled model, its adapters and rows into this new folder, to try other commands on them.
        json: Print JSON instead.
    """
    if write is not None:
        _write(write, json)
        return
    from logo.demo import show

    logo = open_engine(EngineOptions(device="cpu"), DEMO)
    if not json:
        out.print(
            f"The bundled base model knows {len(logo.names)} skills but not which one you ask for; each adapter "
            f"unlocks one.\nFor every prompt LoGo mixes up to {logo.k} adapters that respond most.\n"
        )
    answers = show.answers(logo)
    if not json:
        out.print(_side_by_side(answers))
        out.print("Where no adapter clearly fits, weights sum to less than 1: the rest is the base model's.\n")
    scores = _measured(logo, limit, quiet=json)
    average = show.average(scores)
    if json:
        print_json(_report(logo, answers, scores, average))
        return
    out.print(_table(scores, average))
    out.print(
        "\nbase: no adapter · uniform: an equal mixture of all adapters · norm: selected per prompt as in the paper ·\n"
        "calibrated: selected per prompt by LoGo's own signal · target: the task's own adapter.\n"
        "Only target is told the task. No adapter was trained on these wordings, or on these inputs of its task.\n"
        'Your turn: logo generate "What is 7 plus 5?"'
    )


def _write(folder: Path, json: bool) -> None:
    """Copies what is bundled into a new folder, and prints where it is."""
    bundled = {"model": model_dir(), "adapters": adapters_dir(), "rows": heldout_dir()}
    with new_folder(folder) as unfinished:
        for name, original in bundled.items():
            # Contents without modes: an installation may be read-only, and the copies are to be tried on.
            shutil.copytree(original, unfinished / name, copy_function=shutil.copyfile)
    written = {name: str(folder / name) for name in bundled}
    if json:
        print_json(written)
        return
    for path in written.values():
        out.print(path, highlight=False, soft_wrap=True)


def _measured(logo: LoGo, limit: int | None, quiet: bool) -> list[TaskScore]:
    """The scores of all tasks, with a bar that says how far it is, unless `quiet`."""
    from logo.demo import show

    scores: list[TaskScore] = []
    with progress(disable=quiet or not err.is_terminal) as bars:
        bar = bars.add_task("held-out rows", total=len(logo.names))
        for score in show.scores(logo, limit, lambda task: bars.update(bar, description=task)):
            scores.append(score)
            bars.advance(bar)
    return scores


def _side_by_side(answers: list[Answer]) -> Table:
    table = Table(show_lines=True, header_style="dim", border_style="dim")
    table.add_column("prompt", ratio=4)
    table.add_column("base model", ratio=2)
    table.add_column("LoGo", ratio=2)
    table.add_column("adapters selected", ratio=4, no_wrap=True)
    for answer in answers:
        table.add_row(
            Text(answer.prompt), _judged(answer.base, answer.gold), _judged(answer.logo, answer.gold), _bars(answer)
        )
    return table


def _judged(text: str, gold: str) -> Text:
    right = em(text, gold) == 1
    return Text(("✓ " if right else "✗ ") + text, style="green" if right else "red")


def _bars(answer: Answer) -> Table:
    weights = weighty(answer.selection)
    table = plain_table("", "", "")
    table.show_header = False
    for name, weight in weights.items():
        bar = Bar(max(weights.values()), 0, weight, width=8)
        table.add_row(name, f"{weight:.2f}", bar, style="bold" if name == answer.task else "")
    return table


def _table(scores: list[TaskScore], average: dict[str, float]) -> Table:
    table = Table(header_style="dim", border_style="dim", title="exact match on held-out rows", title_style="")
    table.add_column("task")
    table.add_column("rows", justify="right")
    for method in average:
        table.add_column(method, justify="right")
    for score in scores:
        table.add_row(score.task, str(score.rows), *(f"{score.exact_match[method]:.2f}" for method in average))
    table.add_section()
    rows = sum(score.rows for score in scores)
    table.add_row("average", str(rows), *(f"{exact_match:.2f}" for exact_match in average.values()), style="bold")
    return table


def _report(logo: LoGo, answers: list[Answer], scores: list[TaskScore], average: dict[str, float]) -> dict[str, object]:
    signal = logo.settings.signal
    return {
        "signal": signal,
        "k": logo.k,
        "prompts": [
            {
                "task": answer.task,
                "prompt": answer.prompt,
                "gold": answer.gold,
                "base": answer.base,
                "logo": answer.logo,
                **answer.selection.as_dict(),
            }
            for answer in answers
        ],
        # `logo` is what LoGo answered with.
        "tasks": {
            score.task: {"rows": score.rows, **score.exact_match, "logo": score.exact_match[signal]} for score in scores
        },
        "average": {**average, "logo": average[signal]},
    }
