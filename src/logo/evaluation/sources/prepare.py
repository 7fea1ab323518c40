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
from logo.evaluation.sources.declarations import SPLITS, Declaration
from logo.evaluation.sources.templates import wording
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
    wanted = [split for split in SPLITS if split == "test" or (declaration.source.train and train_rows)]
    root, files = _fetched(declaration, wanted, progress)
    try:
        found = {name: _instances(declaration, _rows(root, name)) for name in dict.fromkeys(files.values())}
    except DataError as error:
        at = "" if declaration.source.is_local else f" (in {declaration.source.repo} at commit {root.name})"
        raise DataError(f"dataset {declaration.name!r}: {error}{at}; fix the declaration") from None
    drawn = {"test": drawn_from(found[files["test"]].items, rows, seed)}
    if "train" in files:  # of one split, train rows are drawn from those that the test draw leaves
        drawn["train"] = drawn_from(found[files["train"]].items, train_rows, seed, without=drawn["test"])
    record = {
        "source": {**asdict(declaration.source), "commit": None if declaration.source.is_local else root.name},
        **{key: getattr(declaration, key) for key in ("homepage", "licence", "citation")},
        "declaration_sha256": declaration.sha256,
        "asked": {"rows": rows, "train_rows": train_rows, "seed": seed},
        "rows": {split: len(items) for split, items in drawn.items() if items},
        "unusable_rows": sum(instances.unusable for instances in found.values()),
        "other_golds": sum(instances.other_golds for instances in found.values()),
    }
    texts = {f"{split}.jsonl": "".join(item.line for item in items) for split, items in drawn.items() if items}
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
    taken = [(instance.context, instance.key) for instance in without]
    contexts, keys = {context for context, _ in taken}, {key for _, key in taken}
    rest = [instance for instance in instances if instance.context not in contexts and instance.key not in keys]

    def place(instance: Instance) -> tuple[bytes, str]:
        return hashlib.sha256(f"{seed}\n{instance.key}".encode()).digest(), instance.context

    return sorted(rest, key=place)[:count]


def _fetched(
    declaration: Declaration, splits: Sequence[str], progress: bool
) -> tuple[Path, dict[str, tuple[str, ...]]]:
    """The folder of a source, which on the Hub has the commit's name, and the files of each split below it."""
    source = declaration.source
    patterns = {split: source.files(split) for split in splits}
    if source.is_local:
        root = Path(source.repo)
    else:
        every = [pattern for split in splits for pattern in patterns[split]]
        try:
            root = snapshot(
                source.repo, revision=source.revision, progress=progress, repo_type="dataset", allow_patterns=every
            )
        except HubError as error:
            said = hub_error(f"datasets/{source.repo}", error, revision=source.revision)  # as in the page's address
            raise HubError(f"dataset {declaration.name!r}: {said}") from error
    found = {split: _matching(root, patterns[split]) for split in splits}
    for split, names in found.items():
        if not names:
            where = root if source.is_local else f"{source.repo} at revision {source.revision!r}"
            expected = f"expected a file {' or '.join(patterns[split])} of {split} rows, found none"
            raise DataError(f"dataset {declaration.name!r}: {where}: {expected}; fix the declaration")
    return root, found


def _matching(root: Path, patterns: Sequence[str]) -> tuple[str, ...]:
    """The files that the first pattern finds which finds any."""
    every = (sorted(path.relative_to(root).as_posix() for path in root.glob(pattern)) for pattern in patterns)
    return tuple(next(filter(None, every), []))


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
        said = " ".join(f"{error.__cause__ or error!r:.200}".split())
        raise DataError(f"{names[0]}: cannot be read as {ending.removeprefix('.')} ({said})") from error


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
    found: dict[str, Instance] = {}
    unusable = other_golds = 0
    for where, row in rows:
        try:
            texts = texts_of(row)
        except DataError as error:
            raise DataError(f"{where}: {error}") from None
        completion = texts["completion"] if texts else ()
        golds, context = _merged(completion), str(texts["context"]) if texts else ""
        if not texts or not golds or not context.strip():
            unusable += 1
            continue
        references = _merged(golds, texts["references"]) if "references" in texts else ()
        gold = golds[0] if isinstance(completion, str) else golds
        instance = Instance(context, gold, references, str(texts["draw_by"]))
        if (known := found.get(instance.context)) is None:
            found[instance.context] = instance
        elif instance.references:
            found[instance.context] = replace(known, references=_merged(known.references, instance.references))
        else:
            other_golds += not set(_merged(instance.completion)) <= set(_merged(known.completion))
    if not found:
        raise DataError(f"none of {unusable} rows has a prompt and a gold text; is this the right split?")
    return Instances(tuple(found.values()), unusable, other_golds)


def _merged(*texts: str | Iterable[str]) -> tuple[str, ...]:
    """All texts that are not blank, each once."""
    flat = (text for part in texts for text in ([part] if isinstance(part, str) else part))
    return tuple(dict.fromkeys(text for text in flat if text.strip()))
