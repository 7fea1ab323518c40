"""`manifest.json` of a data folder: which datasets were prepared, from what, and the checksums of their files."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from logo.errors import DataError, StorageError
from logo.evaluation.datasets import dataset_file
from logo.evaluation.metrics import metric_kind
from logo.files import locked, replace_file
from logo.rows import file_sha256

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


def metric_file(metric: str) -> str:
    """What a file beside the rows holds that declares their metric."""
    return f"metric: {metric}\n"


def state(data_dir: Path, name: str, splits: Sequence[str], entry: Mapping[str, Any] | None) -> str | None:
    """None if no file of the dataset is there; else "whole" (as the manifest says, with the metric that it says beside
    the rows), "changed" or "foreign" (not in it).

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
    metric, beside = entry.get("metric"), dataset_file(data_dir, name, "test").with_suffix(".yaml")
    declared = beside.read_text(encoding="utf-8", errors="replace") if beside.exists() else ""
    same = declared == ("" if metric in (None, metric_kind(name)) else metric_file(str(metric)))
    same = same and {split: file_sha256(file) for split, file in there.items()} == expected
    return "whole" if same else "changed"
