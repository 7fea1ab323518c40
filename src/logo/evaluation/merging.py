"""Shards put together: the same files as a run that was never cut.

Shards belong together if they are of one run folder's name and one dataset, wherever they lie, so that the result
folders of several machines can be given as they are. All of them have to be there, once, and of one and the same run.
"""

from __future__ import annotations

import json
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from logo.errors import DataError
from logo.evaluation.datasets import Row
from logo.evaluation.metrics import recorded_kind
from logo.evaluation.results import read_results, result_files, write_results
from logo.evaluation.runner import DatasetResult
from logo.evaluation.shards import Shard, is_shard_folder, positions

_CUT = {"count": "the number of shards", "block": "--batch_size", "rows": "the number of rows"}


@dataclass(frozen=True)
class Part:
    """One shard's folder as it lies on the disk; `files` by name."""

    folder: Path
    files: Mapping[str, Any]

    @property
    def run(self) -> Mapping[str, Any]:
        record: Mapping[str, Any] = self.files["run.json"]
        return record

    @property
    def dataset(self) -> str:
        return str(self.run["dataset"]["name"])

    @property
    def shard(self) -> Shard:
        return Shard(self.run["shard"]["index"], self.run["shard"]["count"])

    @property
    def places(self) -> tuple[int, ...]:
        """Where its rows are in the dataset."""
        cut = self.run["shard"]
        return positions(cut["rows"], cut["block"], self.shard)

    @property
    def whole(self) -> Path:
        """Where the whole result goes."""
        return self.run_folder / self.dataset

    @property
    def run_folder(self) -> Path:
        return self.folder.parents[self.dataset.count("/")]


@dataclass(frozen=True)
class Merged:
    """What was put together: the whole result's `folder`, its `files` by name, and the folders of its shards."""

    folder: Path
    files: Mapping[str, Any]
    shards: tuple[Path, ...]


def find_shards(paths: Iterable[Path]) -> list[Part]:
    """The shards that are meant: each path is a shard's folder, or a folder in which all shards are meant.

    Raises:
        DataError: no such folder, no shard in it, or one that is not complete.
        StorageError: a shard lacks a file, or one cannot be read.
    """
    folders: dict[Path, Path] = {}
    for path in paths:
        if not path.is_dir():
            found = "a file" if path.exists() else "nothing"
            raise DataError(f"results {str(path)!r}: expected a folder, found {found}")
        inner = sorted(other for other in path.rglob("*.shard-*-of-*") if other.is_dir() and is_shard_folder(other))
        # Hidden ones are half written.
        inner = [other for other in inner if not any(part.startswith(".") for part in other.relative_to(path).parts)]
        own = [path] if is_shard_folder(path.resolve()) else inner
        if not own:
            raise DataError(
                f"results {str(path)!r}: no shards there; expected folders DATASET.shard-1-of-N, as "
                "`logo evaluate --shard 1/N` makes them"
            )
        folders |= {folder.resolve(): folder for folder in own}
    return [_part(folder) for folder in folders.values()]


def merge(parts: Sequence[Part]) -> list[Merged]:
    """Puts shards together and writes each whole result beside its first shard; all are checked before one is written.

    Raises:
        DataError: a shard is missing, is there twice, or differs from the others in settings, pool or data; names it.
        StorageError: a result cannot be written.
    """
    groups: dict[tuple[str, str], list[Part]] = {}
    for part in parts:
        groups.setdefault((part.run_folder.resolve().name, part.dataset), []).append(part)
    done = [_merged(_checked(group)) for group in groups.values()]
    for whole in done:
        write_results(whole.folder, whole.files)
    return done


def _part(folder: Path) -> Part:
    files = read_results(folder)
    part = Part(folder, files)
    try:
        lengths = {len(files[name]) for name in ("eval_results.json", "predictions.json", "rows.json", "weights.json")}
        expected = len(part.places)
    except (KeyError, TypeError):
        raise DataError(
            f"shard {str(folder)!r}: its run.json says nothing of a shard; expected what `logo evaluate --shard` wrote"
        ) from None
    if lengths != {expected}:
        raise DataError(
            f"shard {str(folder)!r}: expected {expected} rows, found {' and '.join(map(str, sorted(lengths)))}; "
            "run that shard again"
        )
    return part


def _checked(parts: Sequence[Part]) -> list[Part]:
    """All shards of one dataset, in order."""
    first = parts[0]
    named = f"dataset {first.dataset!r}"
    held: dict[int, Part] = {}
    for part in parts:
        found = _difference(first, part)
        if found:
            raise DataError(f"{named}: {str(part.folder)!r} is of another run than {str(first.folder)!r}: {found}")
        if part.shard.index in held:
            twice = held[part.shard.index].folder
            raise DataError(
                f"{named}: shard {part.shard} is there twice, in {str(twice)!r} and {str(part.folder)!r}; "
                "name the folders to merge"
            )
        held[part.shard.index] = part
    count = first.shard.count
    missing = [index for index in range(1, count + 1) if index not in held]
    if missing:
        names = ", ".join(str(Shard(index, count)) for index in missing)
        where = str(first.run_folder)
        raise DataError(f"{named}: missing of {count} shards in {where!r}: {names}; run them with --shard, then merge")
    return [held[index] for index in range(1, count + 1)]


def _difference(one: Part, other: Part) -> str:
    """What tells two shards' runs apart, in a few words; '' if nothing does."""
    pairs = [
        *((name, one.run["shard"][key], other.run["shard"][key]) for key, name in _CUT.items()),
        *_pairs("", one.run["identity"], other.run["identity"]),
        *_pairs("adapter ", one.run["pool"], other.run["pool"]),
    ]
    for name, ours, theirs in pairs:
        if ours != theirs:
            return f"{name} is {_short(theirs)}, not {_short(ours)}"
    return "" if one.run["fingerprint"] == other.run["fingerprint"] else "their fingerprints differ"


def _pairs(prefix: str, one: Mapping[str, Any], other: Mapping[str, Any]) -> Iterable[tuple[str, object, object]]:
    for key in dict.fromkeys((*one, *other)):
        ours, theirs = one.get(key), other.get(key)
        if isinstance(ours, dict) and isinstance(theirs, dict):
            yield from _pairs(f"{prefix}{key}.", ours, theirs)
        else:
            yield f"{prefix}{key}", ours, theirs


def _short(value: object) -> str:
    text = "absent" if value is None else json.dumps(value)
    return text if len(text) <= 20 else f"{text[:20]}..."


def _merged(parts: Sequence[Part]) -> Merged:
    rows = sum(len(part.places) for part in parts)
    columns: list[str] = next((c for part in parts if (c := part.run["score_columns"])), [])
    strategy = next(iter(parts[0].files["metric_dict.json"]))
    errors = {
        part.places[error["index"]]: error["message"]
        for part in parts
        for error in part.files["metrics.json"]["errors"]
    }

    def woven(name: str, wide: bool = False) -> list[Any]:
        values: list[Any] = [None] * rows
        for part in parts:
            content = part.files[name][strategy] if name == "metric_dict.json" else part.files[name]
            for place, value in zip(part.places, content, strict=True):
                # A shard without a single answer does not know what would have been scored.
                values[place] = (value or [None] * len(columns)) if wide else value
        return values

    times = [part.files["time_dict.json"] for part in parts]
    seconds = {key: sum(time.get(key, 0.0) for time in times) for key in dict.fromkeys(k for t in times for k in t)}
    loading = seconds.pop("loading")
    result = DatasetResult(
        dataset=parts[0].dataset,
        metric=recorded_kind(parts[0].run, parts[0].dataset),
        eval_results=tuple(woven("eval_results.json")),
        predictions=tuple(woven("predictions.json")),
        selected=tuple(woven("selected_loras.json")),
        weights=tuple(woven("weights.json")),
        scored=tuple(columns),
        scores=tuple(woven("metric_dict.json", wide=True)),
        seconds=seconds,
        errors=errors,
    )
    all_rows = [_row(row) for row in woven("rows.json")]
    run = _run(parts, rows)
    files = result_files(
        result, all_rows, strategy=strategy, loading_seconds=loading, run=run, seed=run["options"]["seed"]
    )
    return Merged(parts[0].whole, files, tuple(part.folder for part in parts))


def _row(row: Mapping[str, Any]) -> Row:
    completion = row["completion"]
    return Row(
        row["context"],
        completion if isinstance(completion, str) else tuple(completion),
        tuple(row.get("references", ())),
        row.get("adapter"),
    )


def _run(parts: Sequence[Part], rows: int) -> dict[str, Any]:
    """`run.json` of the whole: the first shard's, with what all of them took and where each ran."""
    runs = [part.run for part in parts]
    told = [
        {"shard": str(part.shard), **{key: part.run[key] for key in ("date", "duration", "device", "versions")}}
        for part in parts
    ]
    return {
        **runs[0],
        "date": min(run["date"] for run in runs),
        "duration": sum(run["duration"] for run in runs),
        "dataset": {**runs[0]["dataset"], "rows": rows},
        "options": {**runs[0]["options"], "shard": None},
        "device": ", ".join(dict.fromkeys(run["device"] for run in runs)),
        "shard": None,
        "shards": told,
    }
