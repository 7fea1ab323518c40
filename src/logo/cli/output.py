"""How the command line shows things: consoles, weight bars, selections."""

from __future__ import annotations

import json
import os
import sys
import tempfile
import warnings
from pathlib import Path
from typing import TYPE_CHECKING, Any

from rich.bar import Bar
from rich.console import Console
from rich.measure import Measurement
from rich.progress import (
    BarColumn,
    MofNCompleteColumn,
    Progress,
    ProgressColumn,
    SpinnerColumn,
    Task,
    TextColumn,
    TimeElapsedColumn,
    TimeRemainingColumn,
)
from rich.table import Table
from rich.text import Text

from logo.files import unwritable

if TYPE_CHECKING:
    from logo.core import Selection

out = Console(highlight=False, soft_wrap=True, emoji=False)
err = Console(stderr=True, highlight=False, soft_wrap=True, emoji=False)

BAR = 12
# Shown instead of adapters if a selection has none.
BASE_ALONE = "base model alone"


def screen(width: int, *, stderr: bool = False) -> Console:
    """The console for a table: the terminal, or one of the table's own width if output is not a terminal."""
    console = err if stderr else out
    return console if console.is_terminal else Console(width=width, stderr=stderr, highlight=False, emoji=False)


def natural_width(table: Table) -> int:
    """The width of a table without wrapping, in columns."""
    return Measurement.get(out, out.options.update(width=10_000), table).maximum


def one_line(text: str, length: int = 80) -> str:
    """Foreign text as one line of at most `length` characters, without control characters."""
    shown = " ".join("".join(c if c.isprintable() else " " for c in text).split())
    return shown if len(shown) <= length else f"{shown[: length - 1]}…"


def plain_table(*headings: str) -> Table:
    """A table without lines; a heading that begins with `>` is one of numbers, which are aligned to the right."""
    table = Table(box=None, pad_edge=False, header_style="dim")
    for heading in headings:
        table.add_column(heading.removeprefix(">"), justify="right" if heading.startswith(">") else "left")
    return table


def warn_in_one_line(program: str) -> None:
    """From now on, this process's warnings are one line on stderr each; those that are for programmers are not shown.

    Args:
        program: the command that a line begins with.
    """

    def show(message: Warning | str, category: type[Warning], *_: Any, **__: Any) -> None:
        if issubclass(category, UserWarning):
            print(f"{program}: warning: {' '.join(str(message).split())}", file=sys.stderr)

    warnings.showwarning = show


def note(message: str) -> None:
    """Prints a note to stderr, so that stdout holds results only."""
    err.print(message, style="dim", markup=False)


def verbatim(text: str) -> None:
    """Prints a text to stdout as it is: rich would expand tabs, and drop control characters."""
    try:
        print(text, flush=True)  # in order with the notes on stderr
    except BrokenPipeError:
        out.on_broken_pipe()


def print_json(value: Any) -> None:
    """Prints a value to stdout as one JSON document."""
    verbatim(json.dumps(value, ensure_ascii=False, indent=2))


def selection_table(selection: Selection, others: int = 0) -> Table:
    """Selected adapters, best first, with bars for their weights, or a row that says that the base model answers alone.

    Args:
        others: how many adapters are listed after the selected ones: those with the next highest scores.
    """
    table = plain_table("adapter", ">weight", "", ">score")
    table.columns[0].overflow = "fold"
    heaviest = max(selection.weights, default=1.0)
    rows = list(zip(selection.adapters, selection.weights, strict=True))
    if not rows:
        table.add_row(BASE_ALONE, "", "", "")
    for name, weight in rows:
        score = f"{selection.scores[name]:.4g}" if name in selection.scores else "forced"
        table.add_row(Text(name), f"{weight:.3f}", Bar(heaviest, 0, weight, width=BAR, color="cyan"), score)
    not_selected = [name for name in selection.scores if name not in selection.adapters]
    for name in sorted(not_selected, key=selection.scores.__getitem__, reverse=True)[:others]:
        table.add_row(Text(name), "-", "", f"{selection.scores[name]:.4g}", style="dim")
    return table


def selection_line(selection: Selection, top: int = 3) -> str:
    """`plural 0.31 · reverse 0.22 · 6 more`."""
    rows = list(zip(selection.adapters, selection.weights, strict=True))
    if not rows:
        return BASE_ALONE
    if not any(_counts(weight) for _, weight in rows):
        return f"{len(rows)} adapter{'s' * (len(rows) > 1)} with weights below 0.005"
    parts = [f"{name} {weight:.2f}" for name, weight in rows[:top] if _counts(weight)]
    if len(rows) > top:
        parts.append(f"{len(rows) - len(parts)} more")
    return " · ".join(parts)


def weighty(selection: Selection) -> dict[str, float]:
    """The adapters whose weight is not zero to two digits."""
    return {name: weight for name, weight in selection.mixture.items() if _counts(weight)}


def _counts(weight: float) -> bool:
    return abs(weight) >= 0.005


class RateColumn(ProgressColumn):
    """Items per second."""

    def render(self, task: Task) -> Text:
        speed = task.finished_speed or task.speed
        return Text("-/s" if speed is None else f"{speed:.2f}/s", style="dim")


def progress(disable: bool = False) -> Progress:
    """A progress bar on stderr with count, rate, elapsed time and time left."""
    return Progress(
        SpinnerColumn(),
        TextColumn("{task.description}", markup=False),  # names of datasets may hold brackets
        BarColumn(),
        MofNCompleteColumn(),
        RateColumn(),
        TimeElapsedColumn(),
        TextColumn("[dim]eta[/dim]"),
        TimeRemainingColumn(),
        console=err,
        # On a terminal, printed lines have to appear above the bar; in a pipe, they have to stay on stdout.
        redirect_stdout=sys.stdout.isatty(),
        disable=disable,
    )


def check_writable(folder: str | os.PathLike[str]) -> None:
    """Creates a folder if it is missing, and raises StorageError unless it can be written, before hours of work."""
    try:
        Path(folder).mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryFile(dir=folder) as probe:
            probe.write(bytes(1 << 20))  # a disk with less room than this is full
            probe.flush()
            os.fsync(probe.fileno())
    except OSError as error:
        raise unwritable(Path(folder), error) from error
