"""`logo data`: which datasets there are, and preparing them from their sources."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer
from rich.progress import Progress, TaskID
from rich.table import Table
from rich.text import Text

from logo.cli.commands import Commands
from logo.cli.options import option, usual
from logo.cli.output import check_writable, err, note, print_json, progress, screen
from logo.errors import DataError, LoGoError, UsageError
from logo.evaluation.metrics import metric_kind
from logo.evaluation.tables import counted

if TYPE_CHECKING:
    from logo.evaluation.sources.declarations import Declaration
    from logo.evaluation.sources.manifest import Entry
    from logo.evaluation.sources.prepare import Request

app = Commands(no_args_is_help=True)

WIDTH = 160  # of the table where there is no terminal to fit

DataDir = Annotated[Path, option("Folder of {main}/{sub}/{test,train}.jsonl.", metavar="DIR")]
Source = Annotated[
    list[Path] | None, option("Your own dataset's declaration; may be given several times.", metavar="FILE.yaml")
]
Names = Annotated[
    list[str] | None,
    typer.Argument(metavar="NAME", help="Names or patterns: `bbh.*`, `anli`, `wmt14.fr-en`.", show_default="all"),
]


@app.callback()
def datasets() -> None:
    """List datasets, and prepare them from their sources."""


@app.command("list")
def list_datasets(
    names: Names = None,
    data_dir: DataDir = Path("./data"),
    source: Source = None,
    json: bool = usual(False, "Print JSON, with homepages, citations and notes."),
) -> None:
    """List the datasets, and how many rows of each are prepared.

    Example: `logo data list gem --data-dir ./data`
    """
    from logo.evaluation.sources.loading import chosen, packaged
    from logo.evaluation.sources.manifest import read_manifest

    known, manifest = {**packaged(), **_declared(source)}, read_manifest(data_dir)
    there = _present(data_dir)
    found = chosen(names or [], [*known, *(name for name in there if name not in known)])
    rows = [_row(name, known.get(name), manifest.get(name), data_dir) for name in found]
    if json:
        print_json(rows)
        return
    screen(WIDTH).print(_table(rows))
    prepared = sum(row["rows"] is not None for row in rows)
    note(f"{len(rows)} datasets, {prepared} with rows in {data_dir}; `logo data prepare NAME` prepares more")


@app.command("prepare")
def prepare(
    names: Names = None,
    data_dir: DataDir = Path("./data"),
    limit: int = usual(150, "Test rows of each dataset.", min=1),
    train_limit: int = usual(300, "Train rows, none of them a test row; 0: no file.", min=0),
    seed: int = usual(0, "Random seed of the draw; it gives the same rows everywhere."),
    raw: Path | None = usual(None, "Local copies of the sources' files.", "the Hub", "--from", metavar="DIR"),
    source: Source = None,
    force: bool = usual(False, "Replace files that are there."),
) -> None:
    """Fetch datasets from their sources and draw test and train rows, as prompts with gold answers.

    With --source and no NAME, only those files' datasets. One that fails does not stop the others (exit code 1).

    Example: `logo data prepare "bbh.*" anli --data-dir ./data --limit 150`
    """
    from logo.evaluation.sources.loading import chosen, packaged
    from logo.evaluation.sources.manifest import read_manifest
    from logo.evaluation.sources.prepare import Request

    own = _declared(source)
    known = {**packaged(), **own}  # the user's own take the place of ours
    found = chosen(names or list(own), list(known))
    if raw is not None and not raw.is_dir():
        raise UsageError(f"--from {raw}: expected a folder, found {'a file' if raw.exists() else 'nothing'}")
    check_writable(data_dir)
    manifest = read_manifest(data_dir)
    request = Request(limit, train_limit, seed, raw)
    failed = 0
    with progress(disable=not err.is_terminal) as bar:
        task = bar.add_task("datasets", total=len(found))
        for name in found:
            kept = None if force else _kept(data_dir, name, manifest.get(name), request)
            if kept is not None:
                print(kept, flush=True)
            else:
                failed += not _prepare(known[name], data_dir, request, bar, task)
            bar.advance(task)
        bar.update(task, description="datasets")
    if failed:
        err.print(f"logo: {failed} of {len(found)} datasets could not be prepared", markup=False)
        raise typer.Exit(1)


def _declared(files: Sequence[Path] | None) -> dict[str, Declaration]:
    """The user's own declarations by name."""
    from logo.evaluation.sources.loading import load_declaration

    own: dict[str, Declaration] = {}
    for file in files or []:
        made = load_declaration(file)
        if made.name in own:
            raise UsageError(f"--source {file}: declares {made.name!r}, as another --source does; leave one out")
        own[made.name] = made
    return own


def _present(data_dir: Path) -> tuple[str, ...]:
    from logo.evaluation.datasets import find_datasets

    try:
        return find_datasets(data_dir).names
    except DataError:  # no folder, or nothing in it
        return ()


def _row(name: str, declaration: Declaration | None, entry: Entry | None, data_dir: Path) -> dict[str, Any]:
    """A dataset's entry in the list, from its declaration or else from its entry in the manifest."""
    from logo.evaluation.datasets import dataset_file
    from logo.evaluation.jobs import declared_metric

    made = entry or {}
    usual = declaration.metric if declaration else metric_kind(name)
    origin = made.get("source", {})
    counts = _counts(data_dir, name)
    return {
        "name": name,
        "group": declaration.group if declaration else "own",
        "metric": declared_metric(dataset_file(data_dir, name)) or usual,
        "rows": counts.get("test"),
        "train_rows": counts.get("train"),
        "prepared": entry is not None,
        "source": declaration.source if declaration else origin.get("repo") or origin.get("homepage") or None,
        "licence": declaration.licence if declaration else made.get("licence"),
        "homepage": declaration.homepage if declaration else origin.get("homepage"),
        "citation": declaration.citation if declaration else made.get("citation"),
        "notes": declaration.notes if declaration else "",
    }


def _counts(data_dir: Path, name: str) -> dict[str, int]:
    """Split -> number of rows, for the files that exist."""
    from logo.evaluation.datasets import dataset_file

    found = {}
    for split in ("test", "train"):
        try:
            text = dataset_file(data_dir, name, split).read_bytes()
        except OSError:
            continue
        found[split] = sum(1 for line in text.split(b"\n") if line.strip())
    return found


def _table(rows: Sequence[Mapping[str, Any]]) -> Table:
    table = Table(box=None, pad_edge=False, header_style="dim")
    for heading in ("dataset", "group", "metric", "test", "train", "source", "licence"):
        table.add_column(heading, justify="right" if heading in ("test", "train") else "left", overflow="fold")
    for row in rows:
        counts = ["-" if row[key] is None else str(row[key]) for key in ("rows", "train_rows")]
        cells = [str(row[key] or "-") for key in ("source", "licence")]
        table.add_row(*map(Text, (row["name"], row["group"], row["metric"], *counts, *cells)))
    return table


def _kept(data_dir: Path, name: str, entry: Entry | None, request: Request) -> str | None:
    """The line that says why nothing is done, if the dataset's files are there already."""
    from logo.evaluation.sources.declarations import SPLITS
    from logo.evaluation.sources.manifest import counts, state

    found = state(data_dir, name, SPLITS, entry)
    if found is None:
        return None
    if entry is None or found != "whole":
        reason = "its files are not in the manifest" if entry is None else "its files are not as the manifest says"
        return f"{name}: kept; {reason} (--force replaces them)"
    asked = {"rows": request.rows, "train_rows": request.train_rows, "seed": request.seed}
    other = "" if entry.get("asked") == asked else f" of {_asked(entry)} (--force draws anew)"
    return f"{name}: kept, {_rows(counts(entry))}{other}"


def _asked(entry: Entry) -> str:
    asked = entry.get("asked", {})
    names = {"rows": "limit", "train_rows": "train-limit"}
    return ", ".join(f"--{names.get(key, key)} {value}" for key, value in asked.items())


def _rows(counts: Mapping[str, int]) -> str:
    return " + ".join(f"{count} {split}" for split, count in counts.items()) + " rows"


def _prepare(declaration: Declaration, data_dir: Path, request: Request, bar: Progress, task: TaskID) -> bool:
    """Prepares one dataset and prints the outcome; returns whether it succeeded."""
    from logo.evaluation.sources.manifest import counts
    from logo.evaluation.sources.prepare import prepare as prepare_one

    def say(stage: str) -> None:
        bar.update(task, description=f"{declaration.name}: {stage}")

    try:
        entry = prepare_one(declaration, data_dir, request, say)
    except LoGoError as error:
        message = " ".join(str(error).split())
        prefix = "" if declaration.name in message else f"{declaration.name}: "
        err.print(f"logo: error: {prefix}{message}", markup=False)
        return False
    made, others = counts(entry), entry["other_golds"]
    short = made["test"] < request.rows or made.get("train", request.train_rows) < request.train_rows
    extra = [
        *(["all that the source has"] if short else []),
        *([f"{entry['unusable_rows']} source rows without text left out"] if entry["unusable_rows"] else []),
        *([f"{counted(others, 'row')} with an earlier prompt and another gold text left out"] if others else []),
        *([str(entry["source"]["commit"])[:8]] if entry["source"].get("commit") else []),
    ]
    print(f"{declaration.name}: {_rows(made)}" + (f" ({'; '.join(extra)})" if extra else ""), flush=True)
    return True
