"""`logo eval compare`: whether one run is better than another on the same rows."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Annotated

from rich.text import Text

from logo.cli.options import in_words
from logo.cli.output import natural_width, note, one_line, out, plain_table, print_json, screen

if TYPE_CHECKING:
    from logo.evaluation.compare import Compared, Comparison

WIDTH = 100  # columns in a pipe, or as many as the table needs


def compare(
    runs: list[Path],
    /,
    *,
    metric: Annotated[list[str] | None, in_words("as the runs did")] = None,
    json: bool = False,
) -> None:
    """Compare runs row by row with the first: differences, intervals, and a test whether they could be chance.

    Example: logo eval compare results/demo_selection_norm_n_3_seed_0 results/demo_selection_calibrated_n_3_seed_0

    Args:
        runs: Two folders of runs or more, or one that holds them.
        metric: Judge the stored answers anew: METRIC for all datasets, DATASET=METRIC for some (repeatable).
        json: Print the lines as JSON.
    """
    from logo.evaluation.compare import compare as compare_runs
    from logo.evaluation.datasets import metric_choices
    from logo.evaluation.results import read

    comparison = compare_runs(read(runs, metric_choices(metric)))
    for sentence in comparison.notes:
        note(f"Note: {sentence}")
    if json:
        print_json([line.as_json() for line in comparison.lines])
    else:
        _show(comparison)


def _show(comparison: Comparison) -> None:
    """A table for each run that is compared with the first."""
    from logo.evaluation.statistics import ALPHA

    for run in dict.fromkeys(line.b for line in comparison.lines):
        lines = [line for line in comparison.lines if line.b == run]
        out.print(Text.assemble(("A ", "bold"), one_line(lines[0].a, 200), ("\nB ", "bold"), one_line(run, 200)))
        table = plain_table("", "measure", ">rows", ">A", ">B", ">B − A", "95 %", ">better", ">worse", ">p", ">p Holm")
        for line in lines:
            table.add_row(*_cells(line))
        screen(max(WIDTH, natural_width(table))).print(table, "")
    tests = " and ".join(sorted({line.pair.test for line in comparison.lines}))
    note(
        "In percent; groups are means of datasets. better, worse: rows on which B's value is higher or lower than A's. "
        f"p: two-sided ({tests}); p Holm: corrected for {len(comparison.lines)} together; bold: below {ALPHA}."
    )


def _cells(line: Compared) -> list[str | Text]:
    """The cells of a line, in percent."""
    pair = line.pair
    style = "bold" if pair.is_marked else ""
    ends = "-" if pair.interval is None else "[{:+.2f}, {:+.2f}]".format(*(100 * end for end in pair.interval))
    count = "" if line.datasets == 1 else f" ({line.datasets})"
    return [
        Text(f"{one_line(line.name)}{count}"),
        line.measure,
        str(pair.rows),
        f"{100 * pair.a:.2f}",
        f"{100 * pair.b:.2f}",
        Text(f"{100 * pair.difference:+.2f}", style=style),
        Text(ends, style="dim"),
        str(pair.better),
        str(pair.worse),
        f"{pair.p:.3g}",
        Text(f"{pair.p_holm:.3g}", style=style),
    ]
