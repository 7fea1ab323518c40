"""`logo compare`: whether one run is better than another on the same rows."""

from __future__ import annotations

from dataclasses import asdict
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer
from rich.table import Table
from rich.text import Text

from logo.cli.output import err, note, out, print_json, screen

if TYPE_CHECKING:
    from logo.evaluation.comparison import Compared, Comparison

WIDTH = 120  # what the table needs; a pipe gets that much
_HUNDREDS = frozenset({"extra.bleu", "extra.chrf"})  # what comes in hundreds already


def compare(
    run_a: Annotated[Path, typer.Argument(metavar="RUN_A", help="Result folder of one dataset, or of a whole run.")],
    run_b: Annotated[Path, typer.Argument(metavar="RUN_B", help="Another, of the same rows.")],
    metric: Annotated[
        str,
        typer.Option(
            help="Names or patterns, `rouge-L,extra.*`; `extra.` are those beside the official ones.",
            show_default="the official ones",
        ),
    ] = "",
    seed: Annotated[int, typer.Option(help="Random seed of the intervals and tests.", min=0)] = 0,
    json: Annotated[bool, typer.Option("--json", help="Print JSON instead of the table.")] = False,
) -> None:
    """Compare two runs row by row: B less A with its interval, and whether that could be chance.

    Example: `logo compare results/demo_selection_norm_n_3_seed_0 results/demo_selection_calibrated_n_3_seed_0`
    """
    from logo.evaluation.comparison import compare as compare_runs
    from logo.evaluation.comparison import read_run

    found = compare_runs(read_run(run_a), read_run(run_b), metric, seed=seed)
    for name, only in ((run_a, found.only_a), (run_b, found.only_b)):
        if only:
            note(f"Only in {name}: {', '.join(only)}")
    if found.unchecked:
        err.print(
            f"logo: warning: nothing says whether both runs saw the same rows of {', '.join(found.unchecked)}: "
            "a run has neither rows.json nor run.json",
            markup=False,
        )
    if json:
        print_json({"a": str(run_a), "b": str(run_b), **asdict(found)})
        return
    out.print(Text.assemble(("A ", "bold"), str(run_a), "\n", ("B ", "bold"), str(run_b), "\n"))
    shown = screen(WIDTH)
    shown.print(_table(found))


def _table(found: Comparison) -> Table:
    table = Table(box=None, pad_edge=False, header_style="dim", padding=(0, 2, 0, 0))
    table.add_column("", overflow="fold")
    table.add_column("metric", no_wrap=True)
    for heading in ("rows", "A", "B", "B − A", "95 %", "better", "worse", "same", "p"):
        table.add_column(heading, justify="right", no_wrap=True)
    for compared in found.datasets:
        table.add_row(*_cells(compared))
    if found.groups:
        table.add_row()
        table.add_row(Text("means of datasets", style="dim"))
        for compared in found.groups:
            table.add_row(*_cells(compared))
    table.caption = (
        "All in percent, BLEU and chrF of 100. better, worse, same: rows on which B's answer is worth more than A's, "
        "less, as much. p: how often chance alone makes such a difference: McNemar's exact test for right and "
        "wrong, else 10,000 random swaps of the runs' answers."
    )
    table.caption_justify = "left"
    return table


def _cells(compared: Compared) -> list[Any]:
    scale = 1 if compared.metric in _HUNDREDS else 100
    difference, record = compared.difference, compared.record
    p = compared.p if compared.exact_p is None else compared.exact_p
    clear = difference.low > 0 or difference.high < 0
    name = compared.name if compared.datasets == 1 else f"{compared.name} ({compared.datasets})"
    return [
        Text(name),
        compared.metric,
        str(compared.rows),
        f"{scale * difference.a:.2f}",
        f"{scale * difference.b:.2f}",
        Text(f"{scale * difference.value:+.2f}", style="bold" if clear else ""),
        Text(f"{scale * difference.low:+.2f} to {scale * difference.high:+.2f}", style="dim"),
        str(record.wins),
        str(record.losses),
        str(record.ties),
        "<0.001" if p < 0.001 else f"{p:.3f}",
    ]
