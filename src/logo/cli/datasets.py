"""`logo data`: which datasets there are, and preparing them from their sources."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

from cyclopts import Parameter
from rich.text import Text

from logo.cli.options import not_negative, positive
from logo.cli.output import check_writable, err, note, plain_table, print_json, screen, verbatim
from logo.errors import DataError, LoGoError, UsageError, closest
from logo.evaluation.datasets import dataset_file, dataset_files, declared_metric
from logo.evaluation.metrics import metric_kind
from logo.rows import requested

if TYPE_CHECKING:
    from logo.evaluation.sources.declarations import Declaration

WIDTH = 160  # of the table where there is no terminal to fit


def listed(*names: str, data_dir: Path = Path("data"), source: list[Path] | None = None, json: bool = False) -> None:
    """List the datasets, and how many rows of each are there.

    Example: logo data list gem --data-dir data

    Args:
        names: Names or patterns: `bbh.*`, `anli`, `wmt14.fr-en`; none: all.
        data_dir: Folder of main/sub/test.jsonl and train.jsonl.
        source: Your own dataset's declaration, FILE.yaml (repeatable).
        json: Print JSON, with homepages, citations and notes.
    """
    from logo.evaluation.sources.declarations import packaged

    declarations = {**packaged(), **_declared(source)}
    undeclared = [name for name in _prepared(data_dir) if name not in declarations]
    chosen = _chosen(names, [*declarations, *undeclared])
    rows = [_row(name, declarations.get(name), data_dir) for name in chosen]
    if json:
        print_json(rows)
        return
    table = plain_table("dataset", "group", "metric", ">test", ">train", "source", "licence")
    for column in table.columns:
        column.overflow = "fold"
    for row in rows:
        cells = ("name", "group", "metric", "rows", "train_rows", "source", "licence")
        table.add_row(*(Text("-" if row[cell] is None else str(row[cell])) for cell in cells))
    screen(WIDTH).print(table)
    prepared = sum(row["rows"] is not None for row in rows)
    note(f"{len(rows)} datasets, {prepared} with rows in {data_dir}; `logo data prepare NAME` prepares more")


def prepare(
    *names: str,
    data_dir: Path = Path("data"),
    limit: Annotated[int, Parameter(validator=positive)] = 150,
    train_limit: Annotated[int, Parameter(validator=not_negative)] = 300,
    source: list[Path] | None = None,
    overwrite: bool = False,
) -> int:
    """Fetch datasets from their sources and draw test and train rows, as prompts with gold answers.

    With --source and no NAME, only those files' datasets. One that fails does not stop the others (exit code 1).

    Example: logo data prepare "bbh.*" anli --limit 150

    Args:
        names: Names or patterns: `bbh.*`, `anli`, `wmt14.fr-en`; none: all.
        data_dir: Folder of main/sub/test.jsonl and train.jsonl.
        limit: Test rows of each dataset.
        train_limit: Train rows, none of them a test row; 0: no file.
        source: Your own dataset's declaration, FILE.yaml (repeatable).
        overwrite: Replace files that are there.
    """
    from logo.evaluation.sources.declarations import packaged
    from logo.evaluation.sources.prepare import WRITTEN
    from logo.evaluation.sources.prepare import prepare as prepare_one

    own = _declared(source)
    declarations = {**packaged(), **own}  # the user's own take the place of ours
    chosen = _chosen(names or list(own), list(declarations))
    check_writable(data_dir)
    options: dict[str, Any] = {"rows": limit, "train_rows": train_limit, "progress": err.is_terminal}
    failed = 0
    for name in chosen:
        try:
            folder = dataset_file(data_dir, name).parent
            if not overwrite and any((folder / file).exists() for file in WRITTEN):
                verbatim(f"{name}: kept, its files are there (--overwrite draws anew)")
                continue
            verbatim(_told(name, prepare_one(declarations[name], data_dir, **options)))
        except LoGoError as error:
            failed += 1
            err.print(f"logo: error: {' '.join(str(error).split())}", markup=False)
    if failed:
        err.print(f"logo: {failed} of {len(chosen)} datasets could not be prepared", markup=False)
    return int(bool(failed))


def _prepared(data_dir: Path) -> list[str]:
    """The names of the datasets that a folder of the official layout has."""
    try:
        files, official = dataset_files(data_dir)
    except DataError:  # no folder, or nothing in it
        return []
    return list(files) if official else []


def _declared(files: Sequence[Path] | None) -> dict[str, Declaration]:
    """The user's own declarations by name; the last of one name counts."""
    from logo.evaluation.sources.declarations import load_declaration

    return {declaration.name: declaration for declaration in map(load_declaration, files or [])}


def _chosen(parts: Sequence[str] | None, names: Sequence[str]) -> list[str]:
    """Of these names, those that a user asks for; UsageError for a part that means none."""

    def unknown(part: str) -> UsageError:
        return UsageError(f"dataset {part!r}: not declared{closest(part, names)}; `logo data list` shows all")

    return requested(",".join(parts or []), names, unknown)


def _row(name: str, declaration: Declaration | None, data_dir: Path) -> dict[str, Any]:
    """A dataset's entry in the list."""
    usual = declaration.metric if declaration else metric_kind(name)
    counts = {}
    for split in ("test", "train"):
        file = dataset_file(data_dir, name, split)
        lines = file.read_bytes().split(b"\n") if file.exists() else []
        counts[split] = sum(1 for line in lines if line.strip()) or None
    return {
        "name": name,
        "group": declaration.group if declaration else "own",
        "metric": declared_metric(dataset_file(data_dir, name)) or usual,
        "rows": counts["test"],
        "train_rows": counts["train"],
        "source": declaration.source.repo if declaration else None,
        **{key: getattr(declaration, key, None) for key in ("licence", "homepage", "citation", "notes")},
    }


def _told(name: str, record: Mapping[str, Any]) -> str:
    """The line that says what was drawn."""
    drawn = record["rows"]
    request = record["asked"]
    unusable = record["unusable_rows"]
    other_golds = record["other_golds"]
    commit = record["source"]["commit"]
    remarks = []
    if drawn["test"] < request["rows"] or drawn.get("train", request["train_rows"]) < request["train_rows"]:
        remarks.append("all that the source has")
    if unusable:
        remarks.append(f"{unusable} source rows without text left out")
    if other_golds:
        rows = "rows" if other_golds > 1 else "row"
        remarks.append(f"{other_golds} {rows} with an earlier prompt and another gold text left out")
    if commit:
        remarks.append(commit[:8])
    return f"{name}: {_counted(record)}" + (f" ({'; '.join(remarks)})" if remarks else "")


def _counted(record: Mapping[str, Any]) -> str:
    return " + ".join(f"{count} {split}" for split, count in record["rows"].items()) + " rows"
