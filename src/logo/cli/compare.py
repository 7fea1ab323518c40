"""`logo eval compare`: whether one run is better than another on the same rows."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer
from rich.table import Table
from rich.text import Text

from logo.cli.output import err, natural_width, note, out, print_json, screen

if TYPE_CHECKING:
    from logo.evaluation.comparison import Compared, Comparison

WIDTH = 100  # a pipe gets this much, or what the table needs
_HUNDREDS = frozenset({"extra.bleu", "extra.chrf"})  # what comes in hundreds already
TEST_NAMES = {"mcnemar": "McNemar", "randomisation": "randomised"}  # in a column


def compare(
    run_a: Annotated[Path, typer.Argument(metavar="RUN_A", help="Result folder of one dataset, or of a whole run.")],
    run_b: Annotated[Path, typer.Argument(metavar="RUN_B", help="Result folder of another run on the same rows.")],
    metric: Annotated[
        str,
        typer.Option(
            help="Names or patterns, `rouge-L,extra.*`; `extra.` are the measures beside the official ones.",
            show_default="the official ones",
        ),
    ] = "",
    seed: Annotated[int, typer.Option(help="Random seed of the intervals and tests.", min=0)] = 0,
    json: Annotated[bool, typer.Option("--json", help="Print JSON instead of the table.")] = False,
) -> None:
    """Compare two runs row by row: the difference B − A, its interval, and a test whether it could be chance.

    Example: `logo eval compare results/demo_selection_norm_n_3_seed_0 results/demo_selection_calibrated_n_3_seed_0`
    """
    from logo.evaluation.comparison import compare as compare_runs
    from logo.evaluation.runs import read_run

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
        print_json({"a": str(run_a), "b": str(run_b), **found.as_json()})
        return
    out.print(Text.assemble(("A ", "bold"), str(run_a), "\n", ("B ", "bold"), str(run_b), "\n"))
    table = _table(found)
    screen(max(WIDTH, natural_width(table))).print(table)


def _table(found: Comparison) -> Table:
    everything = [*found.datasets, *found.groups]
    several = len(everything) > 1
    table = Table(box=None, pad_edge=False, header_style="dim", padding=(0, 2, 0, 0))
    table.add_column("", overflow="fold")
    table.add_column("metric", no_wrap=True)
    for heading in (
        "rows",
        "A",
        "B",
        "B − A",
        "95 %",
        "better",
        "worse",
        "same",
        "p",
        *(["p Holm"] if several else []),
    ):
        table.add_column(heading, justify="right", no_wrap=True)
    table.add_column("test", no_wrap=True)
    for compared in found.datasets:
        table.add_row(*_cells(compared, several))
    if found.groups:
        table.add_row()
        table.add_row(Text("means of datasets", style="dim"))
        for compared in found.groups:
            table.add_row(*_cells(compared, several))
    table.caption = _caption(everything)
    table.caption_justify = "left"
    return table


def _caption(shown: Sequence[Compared]) -> str:
    from logo.evaluation.paired import ALPHA, TESTS

    used = {one.significance.test for one in shown}
    tests = " or ".join(text for name, text in TESTS.items() if name in used)
    holm = f" p Holm: the same, corrected for the {len(shown)} lines by Holm's method." if len(shown) > 1 else ""
    return (
        "All in percent, BLEU and chrF of 100. better, worse, same: rows on which B's answer is worth more than A's, "
        f"less, as much. p: two-sided, by {tests}.{holm} Bold: {'p Holm' if holm else 'p'} below {ALPHA}."
    )


def _cells(compared: Compared, several: bool) -> list[Any]:
    from logo.evaluation.paired import ALPHA

    scale = 1 if compared.metric in _HUNDREDS else 100
    difference, record = compared.difference, compared.record
    name = compared.name if compared.datasets == 1 else f"{compared.name} ({compared.datasets})"
    ends = difference.interval
    return [
        Text(name),
        compared.metric,
        str(compared.rows),
        f"{scale * difference.a:.2f}",
        f"{scale * difference.b:.2f}",
        Text(f"{scale * difference.value:+.2f}", style="bold" if compared.p_holm < ALPHA else ""),
        Text(f"{scale * ends.low:+.2f} to {scale * ends.high:+.2f}" if ends else "-", style="dim"),
        str(record.wins),
        str(record.losses),
        str(record.ties),
        _p(compared.significance.p),
        *([_p(compared.p_holm)] if several else []),
        TEST_NAMES[compared.significance.test],
    ]


def _p(p: float) -> str:
    return "<0.001" if p < 0.001 else f"{p:.3f}"
