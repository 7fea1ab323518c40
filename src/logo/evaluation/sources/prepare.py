"""Preparing a dataset: find its raw files, make instances, draw, write both splits and the manifest's entry."""

from __future__ import annotations

import json
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from datetime import datetime, timezone
from pathlib import Path
from typing import Any

from logo.errors import DataError
from logo.evaluation.datasets import dataset_file
from logo.evaluation.metrics import metric_kind
from logo.evaluation.sources.declarations import SPLITS, Declaration
from logo.evaluation.sources.instances import Instance, Instances, draw, make_instances
from logo.evaluation.sources.manifest import Entry, add_to_manifest, metric_file
from logo.evaluation.sources.places import Place, fetch, find_local
from logo.evaluation.sources.readers import read_raw
from logo.evaluation.sources.templates import Wording
from logo.files import new_folder
from logo.rows import file_sha256


@dataclass(frozen=True)
class Request:
    """How much of every dataset is drawn, and from where.

    Attributes:
        raw: a folder with local copies; None: the Hub.
    """

    rows: int = 150
    train_rows: int = 300
    seed: int = 0
    raw: Path | None = None


def prepare(
    declaration: Declaration, data_dir: Path, request: Request, on_stage: Callable[[str], None] = lambda stage: None
) -> Entry:
    """Write `{data_dir}/{main}/{sub}/{test,train}.jsonl` and return the entry that the manifest now has.

    Existing files are replaced together at the end; if an error occurs, they stay.

    Args:
        on_stage: called with a description of each step.

    Raises:
        DataError: raw files that are missing or do not fit the declaration.
        HubError: they cannot be fetched.
        StorageError: they cannot be read, or the result not written.
    """
    wanted = [split for split in SPLITS if split == "test" or request.train_rows > 0]
    on_stage("finding files" if request.raw is not None else "fetching")
    place = _place(declaration, request, wanted)
    try:
        drawn, read = _drawn(declaration, place, request, on_stage)
    except DataError as error:
        if place.commit is None:
            raise
        raise DataError(f"{error} (in {declaration.source} at commit {place.commit})") from error
    texts = {
        f"{split}.jsonl": "".join(json.dumps(item.row(), ensure_ascii=False) + "\n" for item in items)
        for split, items in drawn.items()
    }
    folder = dataset_file(data_dir, declaration.name).parent
    if declaration.metric != metric_kind(declaration.name):
        texts["test.yaml"] = metric_file(declaration.metric)
    with new_folder(folder, replaced=[*(f"{split}.jsonl" for split in SPLITS), "test.yaml"]) as new:
        for name, text in texts.items():
            (new / name).write_bytes(text.encode())
    entry = _entry(declaration, data_dir, request, place, drawn, read)
    add_to_manifest(data_dir, declaration.name, entry)
    return entry


def _place(declaration: Declaration, request: Request, splits: Sequence[str]) -> Place:
    if request.raw is not None:
        return find_local(declaration, request.raw, splits)
    if declaration.hub is None:
        raise DataError(
            f"dataset {declaration.name!r}: it has no source on the Hub; name its raw files with --from DIR"
        )
    return fetch(declaration.hub, declaration.layout, splits)


def _drawn(
    declaration: Declaration, place: Place, request: Request, on_stage: Callable[[str], None]
) -> tuple[dict[str, list[Instance]], list[Instances]]:
    """The rows of each split, and all instances that they were drawn from."""
    wording = Wording(declaration)
    found: dict[str, Instances] = {}
    for split, names in place.names.items():
        same = next((known for known in found if place.names[known] == names), None)
        if same is not None:  # train rows are drawn from those that the test draw leaves
            found[split] = found[same]
            continue
        on_stage(f"reading {split}")
        found[split] = make_instances(declaration.name, wording, read_raw(place.root, names))
    drawn = {"test": draw(found["test"].items, request.rows, request.seed)}
    if "train" in found:
        train = draw(found["train"].items, request.train_rows, request.seed, without=drawn["test"])
        if train:  # a data file has at least one row
            drawn["train"] = train
    return drawn, list({id(instances): instances for instances in found.values()}.values())


def _entry(
    declaration: Declaration,
    data_dir: Path,
    request: Request,
    place: Place,
    drawn: dict[str, list[Instance]],
    read: Sequence[Instances],
) -> Entry:
    hub = declaration.hub
    source: dict[str, Any] = {"homepage": declaration.homepage}
    if request.raw is None and hub is not None:
        source |= {"repo": hub.repo, "revision": hub.revision, "commit": place.commit, "config": hub.config}
    source["files"] = {
        split: [{"path": name, "sha256": file_sha256(place.root / name)} for name in names]
        for split, names in place.names.items()
    }
    return {
        "files": {
            split: {"sha256": file_sha256(dataset_file(data_dir, declaration.name, split)), "rows": len(items)}
            for split, items in drawn.items()
        },
        "source": source,
        "metric": declaration.metric,
        "licence": declaration.licence,
        "citation": declaration.citation,
        "declaration_sha256": declaration.sha256,
        "asked": {"rows": request.rows, "train_rows": request.train_rows, "seed": request.seed},
        "unusable_rows": sum(instances.unusable for instances in read),
        "other_golds": sum(instances.other_golds for instances in read),
        "date": datetime.now(timezone.utc).isoformat(timespec="seconds"),
    }
