"""Preparing a dataset: fetch the files of its splits, make instances of their rows, draw, and write what was drawn.

The draw depends only on an instance's text and the seed: instances are ordered by a hash of both, and the first ones
are taken. So the same seed draws the same rows on every machine, in whatever order a source ships them; fewer rows are
a part of more rows; and further rows do not change the order. No random generator is used, since generators may change.

Only the files of the declared splits are fetched, whatever else a repository has (`load_dataset` of a repository would
fetch every split: the training rows of WMT, too), and loading scripts are never run, since nothing but data is looked
at. Downloads, cache, offline use, tokens and the `HF_*` variables are `huggingface_hub`'s.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any, NamedTuple

from logo.errors import DataError, HubError, listed, need
from logo.evaluation.datasets import dataset_file
from logo.evaluation.metrics import metric_kind
from logo.evaluation.sources.declarations import Declaration
from logo.evaluation.sources.templates import Texts, wording
from logo.files import new_folder
from logo.hub import hub_error, snapshot
from logo.rows import text_lines

RECORD = "source.json"  # beside the rows: what they were made from
WRITTEN = ("test.jsonl", "train.jsonl", "test.yaml", RECORD)


@dataclass(frozen=True)
class Instance:
    """A prompt, its gold text (or the texts that all count as right), all references, and what the draw looks at."""

    context: str
    completion: str | tuple[str, ...]
    references: tuple[str, ...]
    key: str

    @property
    def line(self) -> str:
        """The line of a data file."""
        row: dict[str, Any] = {"context": self.context, "completion": self.completion}
        return json.dumps(row | ({"references": self.references} if self.references else {}), ensure_ascii=False) + "\n"


class Instances(NamedTuple):
    """The instances of a split, and how many raw rows lack a text, or had an earlier prompt and another gold text."""

    items: tuple[Instance, ...]
    unusable: int
    other_golds: int


def prepare(
    declaration: Declaration,
    data_dir: Path,
    *,
    rows: int = 150,
    train_rows: int = 300,
    seed: int = 0,
    progress: bool = False,
) -> dict[str, Any]:
    """Write `{data_dir}/{main}/{sub}/{test,train}.jsonl` and, in `source.json`, what they were made from, which is
    returned. Existing files are replaced together at the end; if an error occurs, they stay.

    Args:
        rows, train_rows: how many are drawn; 0 train rows: no file of them.
        progress: show the progress of downloads.

    Raises:
        DataError: files that are missing or do not fit the declaration.
        HubError: they cannot be fetched.
        StorageError: the result cannot be written.
    """
    origin = declaration.source
    splits = ["test", "train"] if origin.train and train_rows else ["test"]
    root, files = _fetched(declaration, splits, progress)
    try:
        by_files = {names: _instances(declaration, _rows(root, names)) for names in dict.fromkeys(files.values())}
    except DataError as error:
        where = "" if origin.is_local else f" (in {origin.repo} at commit {root.name})"
        raise DataError(f"dataset {declaration.name!r}: {error}{where}; fix the declaration") from None
    drawn = {"test": drawn_from(by_files[files["test"]].items, rows, seed)}
    if "train" in files:  # of one split, train rows are drawn from those that the test draw leaves
        drawn["train"] = drawn_from(by_files[files["train"]].items, train_rows, seed, without=drawn["test"])
    drawn = {split: instances for split, instances in drawn.items() if instances}
    record = {
        "source": {**asdict(origin), "commit": None if origin.is_local else root.name},
        "homepage": declaration.homepage,
        "licence": declaration.licence,
        "citation": declaration.citation,
        "declaration_sha256": declaration.sha256,
        "asked": {"rows": rows, "train_rows": train_rows, "seed": seed},
        "rows": {split: len(instances) for split, instances in drawn.items()},
        "unusable_rows": sum(instances.unusable for instances in by_files.values()),
        "other_golds": sum(instances.other_golds for instances in by_files.values()),
    }
    texts = {f"{split}.jsonl": "".join(instance.line for instance in drawn[split]) for split in drawn}
    texts[RECORD] = json.dumps(record, ensure_ascii=False, indent=2) + "\n"
    if declaration.metric != metric_kind(declaration.name):
        texts["test.yaml"] = f"metric: {declaration.metric}\n"
    folder = dataset_file(data_dir, declaration.name).parent
    with new_folder(folder, replaced=WRITTEN) as new:
        for name, text in texts.items():
            (new / name).write_bytes(text.encode())
    return record


def drawn_from(
    instances: Sequence[Instance], count: int, seed: int, without: Iterable[Instance] = ()
) -> list[Instance]:
    """The first `count` instances in the order of the seed, or all if there are fewer; none whose prompt or whose
    key is one of `without`."""
    taken = list(without)
    contexts = {instance.context for instance in taken}
    keys = {instance.key for instance in taken}
    left = [instance for instance in instances if instance.context not in contexts and instance.key not in keys]

    def place(instance: Instance) -> tuple[bytes, str]:
        return hashlib.sha256(f"{seed}\n{instance.key}".encode()).digest(), instance.context

    return sorted(left, key=place)[:count]


def _fetched(
    declaration: Declaration, splits: Sequence[str], progress: bool
) -> tuple[Path, dict[str, tuple[str, ...]]]:
    """The folder of a source, which on the Hub has the commit's name, and the files of each split below it."""
    origin = declaration.source
    patterns = {split: origin.files(split) for split in splits}
    if origin.is_local:
        root = Path(origin.repo)
    else:
        root = _downloaded(declaration, [pattern for split in splits for pattern in patterns[split]], progress)
    files = {split: _matching(root, patterns[split]) for split in splits}
    for split, names in files.items():
        if not names:
            where = root if origin.is_local else f"{origin.repo} at revision {origin.revision!r}"
            expected = f"expected a file {' or '.join(patterns[split])} of {split} rows, found none"
            raise DataError(f"dataset {declaration.name!r}: {where}: {expected}; fix the declaration")
    return root, files


def _downloaded(declaration: Declaration, patterns: Sequence[str], progress: bool) -> Path:
    """The folder of the files in the Hub's cache that these patterns match."""
    origin = declaration.source
    try:
        return snapshot(
            origin.repo, revision=origin.revision, progress=progress, repo_type="dataset", allow_patterns=list(patterns)
        )
    except HubError as error:
        reason = hub_error(f"datasets/{origin.repo}", error, revision=origin.revision)  # as in the page's address
        raise HubError(f"dataset {declaration.name!r}: {reason}") from error


def _matching(root: Path, patterns: Sequence[str]) -> tuple[str, ...]:
    """The files that the first pattern finds which finds any."""
    for pattern in patterns:
        names = sorted(path.relative_to(root).as_posix() for path in root.glob(pattern))
        if names:
            return tuple(names)
    return ()


def _rows(root: Path, names: Sequence[str]) -> Iterator[tuple[str, Mapping[str, Any]]]:
    """The rows of Parquet or JSON files, each with its place, in order."""
    need("preparing datasets", "datasets")
    ending = Path(names[0]).suffix
    readers = {".parquet": _parquet, ".json": _json, ".jsonl": _json}
    if ending not in readers:
        raise DataError(f"{names[0]}: expected a file that ends in {listed([*readers])}, found {ending or 'none'}")
    try:
        for number, row in enumerate(readers[ending]([root / name for name in names]), start=1):
            yield f"{names[0]}: row {number}", row
    except Exception as error:  # the boundary: pyarrow and datasets each raise their own kinds
        reason = " ".join(f"{error.__cause__ or error!r:.200}".split())
        raise DataError(f"{names[0]}: cannot be read as {ending.removeprefix('.')} ({reason})") from error


def _parquet(files: Sequence[Path]) -> Iterable[Mapping[str, Any]]:
    from datasets import Dataset

    # Not with `load_dataset`, which reports every use to a server; this is the reader inside it.
    rows: Iterable[Mapping[str, Any]] = Dataset.from_parquet([str(file) for file in files], streaming=True)
    return rows


def _json(files: Sequence[Path]) -> Iterable[Mapping[str, Any]]:
    """The objects of files of JSON lines, or of a list. Arrow would give a column one type, and 12 the text 12.0. A
    name that a row lacks is null, as in a table."""
    rows: list[Mapping[str, Any]] = []
    for lines in map(text_lines, files):
        whole = "\n".join(lines)
        rows += json.loads(whole) if whole.startswith("[") else map(json.loads, filter(str.strip, lines))
    names = dict.fromkeys(name for row in rows for name in row)
    return [{**names, **row} for row in rows]


def _instances(declaration: Declaration, rows: Iterable[tuple[str, Mapping[str, Any]]]) -> Instances:
    """Fill the templates from every row. Rows with the same prompt are one instance: with the references of all if the
    declaration has references, else with the gold text of the first row.

    Raises:
        DataError: a row that does not fit the declaration (names the file and the row), or no usable row at all.
    """
    texts_of = wording(declaration)
    by_context: dict[str, Instance] = {}
    unusable = 0
    other_golds = 0
    for where, row in rows:
        try:
            instance = _instance(texts_of(row))
        except DataError as error:
            raise DataError(f"{where}: {error}") from None
        if instance is None:
            unusable += 1
            continue
        first = by_context.setdefault(instance.context, instance)
        if instance.references:
            merged = replace(first, references=_merged(first.references, instance.references))
            by_context[instance.context] = merged
        else:
            other_golds += not set(_merged(instance.completion)) <= set(_merged(first.completion))
    if not by_context:
        raise DataError(f"none of {unusable} rows has a prompt and a gold text; is this the right split?")
    return Instances(tuple(by_context.values()), unusable, other_golds)


def _instance(texts: Texts | None) -> Instance | None:
    """The instance of a row's texts; None without a prompt and a gold text."""
    if texts is None:
        return None
    context = str(texts["context"])
    completion = texts["completion"]
    golds = _merged(completion)
    if not golds or not context.strip():
        return None
    references = _merged(golds, texts["references"]) if "references" in texts else ()
    gold = golds[0] if isinstance(completion, str) else golds
    return Instance(context, gold, references, str(texts["draw_by"]))


def _merged(*texts: str | Iterable[str]) -> tuple[str, ...]:
    """All texts that are not blank, each once."""
    flat = (text for part in texts for text in ([part] if isinstance(part, str) else part))
    return tuple(dict.fromkeys(text for text in flat if text.strip()))
