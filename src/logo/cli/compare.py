"""`logo eval compare`: whether one run is better than another on the same rows."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import TYPE_CHECKING

from rich.text import Text

from logo.cli.options import Json, argument, usual
from logo.cli.output import err, natural_width, note, out, print_json, rich_table, screen
from logo.evaluation.tables import Column, Emphasis, Table, number, numbers, p_value, row, words

if TYPE_CHECKING:
    from logo.evaluation.comparison import Compared, Comparison

WIDTH = 100  # columns in a pipe, or as many as the table needs
_HUNDREDS = frozenset({"extra.bleu", "extra.chrf"})  # measures from 0 to 100 already


def compare(
    run_a: Path = argument(..., metavar="RUN_A", help="Result folder of one dataset, or of a whole run."),
    run_b: Path = argument(..., metavar="RUN_B", help="Result folder of another run on the same rows."),
    metric: str = usual(
        "", "Names or patterns of metrics, `rouge-L,extra.*`; those of `extra.` are not official.", "the official ones"
    ),
    seed: int = usual(0, "Random seed of the intervals and tests.", min=0),
    json: Json = False,
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
            f"logo: warning: cannot tell whether both runs used the same rows of {', '.join(found.unchecked)}: "
            "a run has neither rows.json nor run.json",
            markup=False,
        )
    if json:
        print_json({"a": str(run_a), "b": str(run_b), **found.as_json()})
        return
    out.print(Text.assemble(("A ", "bold"), str(run_a), "\n", ("B ", "bold"), str(run_b), "\n"))
    shown = rich_table(_table(found))
    screen(max(WIDTH, natural_width(shown))).print(shown)


def _table(found: Comparison) -> Table:
    """A line for each dataset and measure, then for each group."""
    from logo.evaluation.paired import ALPHA, tests_in_words

    everything = [*found.datasets, *found.groups]
    several = len(everything) > 1
    columns = (
        Column("", numeric=False, wraps=True),
        *words("metric"),
        *numbers("rows", "A", "B"),
        Column("B − A", interval="95 %"),
        *numbers("better", "worse", "same", "p", *(["p Holm"] if several else [])),
        *words("test"),
    )
    rows = [row(*_cells(one, several)) for one in found.datasets]
    rows += [row(*_cells(one, several), section="means of datasets") for one in found.groups]
    holm = f" p Holm: the same, corrected for the {len(everything)} lines by Holm's method." if several else ""
    note = (
        "All in percent, BLEU and chrF of 100. better, worse, same: rows on which B's score is higher than A's, lower, "
        f"or equal. p: two-sided, by {tests_in_words(one.significance for one in everything)}.{holm} "
        f"Bold: {'p Holm' if several else 'p'} below {ALPHA}."
    )
    return Table(columns, tuple(rows), note=note)


def _cells(compared: Compared, several: bool) -> Iterator[object]:
    from logo.evaluation.paired import ALPHA, COLUMN

    scale = 1 if compared.metric in _HUNDREDS else 100
    difference, record = compared.difference, compared.record
    yield compared.name if compared.datasets == 1 else f"{compared.name} ({compared.datasets})"
    yield from (compared.metric, compared.rows, number(difference.a, scale=scale), number(difference.b, scale=scale))
    emphasis: Emphasis = "bold" if compared.p_holm < ALPHA else ""
    yield number(difference.value, "+.2f", difference.interval, scale=scale, emphasis=emphasis)
    yield from (record.wins, record.losses, record.ties, p_value(compared.significance.p))
    if several:
        yield p_value(compared.p_holm)
    yield COLUMN[compared.significance.test]
