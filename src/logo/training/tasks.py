"""Tasks to make adapters for: a folder of files, one per task, or the configurations of a data set on the Hub.

A row is a prompt and its completion: `{"context": ..., "completion": ...}`, or `{"messages": [...]}` of which the last
one is the assistant's answer. A CSV or Parquet file has these as columns. If one row of a task cannot be used, the
whole task is refused, with the file and the line; other tasks are not affected.
"""

from __future__ import annotations

import csv
import hashlib
import json
import warnings
from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from logo.errors import DataError, StorageError, UsageError, closest, listed, need
from logo.hub import hub_error, is_hub_id
from logo.rows import malformed, objects, requested, row_of

SUFFIXES = (".jsonl", ".csv", ".parquet")
# Other files that probably hold rows. They are not read, which is said, so that no task is missing unnoticed.
OTHER_SUFFIXES = (".json", ".ndjson", ".tsv", ".xlsx", ".gz", ".zst", ".zip")
USUAL_COLUMNS = ("context", "completion")


@dataclass(frozen=True)
class Pair:
    """A prompt and its completion.

    Attributes:
        prompt: a text, or the messages before the answer.
        completion: the answer.
    """

    prompt: str | tuple[Mapping[str, Any], ...]
    completion: str


@dataclass(frozen=True)
class Task:
    """The examples of one adapter.

    Attributes:
        name: of the task and of its adapter.
        source: the file, or the Hub's data set and configuration.
        pairs: its rows; there is at least one.
    """

    name: str
    source: str
    pairs: tuple[Pair, ...]

    @property
    def sha256(self) -> str:
        """Digest of its rows, independent of the file format."""
        rows = [[pair.prompt, pair.completion] for pair in self.pairs]
        return hashlib.sha256(json.dumps(rows, sort_keys=True, default=str).encode()).hexdigest()


@dataclass(frozen=True)
class Found:
    """The tasks of a source.

    Attributes:
        tasks: those that can be trained.
        refused: task name -> why a requested task cannot be trained.
        names: names of all tasks, also of those that were not requested.
    """

    tasks: tuple[Task, ...]
    refused: Mapping[str, str]
    names: tuple[str, ...]


def find_tasks(source: str, *, only: str = "", columns: Sequence[str] = USUAL_COLUMNS) -> Found:
    """The tasks of a folder or of a data set on the Hub, by name.

    Args:
        source: a folder, with files at any depth, or `org/name` of a data set whose configurations are tasks.
        only: names or patterns of tasks, separated by commas; empty: all.
        columns: those of the prompt and of the completion in CSV and Parquet files and on the Hub.

    Raises:
        DataError: no such folder, or no task in it.
        UsageError: a requested task does not exist.
        HubError: the Hub refused or could not be reached.
    """
    if len(columns) != 2:
        raise UsageError(f"columns: expected two names, of the prompt and of the completion, found {list(columns)}")
    root = Path(source)
    if not root.exists() and is_hub_id(source):
        return _from_hub(source, only, columns)
    if not root.is_dir():
        found = "a file" if root.exists() else "nothing"
        raise DataError(f"tasks folder {source!r}: expected a folder with TASK.jsonl files, found {found}")
    files = {path.relative_to(root): path for path in sorted(root.rglob("*")) if path.is_file()}
    files = {part: path for part, path in files.items() if not any(name.startswith(".") for name in part.parts)}
    named = [(part.with_suffix("").as_posix(), path) for part, path in files.items() if part.suffix in SUFFIXES]
    others = [str(part) for part in files if part.suffix not in SUFFIXES]
    kinds = ", ".join(f"TASK{suffix}" for suffix in SUFFIXES)
    if not named:
        raise DataError(f"tasks folder {source!r}: expected files {kinds}, found {listed(others) or 'none'}")
    unread = [name for name in others if name.endswith(OTHER_SUFFIXES)]
    if unread and not only:
        warnings.warn(f"{source}: {listed(unread)} not read: rows are in files {kinds}", UserWarning, stacklevel=2)
    count = Counter(name for name, _ in named)
    tasks, refused = [], {}
    chosen = _chosen(count, only)
    for name, path in named:
        if name not in chosen:
            continue
        if count[name] > 1:
            both = ", ".join(other.name for known, other in named if known == name)
            refused[name] = f"several files have this name ({both}); rename all but one"
            continue
        try:
            tasks.append(Task(name, str(path), tuple(pair for pair in _pairs(path, columns))))
        except (DataError, StorageError) as error:
            refused[name] = str(error)
    return Found(tuple(tasks), refused, tuple(count))


def _chosen(names: Mapping[str, int], only: str) -> list[str]:
    return requested(only, names, lambda item: UsageError(f"task {item!r}: not found{closest(item, names)}"))


def _pairs(path: Path, columns: Sequence[str]) -> Iterator[Pair]:
    """The rows of a file."""
    rows: Iterator[tuple[int, Mapping[str, Any]]]
    if path.suffix == ".jsonl":
        rows, columns = objects(path), USUAL_COLUMNS
    elif path.suffix == ".csv":
        rows = _csv(path)
    else:
        rows = _parquet(path)
    for number, row in rows:
        yield _pair(row, f"{path}:{number}", columns)


def _csv(path: Path) -> Iterator[tuple[int, Mapping[str, Any]]]:
    """Reads every cell as text; `datasets` would guess types and read 007 as 7."""
    csv.field_size_limit(2**31 - 1)  # a context may be a book
    try:
        with path.open(encoding="utf-8-sig", newline="") as stream:
            reader = csv.DictReader(stream, strict=True)
            empty = True
            for row in reader:
                empty = False
                if None in row or None in row.values():
                    raise malformed(f"{path}:{reader.line_num}", "another number of fields", "as many as in line 1")
                yield reader.line_num, row
            if empty:
                raise DataError(f"{path}: expected a line of names and one line per row, found no rows")
    except UnicodeDecodeError:
        raise DataError(f"{path}: expected UTF-8, found other bytes; save it as UTF-8") from None
    except csv.Error as error:
        raise DataError(f"{path}:{reader.reader.line_num}: is not valid CSV: {error}") from None
    except OSError as error:
        raise StorageError(f"{path}: cannot be read ({error.strerror or error})") from error


def _parquet(path: Path) -> Iterator[tuple[int, Mapping[str, Any]]]:
    datasets = _datasets()
    try:
        table = datasets.Dataset.from_parquet(str(path), keep_in_memory=True)
    except Exception as error:  # pyarrow and datasets raise errors of their own
        raise DataError(f"{path}: is not a Parquet file that can be read: {' '.join(str(error).split())}") from None
    if not len(table):
        raise DataError(f"{path}: expected one row or more, found none")
    yield from enumerate(table, start=1)


def _from_hub(source: str, only: str, columns: Sequence[str]) -> Found:
    datasets = _datasets()
    try:
        names = datasets.get_dataset_config_names(source)
    except Exception as error:
        raise hub_error(source, error) from error
    tasks, refused = [], {}
    for name in sorted(_chosen(Counter(names), only)):
        where = f"{source}/{name}"
        try:
            table = datasets.load_dataset(source, name, split="train")
            pairs = tuple(_pair(row, f"{where}:{number}", columns) for number, row in enumerate(table, start=1))
            if not pairs:
                raise DataError(f"{where}: expected one row or more in the split 'train', found none")
            tasks.append(Task(name, where, pairs))
        except DataError as error:
            refused[name] = str(error)
        except Exception as error:  # of datasets and of the connection
            refused[name] = f"{where}: {' '.join(str(error).split())[:300]}"
    return Found(tuple(tasks), refused, tuple(names))


def _datasets() -> Any:
    need("a Parquet file or a dataset of the Hub", "datasets", extra="train")
    import datasets

    return datasets


def _pair(row: Mapping[str, Any], where: str, columns: Sequence[str]) -> Pair:
    context, completion = columns
    if tuple(columns) == USUAL_COLUMNS and row.get("messages") is not None:
        found = row_of({name: row.get(name) for name in ("messages", completion)}, where)
        return Pair(found.messages, found.golds[0])
    missing = [name for name in columns if name not in row]
    if missing:
        expected = '{"context": text, "completion": text} or {"messages": [...]}'
        if tuple(columns) != USUAL_COLUMNS:
            expected = f"columns {context!r} and {completion!r}"
        raise malformed(where, f"no {missing[0]!r}, only {', '.join(map(str, row))}", expected)
    found = row_of({"context": row[context], "completion": row[completion]}, where)
    return Pair(found.context, found.golds[0])
