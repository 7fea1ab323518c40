"""Rows of raw files: Parquet through `datasets`, a user's own JSON, CSV and TSV through Python's readers.

`datasets` reads JSON and CSV too, but guesses at types: `007` becomes a number, `NA` null and `2020-01-01` a date, and
prompts and gold texts would not be those of the file. Nothing read here can run code.
"""

from __future__ import annotations

import csv
import io
import json
import re
import tempfile
from collections.abc import Iterable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

from logo.errors import DataError, StorageError, need
from logo.evaluation.sources.declarations import Files

RawRow = Mapping[str, Any]

_PART = re.compile(r"(.*)-\d{5}-of-(\d{5})(\..*)?")


def matching(files: Files, root: Path) -> list[str]:
    """The files below a root that hold the rows: those that the first pattern finds; else none.

    Raises:
        DataError: some parts of a file in parts (`-00001-of-00003`) are not there.
    """
    names = next(filter(None, (_found(root, pattern) for pattern in files)), [])
    parts = [(part[1], part[2], part[3] or "") for part in map(_PART.fullmatch, names) if part]
    for stem, count, end in parts:
        if parts.count((stem, count, end)) != int(count):
            found = parts.count((stem, count, end))
            raise DataError(f"{stem}-*-of-{count}{end}: expected {int(count)} files, found {found}; fetch the others")
    return names


def _found(root: Path, pattern: str) -> list[str]:
    below = (path.relative_to(root) for path in root.glob(pattern) if path.is_file())
    return sorted(path.as_posix() for path in below if not any(part.startswith(".") for part in path.parts))


def read_raw(root: Path, names: Sequence[str]) -> Iterator[tuple[str, RawRow]]:
    """The rows of the files that `matching` found, each with its place (`file: row n`), in order.

    Raises:
        DataError: a file that is not what its name says, or not of the declared shape.
        StorageError: it cannot be read.
    """
    if names[0].endswith(".parquet"):
        yield from _numbered(names[0], _parquet(root, names))
        return
    for name in names:
        yield from _numbered(name, _text_rows(Path(name).suffix, _decoded(root, name)))


def _numbered(name: str, rows: Iterable[Any]) -> Iterator[tuple[str, RawRow]]:
    """The rows with their places; errors of the reader name the place, too."""
    place = f"{name}: row 1"
    try:
        for number, row in enumerate(rows, start=1):
            if not isinstance(row, Mapping):
                raise ValueError(f"expected an object, found {json.dumps(row)[:60]}")
            yield place, row
            place = f"{name}: row {number + 1}"
    except (ValueError, csv.Error, RecursionError) as error:
        raise DataError(f"{place}: {str(error).strip()[:300]}; fix the file or the declaration") from None


def _parquet(root: Path, names: Sequence[str]) -> Iterator[RawRow]:
    need("a Parquet file", "datasets")
    import datasets

    # Not `load_dataset("parquet")`, which reports every use to a server; this is the reader inside it.
    try:
        with tempfile.TemporaryDirectory(prefix="logo-parquet-") as cache:  # needed only to make the reader
            rows = datasets.Dataset.from_parquet([str(root / name) for name in names], cache_dir=cache, streaming=True)
        yield from rows
    except Exception as error:  # the boundary: pyarrow and datasets each raise their own kinds
        raise ValueError(f"cannot be read as Parquet ({error.__cause__ or error!r:.200})") from error


def _text_rows(ending: str, text: str) -> Iterator[Any]:
    match ending:
        case ".json":
            yield from _document(text)
        case ".jsonl" | ".ndjson":
            yield from _json_lines(text)
        case ".csv":
            yield from _table(text)
        case ".tsv":  # quotes in the tables of GLUE and its kind are part of the text
            yield from _table(text, delimiter="\t", quoting=csv.QUOTE_NONE)
        case _:
            raise ValueError(
                f"expected a file that ends in .parquet, .json, .jsonl, .ndjson, .csv or .tsv, found {ending or 'none'}"
            )


def _document(text: str) -> Iterable[Any]:
    """A list of rows; or one row per line, which some sources call .json too."""
    try:
        rows = json.loads(text)
    except json.JSONDecodeError as error:
        if error.msg.startswith("Extra data"):
            return _json_lines(text)
        raise
    if isinstance(rows, list):
        return rows
    if "\n" in text.strip():
        raise ValueError(f"expected a list of rows, found {type(rows).__name__}")
    return [rows]  # one line


def _json_lines(text: str) -> Iterator[Any]:
    return (json.loads(line) for line in text.split("\n") if line.strip())


def _table(text: str, **form: Any) -> Iterator[RawRow]:
    csv.field_size_limit(1 << 27)  # the module's own limit is too small for long passages
    table = csv.DictReader(io.StringIO(text, newline="\n"), strict=True, **form)  # only LF ends a line
    for row in table:
        if None in row or None in row.values():
            names = table.fieldnames or ()
            raise ValueError(f"line {table.line_num}: expected {len(names)} cells ({', '.join(names)[:80]})")
        yield row


def _decoded(root: Path, name: str) -> str:
    try:
        return (root / name).read_bytes().decode("utf-8-sig").replace("\r\n", "\n")
    except UnicodeDecodeError as error:
        raise DataError(f"{root / name}: expected UTF-8, found other bytes at byte {error.start + 1}") from None
    except OSError as error:
        raise StorageError(f"{root / name}: cannot be read ({error.strerror or error}); check it") from error
