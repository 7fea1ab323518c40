"""Which datasets exist in a data folder, and the rows of one of them.

A dataset is the file `{data_dir}/{main}/{sub}/{split}.jsonl`, named `main.sub`: the first dot separates, `sub` may
hold more of them. Every line is an object with a `context` (the prompt) and a `completion` (the gold text, or a list
of texts that are all right); it may have `references` (all gold texts, where the official metric reads only one) and
an `adapter` (the one made for such rows). A file is validated whole before its first row is used, so that a typing
error on the last line is not met after hours of work. What a prediction is worth is not known here: see `metrics`.
"""

from __future__ import annotations

import difflib
import fnmatch
import hashlib
import json
import os
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

from logo.errors import DataError, StorageError, UsageError

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

_SHOWN = 60  # characters of a wrong value that are worth showing in a message
_EXPECTED = '{"context": text, "completion": text or list of texts}'
_OPTIONAL = '"references", if there are any, to be a list of texts and "adapter" a name'


@dataclass(frozen=True)
class Row:
    """One instance.

    Attributes:
        context: the prompt.
        completion: its gold text, or all gold texts that count as right.
        references: all gold texts, where the data has more than the official metric reads.
        adapter: the adapter made for such rows, where the data names it.
    """

    context: str
    completion: str | tuple[str, ...]
    references: tuple[str, ...] = ()
    adapter: str | None = None

    @property
    def golds(self) -> tuple[str, ...]:
        """All gold texts, each once: those of `completion` first, then the other `references`."""
        texts = (self.completion,) if isinstance(self.completion, str) else self.completion
        return tuple(dict.fromkeys((*texts, *self.references)))

    def as_dict(self) -> dict[str, object]:
        """For JSON, as a data file has it: what the row does not have is left out."""
        row: dict[str, object] = {"context": self.context, "completion": self.completion}
        return row | {key: value for key in ("references", "adapter") if (value := getattr(self, key))}


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


def find_datasets(data_dir: str | os.PathLike[str], request: str = "", split: str = "test") -> Found:
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
            f"data folder {str(root)!r}: expected a folder with {{main}}/{{sub}}/{split}.jsonl files, found "
            f"{'a file' if root.exists() else 'nothing'}; name it with --data_dir"
        )
    present = _present(root, split)
    items = [item.strip() for item in request.split(",") if item.strip()]
    if not items:
        if request.strip():
            raise UsageError(f"datasets {request!r}: expected names separated by commas, found none")
        items = ["*"]
    names: dict[str, None] = {}  # an ordered set
    missing: dict[str, None] = {}
    for item in items:
        found = _matching(root, item, present, split) if _is_pattern(item) else _named(root, item, present, split)
        names |= dict.fromkeys(found.names)
        missing |= dict.fromkeys(found.missing)
    return Found(tuple(names), tuple(missing))


def load_rows(
    data_dir: str | os.PathLike[str], dataset: str, limit: int | None = None, split: str = "test"
) -> list[Row]:
    """All rows of a dataset, or the first `limit` of them, after every line of the file was checked.

    Raises:
        DataError: no such file, an empty one, or a malformed line (the message starts with `file:line`).
        StorageError: the file cannot be read.
        UsageError: a limit below 1.
    """
    return read_rows(dataset_file(data_dir, dataset, split), limit)


def read_rows(file: Path, limit: int | None = None) -> list[Row]:
    """`load_rows` of a file wherever it lies."""
    if limit is not None and limit < 1:
        raise UsageError(f"limit {limit}: expected at least 1 row; leave it out for all rows")
    rows: list[Row] = []
    blank = 0  # the first of the blank lines just before this one, 0 if none: blank lines may only end the file
    for number, line in enumerate(_read(file).removeprefix(b"\xef\xbb\xbf").split(b"\n"), start=1):
        if not line.strip():
            blank = blank or number
            continue
        if blank:
            raise _malformed(file, blank, "an empty line between rows")
        rows.append(_row(file, number, line))
    if not rows:
        raise DataError(f"{file}: expected one JSON object per line, found an empty file")
    return rows[:limit]


def file_sha256(file: str | os.PathLike[str]) -> str:
    """The SHA-256 of a file's bytes, in hex: says later which rows a result stands on.

    Raises:
        DataError: no such file.
        StorageError: it cannot be read.
    """
    return hashlib.sha256(_read(Path(file))).hexdigest()


def _present(root: Path, split: str) -> list[str]:
    """Names of the datasets in a folder, official ones first. Folders that no name can reach are passed over."""
    files = root.glob(f"*/*/{split}.jsonl")
    parts = {(file.parent.parent.name, file.parent.name) for file in files if file.is_file()}
    names = {f"{main}.{sub}" for main, sub in parts if "." not in main and not sub.startswith(".")}
    return [name for name in OFFICIAL if name in names] + sorted(names.difference(OFFICIAL))


def _is_pattern(item: str) -> bool:
    return any(sign in item for sign in "*?[")


def _matching(root: Path, pattern: str, present: Sequence[str], split: str) -> Found:
    names = tuple(name for name in present if fnmatch.fnmatchcase(name, pattern))
    missing = tuple(name for name in OFFICIAL if fnmatch.fnmatchcase(name, pattern) and name not in present)
    if names:
        return Found(names, missing)
    if missing:
        raise _absent(root, missing[0], split)
    raise DataError(f"datasets {pattern!r}: no dataset in {str(root)!r} matches; `logo datasets` lists what is there")


def _named(root: Path, name: str, present: Sequence[str], split: str) -> Found:
    if name in present:
        return Found((name,))
    if name in OFFICIAL:
        raise _absent(root, name, split)
    hint = _did_you_mean(name, [*OFFICIAL, *(other for other in present if other not in OFFICIAL)])
    file = dataset_file(root, name, split) if "." in name else root / "{main}" / "{sub}" / f"{split}.jsonl"
    raise DataError(f"dataset {name!r}: unknown, expected a file {file}, found none{hint}")


def _absent(root: Path, name: str, split: str) -> DataError:
    file = dataset_file(root, name, split)
    return DataError(f"dataset {name!r}: expected the file {file}, found none; put it there or change --data_dir")


def _did_you_mean(name: str, known: Sequence[str]) -> str:
    if any(other.startswith(f"{name}.") for other in known):
        return f"; did you mean '{name}.*'?"
    lowered = {other.lower(): other for other in known}
    close = difflib.get_close_matches(name.lower(), list(lowered), n=3)
    if not close:
        return "; `logo datasets` lists what is there"
    return f"; did you mean {' or '.join(repr(lowered[other]) for other in close)}?"


def _read(file: Path) -> bytes:
    try:
        return file.read_bytes()
    except (FileNotFoundError, NotADirectoryError):
        raise DataError(f"{file}: expected a file, found none; put it there or change --data_dir") from None
    except OSError as error:
        raise StorageError(f"{file}: cannot be read ({error.strerror or error}); check its permissions") from error


def _row(file: Path, number: int, line: bytes) -> Row:
    try:
        row = json.loads(line.decode("utf-8"))
    except UnicodeDecodeError as error:
        raise _malformed(file, number, f"bytes that are not UTF-8 at column {error.start + 1}") from None
    except json.JSONDecodeError as error:
        raise _malformed(file, number, f"invalid JSON: {error.msg} at column {error.colno}") from None
    except (ValueError, RecursionError) as error:  # an integer of thousands of digits; brackets nested without end
        raise _malformed(file, number, f"unreadable JSON: {error}") from None
    if not isinstance(row, dict):
        raise _malformed(file, number, _shown(row))
    for key in ("context", "completion"):
        if key not in row:
            raise _malformed(file, number, f"no {key!r}, only {_shown(', '.join(row))}")
    try:
        return _checked(row)
    except _Wrong as wrong:
        raise _malformed(file, number, wrong.found, wrong.expected) from None


class _Wrong(Exception):
    """A value of a row that is not as it should be."""

    def __init__(self, found: str, expected: str = _EXPECTED) -> None:
        super().__init__(found)
        self.found, self.expected = found, expected


def _checked(row: Mapping[str, object]) -> Row:
    context = _text("'context'", row["context"])
    found = row["completion"]
    completion = _texts("'completion'", found) if isinstance(found, list) else _text("'completion'", found)
    try:  # null is what table formats write where a row has no value
        references = () if row.get("references") is None else _references(row["references"])
        adapter = None if row.get("adapter") is None else _text("'adapter'", row["adapter"])
    except _Wrong as wrong:
        raise _Wrong(wrong.found, _OPTIONAL) from None
    return Row(context, completion, references, adapter)


def _references(value: object) -> tuple[str, ...]:
    """Real sets hold blank references here and there; they say nothing, and are passed over."""
    if isinstance(value, list) and value:
        value = [text for text in value if not isinstance(text, str) or text.strip()]
        if not value:
            return ()
    return _texts("'references'", value)


def _texts(name: str, value: object) -> tuple[str, ...]:
    if not isinstance(value, list):
        raise _Wrong(f"{name} is {_shown(value)}")
    if not value:
        raise _Wrong(f"{name} is an empty list")
    return tuple(_text(f"{name}[{index}]", text) for index, text in enumerate(value))


def _text(name: str, value: object) -> str:
    if not isinstance(value, str):
        raise _Wrong(f"{name} is {_shown(value)}")
    if not value.strip():
        raise _Wrong(f"{name} is empty")
    if any("\ud800" <= character <= "\udfff" for character in value):  # no tokenizer accepts these
        raise _Wrong(f"{name} holds half of a surrogate pair: {_shown(value)}")
    return value


def _malformed(file: Path, number: int, found: str, expected: str = _EXPECTED) -> DataError:
    return DataError(f"{file}:{number}: expected {expected}, found {found}; mend or delete the line")


def _shown(value: object) -> str:
    """A wrong JSON value as it stands in the file, short; a container only by its kind."""
    if isinstance(value, (dict, list)):
        return "an object" if isinstance(value, dict) else "a list"
    text = json.dumps(value)
    return text if len(text) <= _SHOWN else f"{text[:_SHOWN]}..."
