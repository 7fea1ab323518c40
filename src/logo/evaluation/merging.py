"""Merging shards into the files that one process would have written.

Shards belong together if they have the same name of the run folder and the same dataset, wherever they are, so the
result folders of several machines can be given as they are. All shards of one run have to be there, each once. What
their method has learnt has to be equal, and so have versions and the kind of device, unless the user allows
differences.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from logo.errors import DataError, UsageError
from logo.evaluation.differences import described, differences
from logo.evaluation.metrics import recorded_kind
from logo.evaluation.results import read_results, result_files, write_results
from logo.evaluation.resume import ResumePolicy
from logo.evaluation.runner import Instance, collect, summed
from logo.evaluation.runs import Place, find_results
from logo.evaluation.shards import Shard, positions
from logo.evaluation.standing import standing
from logo.rows import row_of

_BOUND = ("learnt_sha256", "environments")  # what distinguishes whole results, besides their identity
_NEEDED = ("identity", "fingerprint", "pool", "forms", "score_columns", *_BOUND)  # keys of run.json that merging needs
_PER_ROW = ("eval_results.json", "predictions.json", "rows.json", "selected_loras.json", "weights.json")
_CUT = {"count": "the number of shards", "block": "--batch_size", "rows": "the number of rows"}


@dataclass(frozen=True)
class ShardResult:
    """One shard on the disk; `files` by name."""

    place: Place
    files: Mapping[str, Any]

    @property
    def folder(self) -> Path:
        return self.place.folder

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
        """The indices of its rows in the dataset."""
        cut = self.run["shard"]
        return positions(cut["rows"], cut["block"], self.shard)

    @property
    def instances(self) -> list[Instance]:
        """Its answered rows, without the times and the form of each, of which a result has the sums."""
        files, metrics = self.files, self.files["metrics.json"]
        [scores] = files["metric_dict.json"].values()
        errors = {error["index"]: error["message"] for error in metrics["errors"]}
        confidences = metrics.get("confidence") or [None] * len(scores)
        found = []
        for index, row in enumerate(scores):
            known = zip(self.run["score_columns"], row, strict=True) if row else ()
            instance = Instance(
                value=files["eval_results.json"][index],
                prediction=files["predictions.json"][index],
                selected=tuple(files["selected_loras.json"][index]),
                weights=tuple(files["weights.json"][index]),
                scores={name: score for name, score in known if score is not None},
                seconds={},
                error=errors.get(index),
                confidence=confidences[index],
            )
            found.append(instance)
        return found


@dataclass(frozen=True)
class Merged:
    """The merged result: its `folder`, and its `files` by name."""

    folder: Path
    files: Mapping[str, Any]


def find_shards(paths: Iterable[Path]) -> list[ShardResult]:
    """The shards of these paths. Each path is a shard's folder, or a folder of which all shards are taken.

    Raises:
        UsageError: a path is no folder, or has no shard.
        DataError: a shard is incomplete.
        StorageError: a shard lacks a file, or one cannot be read.
    """
    places: dict[Path, Place] = {}
    for path in paths:
        if not path.is_dir():
            kind = "a file" if path.exists() else "nothing"
            raise UsageError(f"results {str(path)!r}: expected a folder, found {kind}")
        found = find_results(path, shards=True)
        if not found:
            raise UsageError(
                f"results {str(path)!r}: no shards there; expected folders DATASET.shard-1-of-N, as "
                "`logo eval run --shard 1/N` makes them"
            )
        places |= {place.folder.resolve(): place for place in found}
    return [_part(place) for place in places.values()]


def merge(parts: Sequence[ShardResult], policy: ResumePolicy | None = None) -> list[Merged]:
    """Merges shards and writes each result beside its first shard; all are checked before one is written.

    Args:
        policy: `overwrite` a merged result of another run; `mix` shards of several versions or kinds of device.

    Raises:
        DataError: a shard is missing, occurs twice, or differs from the others in settings, pool or data; names it.
        UsageError: there is a merged result of another run.
        StorageError: a result cannot be read or written.
    """
    policy = policy or ResumePolicy()
    groups: dict[tuple[str, str], list[ShardResult]] = {}
    for part in parts:
        groups.setdefault((part.place.run_folder.resolve().name, part.dataset), []).append(part)
    done = [_merged(_checked(group, policy.mix)) for group in groups.values()]
    for whole in done:
        if not policy.overwrite:
            _check_place(whole)
    for whole in done:
        write_results(whole.folder, whole.files)
    return done


def _part(place: Place) -> ShardResult:
    folder, files = place.folder, read_results(place.folder)
    part = ShardResult(place, files)
    try:
        expected = len(part.places)
    except (KeyError, TypeError):
        raise DataError(
            f"shard {str(folder)!r}: its run.json names no shard; expected a folder that `logo eval run --shard` wrote"
        ) from None
    unsaid = [key for key in _NEEDED if key not in part.run]
    if unsaid:
        raise DataError(
            f"shard {str(folder)!r}: its run.json, of an earlier version, lacks {', '.join(unsaid)}; "
            "run that shard again with --overwrite"
        )
    try:
        lengths = {len(files[name]) for name in _PER_ROW} | set(map(len, files["metric_dict.json"].values()))
    except (AttributeError, TypeError):
        raise DataError(
            f"shard {str(folder)!r}: expected lists with an entry per row, found something else; run that shard again "
            "with --overwrite"
        ) from None
    if lengths != {expected}:
        raise DataError(
            f"shard {str(folder)!r}: expected {expected} rows, found {' and '.join(map(str, sorted(lengths)))}; "
            "run that shard again with --overwrite"
        )
    return part


def _check_place(merged: Merged) -> None:
    """Checks that the merged result replaces nothing, or an equal result.

    Raises:
        UsageError: there is another result.
    """
    there = standing(merged.folder)
    run: Any = merged.files["run.json"]
    if there is None:
        return
    other = there.other({**run["identity"], "pool": run["pool"], "shard": None})
    if other is None:
        found = differences({key: run[key] for key in _BOUND}, {key: there.run.get(key) for key in _BOUND})
        other = f"{merged.folder} holds a result of its own: {described(found)}" if found else None
    if other is not None:
        raise UsageError(f"dataset {run['dataset']['name']!r}: {other}; --overwrite replaces it")


def _checked(parts: Sequence[ShardResult], mix: bool) -> list[ShardResult]:
    """All shards of one dataset, in order."""
    first = parts[0]
    named = f"dataset {first.dataset!r}"
    held: dict[int, ShardResult] = {}
    for part in parts:
        found = _difference(first, part)
        if found:
            raise DataError(f"{named}: {str(part.folder)!r} is of another run than {str(first.folder)!r}: {found}")
        if part.shard.index in held:
            twice = held[part.shard.index].folder
            raise DataError(
                f"{named}: shard {part.shard} was found twice, in {str(twice)!r} and {str(part.folder)!r}; "
                "name the folders to merge"
            )
        held[part.shard.index] = part
    count = first.shard.count
    missing = [index for index in range(1, count + 1) if index not in held]
    if missing:
        names = ", ".join(str(Shard(index, count)) for index in missing)
        where = str(first.place.run_folder)
        raise DataError(f"{named}: missing of {count} shards in {where!r}: {names}; run them with --shard, then merge")
    ordered = [held[index] for index in range(1, count + 1)]
    if not mix:
        _check_environments(ordered)
    return ordered


def _check_environments(parts: Sequence[ShardResult]) -> None:
    """Raises DataError unless all rows were answered under the same versions and on the same kind of device."""
    first, *others = _environments(parts) or [{}]
    if others:
        odd = next(part for part in parts if others[0] in part.run["environments"])
        raise DataError(
            f"dataset {odd.dataset!r}: shards ran under several versions or on several kinds of device: in "
            f"{str(odd.folder)!r} {described(differences(first, others[0]))}; run one of them again where the other "
            "ran, or let them differ with --mix-environments (run.json says so)"
        )


def _difference(one: ShardResult, other: ShardResult) -> str:
    """The difference between two shards' runs, in a few words; '' if there is none."""
    found = differences(_known_by(one.run), _known_by(other.run))
    if found or one.run["fingerprint"] == other.run["fingerprint"]:
        return described(found)
    return "their fingerprints differ"


def _known_by(run: Mapping[str, Any]) -> dict[str, Any]:
    """The entries of `run.json` that have to be equal in all shards."""
    cut = {name: run["shard"][key] for key, name in _CUT.items()}
    return {**cut, **run["identity"], "pool": run["pool"], "learnt_sha256": run.get("learnt_sha256")}


def _environments(parts: Sequence[ShardResult]) -> list[dict[str, Any]]:
    """The environments, each once."""
    found = [one for part in parts for one in part.run.get("environments", [])]
    return [one for at, one in enumerate(found) if one not in found[:at]]


def _merged(parts: Sequence[ShardResult]) -> Merged:
    placed = {
        place: (instance, row_of(row, f"{part.folder / 'rows.json'}: row {place}"))
        for part in parts
        for place, instance, row in zip(part.places, part.instances, part.files["rows.json"], strict=True)
    }
    instances, rows = zip(*(placed[place] for place in range(len(placed))), strict=True)
    seconds = summed(part.files["time_dict.json"] for part in parts)
    loading = seconds.pop("loading")
    first = parts[0]
    kind = recorded_kind(first.run, first.dataset)
    result = replace(
        collect(first.dataset, instances, inference=seconds["inference"], metric=kind),
        seconds=seconds,
        forms=dict(sorted(sum((Counter(part.run["forms"]) for part in parts), Counter[str]()).items())),
    )
    run = _run(parts, len(rows))
    strategy = next(iter(first.files["metric_dict.json"]))
    files = result_files(
        result, rows, strategy=strategy, loading_seconds=loading, run=run, seed=run["identity"]["seed"]
    )
    return Merged(first.place.run_folder / first.dataset, files)


def _run(parts: Sequence[ShardResult], rows: int) -> dict[str, Any]:
    """`run.json` of the merged result: the first shard's, with the times of all and where each ran."""
    runs = [part.run for part in parts]
    shards = [
        {"shard": str(part.shard), **{key: part.run[key] for key in ("date", "duration", "device", "versions")}}
        for part in parts
    ]
    return {
        **runs[0],
        "date": min(run["date"] for run in runs),
        "duration": sum(run["duration"] for run in runs),
        "dataset": {**runs[0]["dataset"], "rows": rows},
        "options": _of_whole(runs[0]["options"]),
        "device": ", ".join(dict.fromkeys(run["device"] for run in runs)),
        "shard": None,
        "environments": _environments(parts),
        "shards": shards,
    }


def _of_whole(options: Mapping[str, Any]) -> dict[str, Any]:
    """A shard's options without `shard`, as of a run that was never divided, also in the recorded command line."""
    whole = {**options, "shard": None}
    if "command" in options:
        given = {name: value for name, value in options["command"]["options"].items() if name != "shard"}
        whole["command"] = {**options["command"], "options": given}
    return whole
