"""`logo eval report`: result folders as one page and a LaTeX table."""

from __future__ import annotations

import time
from pathlib import Path
from typing import TYPE_CHECKING

from logo.cli.options import argument, usual
from logo.cli.output import check_writable, err, note, print_json
from logo.errors import UsageError
from logo.evaluation.metrics import checked_kind
from logo.evaluation.tables import counted
from logo.files import replace_file

if TYPE_CHECKING:
    from logo.evaluation.report import Analysis


def report(
    results: list[Path] = argument(
        ...,
        metavar="RESULTS...",
        help="Run folders, folders of single datasets, or a folder that holds several runs.",
        show_default=False,
    ),
    output: Path = usual(Path("report.html"), "The page to write.", True, "--output", "-o", metavar="FILE"),
    latex: Path | None = usual(None, "Also write the tables as LaTeX.", "no LaTeX", metavar="FILE"),
    markdown: Path | None = usual(None, "Also write the tables as Markdown.", "no Markdown", metavar="FILE"),
    title: str | None = usual(None, "The page's heading.", "base model and runs"),
    data_dir: Path | None = usual(
        None, "Data folder to search for prompts, if a result holds none and its data file has moved.", "as the run did"
    ),
    metric: str | None = usual(
        None, "Judge the stored answers anew, of all datasets, as `logo eval run --metric` would.", "as the run did"
    ),
    seed: int = usual(0, "Random seed of the intervals and tests.", min=0),
    json: bool = usual(False, "Print all numbers and the written files as JSON."),
) -> None:
    """Make one self-contained HTML page of results: tables with intervals, comparisons, adapters, every instance.

    Example: `logo eval report results -o report.html --latex tables.tex`
    """
    from logo.evaluation.report import analyse, as_latex, as_markdown, page, summary
    from logo.evaluation.runs import read_runs

    if metric is not None:
        metric = checked_kind(metric, "--metric")
    for option, file in (("--output", output), ("--latex", latex), ("--markdown", markdown)):
        if file is not None and file.is_dir():
            raise UsageError(f"{option} {file}: expected a file to write, found a folder")
        if file is not None:
            check_writable(file.parent)
    started = time.perf_counter()
    analysis = analyse(read_runs(results, data_dir, metric), seed=seed)
    written = {output: page(analysis, title).encode("utf-8")}
    if latex is not None:
        written[latex] = as_latex(analysis).encode("utf-8")
    if markdown is not None:
        written[markdown] = as_markdown(analysis).encode("utf-8")
    for file, content in written.items():
        replace_file(file, content)
    _warn(analysis)
    if json:
        print_json({"files": {str(file): len(content) for file, content in written.items()}, **summary(analysis)})
        return
    print(output)
    seconds = time.perf_counter() - started
    note(
        f"{counted(len(analysis.runs), 'run')} · {counted(len(analysis.datasets), 'dataset')} · "
        f"{counted(analysis.instances, 'answer')} · "
        f"page {len(written[output]) / 1e6:.2f} MB · {seconds:.1f} s"
    )


def _warn(analysis: Analysis) -> None:
    """Says once that results have no prompts, and why the first one has none."""
    lacking = [result for run in analysis.runs for result in run.results.values() if result.no_prompts]
    if lacking:
        more = f" and {len(lacking) - 1} more" if len(lacking) > 1 else ""
        first = f"{lacking[0].folder}: {lacking[0].no_prompts}"
        err.print(f"logo: warning: {len(lacking)} results without prompts: {first}{more}", markup=False)
