"""Which datasets exist in a data folder, and the rows of one of them.

A dataset is the file `{data_dir}/{main}/{sub}/{split}.jsonl`, named `main.sub`: the first dot separates, `sub` may
hold more of them. `logo.rows` describes a line, and `metrics` scores a prediction.
"""

from __future__ import annotations

import fnmatch
import os
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from logo.errors import DataError, UsageError, closest

OFFICIAL: tuple[str, ...] = (
    "bbh.boolean_expressions",
    "bbh.causal_judgement",
    "bbh.formal_fallacies",
    "bbh.navigate",
    "bbh.object_counting",
    "bbh.sports_understanding",
    "bbh.web_of_lies",
    "bbh.word_sorting",
    "wmt14.fr-en",
    "wmt14.en-fr",
    "wmt16.de-en",
    "wmt16.en-de",
    "wmt16.ro-en",
    "wmt16.en-ro",
    "gem.common_gen",
    "gem.dart",
    "gem.e2e_nlg",
    "gem.web_nlg",
    "ai2_arc.ARC-Challenge",
    "ai2_arc.ARC-Easy",
    "nq.natural-questions",
    "tqa.rc",
    "anli.r1",
    "anli.r2",
    "anli.r3",
    "glue.qnli",
)
"""The names of the official dataset list, in its order."""


@dataclass(frozen=True)
class Found:
    """The datasets a request stands for: `names` to run, in order, and the `missing` official ones it also meant."""

    names: tuple[str, ...]
    missing: tuple[str, ...] = ()


def dataset_file(data_dir: str | os.PathLike[str], dataset: str, split: str = "test") -> Path:
    """The file that holds a dataset's rows; it need not exist.

    Raises:
        DataError: the name is not `main.sub`, or would lead out of the data folder.
    """
    main, _, sub = dataset.partition(".")
    if not main or not sub or sub.startswith(".") or any(part in dataset for part in ("/", "\\", "\0")):
        raise DataError(
            f"dataset {dataset!r}: expected a name like 'bbh.navigate' (folder, dot, sub-folder, no slash), "
            f"which is the file {Path(data_dir) / 'bbh' / 'navigate' / f'{split}.jsonl'}"
        )
    return Path(data_dir) / main / sub / f"{split}.jsonl"


def find_datasets(data_dir: str | os.PathLike[str], request: str = "") -> Found:
    """Resolve what a user typed: '' (everything), a name, a pattern (`bbh.*`), or a comma-separated list of both.

    Order: official names in the official order, then the others sorted; a list keeps the order it was typed in.
    '' and patterns skip official names that are absent from the folder and report them as `missing`.

    Raises:
        DataError: no such folder or dataset, or nothing found.
        UsageError: a list without a name in it.
    """
    root = Path(data_dir)
    if not root.is_dir():
        raise DataError(
            f"data folder {str(root)!r}: expected a folder with {{main}}/{{sub}}/test.jsonl files, found "
            f"{'a file' if root.exists() else 'nothing'}; name it with --data_dir"
        )
    present = _present(root)
    items = [item.strip() for item in request.split(",") if item.strip()]
    if not items:
        if request.strip():
            raise UsageError(f"datasets {request!r}: expected names separated by commas, found none")
        items = ["*"]
    names: dict[str, None] = {}  # an ordered set
    missing: dict[str, None] = {}
    for item in items:
        found = _matching(root, item, present) if _is_pattern(item) else _named(root, item, present)
        names |= dict.fromkeys(found.names)
        missing |= dict.fromkeys(found.missing)
    return Found(tuple(names), tuple(missing))


def _present(root: Path) -> list[str]:
    """Names of the datasets in a folder, official ones first. Folders that no name can reach are passed over."""
    files = root.glob("*/*/test.jsonl")
    parts = {(file.parent.parent.name, file.parent.name) for file in files if file.is_file()}
    names = {f"{main}.{sub}" for main, sub in parts if "." not in main and not sub.startswith(".")}
    return [name for name in OFFICIAL if name in names] + sorted(names.difference(OFFICIAL))


def _is_pattern(item: str) -> bool:
    return any(sign in item for sign in "*?[")


def _matching(root: Path, pattern: str, present: Sequence[str]) -> Found:
    names = tuple(name for name in present if fnmatch.fnmatchcase(name, pattern))
    missing = tuple(name for name in OFFICIAL if fnmatch.fnmatchcase(name, pattern) and name not in present)
    if names:
        return Found(names, missing)
    if missing:
        raise _absent(root, missing[0])
    raise DataError(f"datasets {pattern!r}: no dataset in {str(root)!r} matches; `logo data list` shows what is there")


def _named(root: Path, name: str, present: Sequence[str]) -> Found:
    if name in present:
        return Found((name,))
    if name in OFFICIAL:
        raise _absent(root, name)
    hint = _did_you_mean(name, [*OFFICIAL, *(other for other in present if other not in OFFICIAL)])
    file = dataset_file(root, name) if "." in name else root / "{main}" / "{sub}" / "test.jsonl"
    raise DataError(f"dataset {name!r}: unknown, expected a file {file}, found none{hint}")


def _absent(root: Path, name: str) -> DataError:
    file = dataset_file(root, name)
    return DataError(f"dataset {name!r}: expected the file {file}, found none; put it there or change --data_dir")


def _did_you_mean(name: str, known: Sequence[str]) -> str:
    if any(other.startswith(f"{name}.") for other in known):
        return f" (did you mean '{name}.*'?)"
    return closest(name, known) or "; `logo data list` shows what is there"
