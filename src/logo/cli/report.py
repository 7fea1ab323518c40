"""`logo eval report`: results as one page, or their tables as CSV and LaTeX."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

from logo.cli.options import in_words
from logo.cli.output import check_writable, note, print_json, verbatim
from logo.errors import UsageError
from logo.files import replace_file


def report(
    results: list[Path],
    /,
    *,
    save: list[Path],
    metric: Annotated[list[str] | None, in_words("as the runs did")] = None,
    json: bool = False,
) -> None:
    """Make one self-contained page of results: intervals, comparisons, adapters, confidence, every row.

    Example: logo eval report results --save report.html --save tables.tex

    Args:
        results: Folders of runs or of single datasets, or one that holds several runs.
        save: What to write (repeatable): the page, FILE.html; its tables, FILE.tex, or FOLDER/ with CSV.
        metric: Judge the stored answers anew: METRIC for all datasets, DATASET=METRIC for some (repeatable).
        json: Print scores, comparisons and the written files as JSON.
    """
    from logo.evaluation.datasets import metric_choices
    from logo.evaluation.report import analyse, frames, latex, page
    from logo.evaluation.results import read

    for path in save:
        if path.suffix not in (".html", ".tex", "") or (path.is_dir() if path.suffix else path.is_file()):
            raise UsageError(f"--save {path}: expected FILE.html, FILE.tex, or a folder without a suffix for CSV")
        check_writable(path.parent)
    analysed = analyse(read(results, metric_choices(metric)))
    written: dict[Path, str] = {}
    for path in save:
        if path.suffix:
            written[path] = page(analysed) if path.suffix == ".html" else latex(analysed)
        else:
            path.mkdir(exist_ok=True)
            written |= {path / f"{name}.csv": frame.to_csv(index=False) for name, frame in frames(analysed).items()}
    for file, content in written.items():
        replace_file(file, content.encode("utf-8"))
    for sentence in analysed.notes:
        note(f"Note: {sentence}")
    if json:
        print_json(
            {
                "files": {str(file): len(content.encode()) for file, content in written.items()},
                "scores": analysed.scores.astype(object).where(analysed.scores.notna(), None).to_dict("records"),
                "comparisons": [line.as_json() for line in analysed.comparison.lines],
                "notes": list(analysed.notes),
            }
        )
    else:
        verbatim("\n".join(map(str, written)))
