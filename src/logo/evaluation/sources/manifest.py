"""`manifest.json` of a data folder: which datasets were prepared, from what, and the checksums of their files."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from logo.errors import DataError, LoGoError, StorageError
from logo.evaluation.datasets import dataset_file
from logo.folders import locked, replace_file
from logo.rows import file_sha256, read_rows

NAME = "manifest.json"
VERSION = 1

Entry = dict[str, Any]


def read_manifest(data_dir: Path) -> dict[str, Entry]:
    """The entries by dataset; none where there is no manifest.

    Raises:
        DataError: the file is not a manifest.
        StorageError: it cannot be read.
    """
    file = data_dir / NAME
    try:
        content = json.loads(file.read_bytes())
        entries = content["datasets"]
        sound = content["version"] == VERSION and all(
            isinstance(name, str)
            and isinstance(entry["files"], dict)
            and all(
                isinstance(made["sha256"], str) and isinstance(made["rows"], int) for made in entry["files"].values()
            )
            for name, entry in entries.items()
        )
    except (FileNotFoundError, NotADirectoryError):
        return {}
    except OSError as error:
        raise StorageError(f"{file}: cannot be read ({error.strerror or error}); check its permissions") from error
    except (ValueError, LookupError, TypeError, AttributeError, RecursionError):
        sound, entries = False, {}
    if not sound:
        raise DataError(
            f"{file}: expected a manifest of version {VERSION} as `logo data prepare` writes it, found something "
            "else; move it away and prepare again with --force"
        )
    return dict(entries)


def add_to_manifest(data_dir: Path, name: str, entry: Entry) -> None:
    """Set one dataset's entry; those of other datasets stay, also those that another process adds meanwhile.

    Raises:
        DataError, StorageError: as `read_manifest`, or it cannot be written.
    """
    with locked(data_dir):
        entries = read_manifest(data_dir) | {name: entry}
        content = {"version": VERSION, "datasets": {key: entries[key] for key in sorted(entries)}}
        text = json.dumps(content, ensure_ascii=False, indent=2) + "\n"
        replace_file(data_dir / NAME, text.encode())


def counts(entry: Mapping[str, Any]) -> dict[str, int]:
    """Rows by split."""
    return {split: made["rows"] for split, made in entry["files"].items()}


def verify(data_dir: Path, name: str, entry: Mapping[str, Any]) -> list[str]:
    """What is wrong with a dataset's files, one line each; nothing if all is as the manifest says.

    Looks at checksums, row counts and the form of every row, and that no train row has the prompt of a test row.
    """
    problems = []
    contexts: dict[str, set[str]] = {}
    for split, made in entry["files"].items():
        try:
            file = dataset_file(data_dir, name, split)
            found = file_sha256(file)
            if found != made["sha256"]:
                problems.append(f"{file}: expected sha256 {made['sha256'][:12]}..., found {found[:12]}...")
            rows = read_rows(file)
        except LoGoError as error:
            problems.append(str(error))
            continue
        if len(rows) != made["rows"]:
            problems.append(f"{file}: expected {made['rows']} rows, found {len(rows)}")
        contexts[split] = {row.context for row in rows}
    shared = contexts.get("test", set()) & contexts.get("train", set())
    if shared:
        problems.append(f"{dataset_file(data_dir, name, 'train')}: {len(shared)} prompts are test prompts too")
    return [f"{name}: {problem}" for problem in problems]


def state(data_dir: Path, name: str, splits: Sequence[str], entry: Mapping[str, Any] | None) -> str | None:
    """None if no file of the dataset is there; else "whole" (as the manifest says), "changed" or "foreign" (not in it).

    Raises:
        StorageError: a file cannot be read.
    """
    files = {split: dataset_file(data_dir, name, split) for split in splits}
    there = {split: file for split, file in files.items() if file.exists()}
    if not there:
        return None
    if entry is None:
        return "foreign"
    expected = {split: made["sha256"] for split, made in entry["files"].items()}
    return "whole" if {split: file_sha256(file) for split, file in there.items()} == expected else "changed"
