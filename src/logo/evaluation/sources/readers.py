"""Rows of a source's own files, each with its place for messages: Parquet, JSON, CSV, TSV, XML, parallel text lines.

Parquet is read by the `datasets` library. The text formats are read as text and nothing is guessed: a column of years
stays a column of years and "NA" stays an answer, which a reader that infers types would not promise. Nothing read
here can run code; XML with a document type (and so with entities) is refused.
"""

from __future__ import annotations

import csv
import json
import os
import re
import tempfile
from collections.abc import Iterable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any
from xml.etree import ElementTree

from logo.errors import DataError, StorageError, UsageError
from logo.evaluation.sources.declarations import Files, Layout
from logo.evaluation.sources.fields import look_up
from logo.evaluation.sources.templates import RowError

RawRow = Mapping[str, Any]
SUFFIXES = (".parquet", ".json", ".jsonl", ".ndjson", ".csv", ".tsv", ".xml")

_SHARD = re.compile(r"(.*)-(\d{5})-of-(\d{5})(\..*)?")
_LONGEST_CELL = 1 << 27  # characters; the csv module's own limit is below what a passage may have


def files_below(root: Path) -> list[str]:
    """Every file below a folder, as sorted paths with slashes; hidden folders are passed over."""
    found = []
    for folder, below, names in os.walk(root):
        below[:] = sorted(name for name in below if not name.startswith("."))
        place = Path(folder).relative_to(root)
        found += [(place / name).as_posix() for name in names]
    return sorted(found)


def matching(files: Files, names: Sequence[str]) -> list[str]:
    """The names that hold the rows: those the first pattern finds, or one per column in the columns' order; else none.

    Raises:
        DataError: some parts of a file in parts (`-00001-of-00003`) are not there, or a column's pattern is ambiguous.
    """
    if files.columns:
        found = [[name for name in names if _regex(pattern).fullmatch(name)] for pattern in files.columns.values()]
        if any(len(part) > 1 for part in found):
            raise DataError(f"{files}: expected one file per column, found {', '.join(max(found, key=len)[:3])}")
        return [part[0] for part in found] if all(found) else []
    for pattern in files.patterns:
        hits = [name for name in names if _regex(pattern).fullmatch(name)]
        if hits:
            _check_parts(hits)
            return hits
    return []


def read_raw(
    layout: Layout, split: str, root: Path, names: Sequence[str], columns: Iterable[str]
) -> Iterator[tuple[str, RawRow]]:
    """The rows of the files that `matching` found, each with its place (`file:row`), in order.

    Args:
        columns: what will be read of each row; other Parquet columns are not decoded.

    Raises:
        DataError: a file that is not what its name says, or not of the declared shape.
        StorageError: it cannot be read.
    """
    files = layout.files[split]
    if files.columns:
        yield from _parallel(root, dict(zip(files.columns, names, strict=True)))
        return
    parquet = [name for name in names if name.endswith(".parquet")]
    if parquet:
        yield from _parquet(root, parquet, columns)
        return
    for name in names:
        yield from _numbered(name, _text_rows(layout, root, name))


def _text_rows(layout: Layout, root: Path, name: str) -> Iterable[Any]:
    text = _decoded(root, name)
    match Path(name).suffix:
        case ".json" | ".jsonl" | ".ndjson":
            return _json(layout, name, text)
        case ".csv":
            return _table(name, text, csv.excel)
        case ".tsv":
            return _table(name, text, _Tsv)
        case ".xml":
            return _xml(layout, name, text)
    raise DataError(
        f"{name}: expected a file that ends in {', '.join(SUFFIXES)}, found {Path(name).suffix or 'no ending'}; "
        "for plain text give a file for each column"
    )


def _numbered(name: str, rows: Iterable[Any]) -> Iterator[tuple[str, RawRow]]:
    for number, row in enumerate(rows, start=1):
        if not isinstance(row, Mapping):
            raise DataError(f"{name}: row {number}: expected an object, found {json.dumps(row)[:60]}")
        yield f"{name}: row {number}", row


def _parquet(root: Path, names: Sequence[str], columns: Iterable[str]) -> Iterator[tuple[str, RawRow]]:
    try:
        import datasets
    except ImportError as error:
        raise UsageError(
            "Parquet files need the library `datasets`, which is not installed; pip install 'lora-on-the-go[eval]'"
        ) from error

    # Not `load_dataset("parquet")`, which reports every use to a server; this is the reader inside it.
    silent = datasets.are_progress_bars_disabled()
    datasets.disable_progress_bars()
    try:
        with tempfile.TemporaryDirectory(prefix="logo-parquet-") as cache:
            try:
                table = datasets.Dataset.from_parquet([str(root / name) for name in names], cache_dir=cache)
            except Exception as error:  # the boundary: pyarrow and datasets each raise their own kinds
                reason = str(error.__cause__ or error).strip().splitlines()
                raise DataError(
                    f"{names[0]}: cannot be read as Parquet ({reason[0][:200] if reason else error!r})"
                ) from error
            wanted = [column for column in columns if column in table.column_names]
            if wanted:
                table = table.select_columns(wanted)
            yield from _numbered(names[0], table)
            del table  # the memory map, before its folder goes
    finally:
        if not silent:
            datasets.enable_progress_bars()


def _json(layout: Layout, name: str, text: str) -> Iterable[Any]:
    """A document that is, or holds, a list of rows; or one row per line, which some sources call .json too."""
    if name.endswith(".json"):
        try:
            document = json.loads(text)
        except json.JSONDecodeError as error:
            if not error.msg.startswith("Extra data"):
                raise DataError(f"{name}:{error.lineno}: invalid JSON: {error.msg} at column {error.colno}") from None
        except (ValueError, RecursionError) as error:
            raise DataError(f"{name}: unreadable JSON: {error}") from None
        else:
            try:
                rows = look_up(document, layout.rows)
            except RowError as error:
                raise DataError(f"{name}: {error}; 'rows' says where the list of rows is") from None
            if isinstance(rows, list):
                return rows
            if layout.rows or "\n" in text.strip():
                raise DataError(
                    f"{name}: expected a list of rows, found {type(rows).__name__}; 'rows' says where it is"
                )
            return [rows]  # one line
    return _json_lines(name, text)


def _json_lines(name: str, text: str) -> Iterator[Any]:
    for number, line in enumerate(text.split("\n"), start=1):
        if line.strip():
            try:
                yield json.loads(line)
            except (ValueError, RecursionError) as error:
                reason = f"{error.msg} at column {error.colno}" if isinstance(error, json.JSONDecodeError) else error
                raise DataError(f"{name}:{number}: invalid JSON: {reason}") from None


class _Tsv(csv.excel_tab):
    """Cells as they are: quotes in the tables of GLUE and its kind are part of the text."""

    quoting = csv.QUOTE_NONE


def _table(name: str, text: str, dialect: type[csv.Dialect]) -> Iterator[dict[str, str]]:
    limit = csv.field_size_limit(_LONGEST_CELL)
    try:
        lines = csv.reader(_lines(text), dialect, strict=True)
        header = next(lines, None)
        if header is None:
            return
        for cells in lines:
            if not cells:
                continue
            if len(cells) != len(header):
                raise DataError(
                    f"{name}:{lines.line_num}: expected {len(header)} cells ({', '.join(header)[:80]}), "
                    f"found {len(cells)}"
                )
            yield dict(zip(header, cells, strict=True))
    except csv.Error as error:
        raise DataError(f"{name}: not a table: {error}") from None
    finally:
        csv.field_size_limit(limit)


def _lines(text: str) -> Iterator[str]:
    """Lines with their ends. Only LF ends a line: text may hold the other signs that Unicode calls line ends."""
    start = 0
    while start < len(text):
        end = text.find("\n", start) + 1 or len(text)
        yield text[start:end]
        start = end


def _xml(layout: Layout, name: str, text: str) -> Iterator[Any]:
    if layout.element is None:
        raise DataError(f"{name}: an XML file needs 'element', the name of the element that is a row")
    if "<!DOCTYPE" in text or "<!ENTITY" in text:
        raise DataError(f"{name}: has a document type, which may hold entities; remove that line")
    try:
        root = ElementTree.fromstring(text)
    except ElementTree.ParseError as error:
        raise DataError(f"{name}: not XML: {error}") from None
    try:
        for element in root.iter(layout.element):
            yield element_value(element)
    except RecursionError:
        raise DataError(f"{name}: elements nested without end; expected those of a dataset") from None


def element_value(element: ElementTree.Element) -> Any:
    """An XML element as data: its text if it holds no elements, else `{tag: [values]}` and `{"@attribute": text}`."""
    if not len(element):
        return element.text or ""
    value: dict[str, Any] = {f"@{name}": text for name, text in element.attrib.items()}
    for child in element:
        value.setdefault(child.tag, []).append(element_value(child))
    return value


def _parallel(root: Path, names: Mapping[str, str]) -> Iterator[tuple[str, RawRow]]:
    """Line n of each file is a column of row n."""
    columns = {}
    for column, name in names.items():
        lines = _decoded(root, name).split("\n")
        columns[column] = lines[:-1] if lines[-1] == "" else lines
    counts = {column: len(lines) for column, lines in columns.items()}
    if len(set(counts.values())) > 1:
        shown = ", ".join(f"{names[column]} has {count}" for column, count in counts.items())
        raise DataError(f"{shown} lines; expected the same number, line by line")
    where = next(iter(names.values()))
    for number, texts in enumerate(zip(*columns.values(), strict=True), start=1):
        yield f"{where}: row {number}", dict(zip(columns, texts, strict=True))


def _decoded(root: Path, name: str) -> str:
    try:
        return (root / name).read_bytes().removeprefix(b"\xef\xbb\xbf").decode("utf-8").replace("\r\n", "\n")
    except UnicodeDecodeError as error:
        raise DataError(f"{root / name}: expected UTF-8, found other bytes at byte {error.start + 1}") from None
    except OSError as error:
        raise StorageError(f"{root / name}: cannot be read ({error.strerror or error}); check it") from error


def _check_parts(names: Sequence[str]) -> None:
    parts: dict[tuple[str, str, str], int] = {}
    for name in names:
        if part := _SHARD.fullmatch(name):
            key = (part[1], part[3], part[4] or "")
            parts[key] = parts.get(key, 0) + 1
    for (stem, count, end), found in parts.items():
        if found != int(count):
            raise DataError(f"{stem}-*-of-{count}{end}: expected {int(count)} files, found {found}; fetch the others")


def _regex(pattern: str) -> re.Pattern[str]:
    """A glob of whole paths: `*` and `?` stay inside one folder, `**/` is any number of folders."""
    parts = re.split(r"(\*\*/|\*|\?)", pattern)
    signs = {"**/": "(?:.*/)?", "*": "[^/]*", "?": "[^/]"}
    return re.compile("".join(signs.get(part, re.escape(part)) for part in parts))
