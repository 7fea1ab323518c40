"""`logo eval compare`: whether one run is better than another on the same rows."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Annotated

from rich.text import Text

from logo.cli.options import said
from logo.cli.output import natural_width, note, one_line, out, plain_table, print_json, screen

if TYPE_CHECKING:
    from logo.evaluation.compare import Comparison

WIDTH = 100  # columns in a pipe, or as many as the table needs


def compare(
    runs: list[Path],
    /,
    *,
    metric: Annotated[str | None, said("as the runs did")] = None,
    json: bool = False,
) -> None:
    """Compare runs row by row with the first: differences, intervals, and a test whether they could be chance.

    Example: logo eval compare results/demo_selection_norm_n_3_seed_0 results/demo_selection_calibrated_n_3_seed_0

    Args:
        runs: Two folders of runs or more, or one that holds them.
        metric: Judge the stored answers anew, of all datasets.
        json: Print the lines as JSON.
    """
    from logo.evaluation.compare import compare as compare_runs
    from logo.evaluation.metrics import checked_kind
    from logo.evaluation.results import read

    found = compare_runs(read(runs, None if metric is None else checked_kind(metric, "--metric")))
    for one in found.notes:
        note(f"Note: {one}")
    if json:
        print_json([line.as_json() for line in found.lines])
    else:
        _show(found)


def _show(comparison: Comparison) -> None:
    """A table for each run that is compared with the first."""
    from logo.evaluation.statistics import ALPHA

    for run in dict.fromkeys(line.b for line in comparison.lines):
        lines = [line for line in comparison.lines if line.b == run]
        out.print(Text.assemble(("A ", "bold"), one_line(lines[0].a, 200), ("\nB ", "bold"), one_line(run, 200)))
        table = plain_table("", "measure", ">rows", ">A", ">B", ">B − A", "95 %", ">better", ">worse", ">p", ">p Holm")
        for line in lines:
            one, style = line.found, "bold" if line.found.is_marked else ""
            ends = "-" if one.interval is None else "[{:+.2f}, {:+.2f}]".format(*(100 * end for end in one.interval))
            name = one_line(line.name) if line.datasets == 1 else f"{one_line(line.name)} ({line.datasets})"
            numbers = f"{100 * one.a:.2f}", f"{100 * one.b:.2f}", Text(f"{100 * one.difference:+.2f}", style=style)
            tested = str(one.better), str(one.worse), f"{one.p:.3g}", Text(f"{one.p_holm:.3g}", style=style)
            table.add_row(Text(name), line.measure, str(one.rows), *numbers, Text(ends, style="dim"), *tested)
        screen(max(WIDTH, natural_width(table))).print(table, "")
    tests = " and ".join(sorted({line.found.test for line in comparison.lines}))
    note(
        "In percent; groups are means of datasets. better, worse: rows on which B's value is higher or lower than A's. "
        f"p: two-sided ({tests}); p Holm: corrected for {len(comparison.lines)} together; bold: below {ALPHA}."
    )
