"""The prompts of a result, from its own `rows.json` or from its data file."""

from __future__ import annotations

import contextlib
import json
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from logo.errors import DataError, StorageError
from logo.evaluation.datasets import dataset_file
from logo.rows import file_sha256, read_rows

ROWS = "rows.json"


@dataclass(frozen=True)
class Prompt:
    """One row: the text, all gold texts, and the row's own adapter, or None."""

    context: str
    golds: tuple[str, ...]
    adapter: str | None = None


def prompts_of(
    folder: Path, dataset: str, run: Mapping[str, Any], rows: int, data_dir: Path | None
) -> tuple[tuple[Prompt, ...] | None, str]:
    """The prompts of a result folder; or None, and why.

    A data file is used only if its SHA-256 is the one in `run.json`.

    Raises:
        DataError, StorageError: a `rows.json` that cannot be used.
    """
    file = folder / ROWS
    if file.exists():
        return tuple(_written(file, rows)), ""
    data = run.get("dataset")
    if not isinstance(data, dict) or not data.get("sha256"):
        return None, "the result holds no prompts and does not say which file they came from"
    changed = False
    for candidate in _candidates(str(data.get("file", "")), dataset, data_dir):
        try:
            if file_sha256(candidate) == data["sha256"]:
                return tuple(_prompt(vars(row)) for row in read_rows(candidate, rows)), ""
            changed = True
        except (DataError, StorageError):
            continue
    state = "has changed since" if changed else "is not there any more"
    return None, f"the result holds no prompts, and its data file {data.get('file')} {state}"


def _candidates(file: str, dataset: str, data_dir: Path | None) -> Iterator[Path]:
    if file:
        yield Path(file)
    if data_dir is not None:
        yield data_dir / f"{dataset}.jsonl"
        with contextlib.suppress(DataError):  # not a name that a data folder could hold
            yield dataset_file(data_dir, dataset)


def _written(file: Path, rows: int) -> Iterator[Prompt]:
    try:
        content = json.loads(file.read_text(encoding="utf-8"))
    except OSError as error:
        raise StorageError(f"{file}: cannot be read ({error.strerror or error})") from error
    except (ValueError, RecursionError) as error:
        raise DataError(f"{file}: expected JSON, found something else ({error})") from None
    if not isinstance(content, list) or len(content) != rows:
        found = len(content) if isinstance(content, list) else type(content).__name__
        raise DataError(f"{file}: expected a list of {rows} rows, one per instance, found {found}")
    for index, row in enumerate(content):
        if not isinstance(row, dict) or "context" not in row or "completion" not in row:
            raise DataError(f"{file}: row {index}: expected an object with 'context' and 'completion'")
        yield _prompt(row)


def _prompt(row: Mapping[str, Any]) -> Prompt:
    completion = row["completion"]
    golds = [completion] if isinstance(completion, str) else list(completion)
    texts = dict.fromkeys(str(text) for text in [*golds, *(row.get("references") or ())])
    adapter = row.get("adapter")
    return Prompt(str(row["context"]), tuple(texts), None if adapter is None else str(adapter))
