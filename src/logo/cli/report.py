"""`logo eval report`: results as one page, and their tables as CSV and LaTeX."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

from logo.cli.options import said
from logo.cli.output import check_writable, note, print_json
from logo.errors import UsageError
from logo.files import replace_file


def report(
    results: list[Path],
    /,
    *,
    save: Path,
    csv: Annotated[Path | None, said("no CSV")] = None,
    latex: Annotated[Path | None, said("no LaTeX")] = None,
    metric: Annotated[str | None, said("as the runs did")] = None,
    json: bool = False,
) -> None:
    """Make one self-contained page of results: intervals, comparisons, adapters, confidence, every row.

    Example: logo eval report results --save report.html --latex tables.tex

    Args:
        results: Folders of runs or of single datasets, or one that holds several runs.
        save: The page to write.
        csv: Folder to write the tables to, as CSV.
        latex: File to write the tables to, as LaTeX.
        metric: Judge the stored answers anew, of all datasets.
        json: Print scores, comparisons and the written files as JSON.
    """
    from logo.evaluation.metrics import checked_kind
    from logo.evaluation.report import analyse, frames, page
    from logo.evaluation.report import latex as as_latex
    from logo.evaluation.results import read

    for option, file in (("--save", save), ("--latex", latex)):
        if file is not None and file.is_dir():
            raise UsageError(f"{option} {file}: expected a file to write, found a folder")
        if file is not None:
            check_writable(file.parent)
    found = analyse(read(results, None if metric is None else checked_kind(metric, "--metric")))
    written = {save: page(found)}
    if latex is not None:
        written[latex] = as_latex(found)
    if csv is not None:
        check_writable(csv)
        written |= {csv / f"{name}.csv": frame.to_csv(index=False) for name, frame in frames(found).items()}
    for file, content in written.items():
        replace_file(file, content.encode("utf-8"))
    for one in found.comparison.notes:
        note(f"Note: {one}")
    if json:
        print_json(
            {
                "files": {str(file): len(content.encode()) for file, content in written.items()},
                "scores": found.scores.astype(object).where(found.scores.notna(), None).to_dict("records"),
                "comparisons": [line.as_json() for line in found.comparison.lines],
                "notes": list(found.comparison.notes),
            }
        )
    else:
        print(*written, sep="\n")
