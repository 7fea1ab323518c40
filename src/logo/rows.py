"""`Row`: a prompt and its gold completion; reads files of rows.

Every line of a JSONL file is an object with a `context` (the prompt) and a `completion` (the gold text, or a list of
texts that all count as right). Instead of a `context` it may have the `messages` of a conversation, which end with the
assistant's gold answer, unless there is another `completion`. It may have `references` (all gold texts, if the official
metric reads only one) and an `adapter` (the one made for such rows). Where only prompts are needed, a gold text may be
missing. A file is checked whole before its first row is used, so that an error on the last line is not found after
hours of work.
"""

from __future__ import annotations

import csv
import fnmatch
import json
from collections.abc import Callable, Collection, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from logo.errors import DataError, LoGoError, StorageError, UsageError, listed
from logo.files import walked
from logo.prompts import checked_turns, plain

if TYPE_CHECKING:
    from logo.prompts import Conversation

_LIKELY = (".jsonl", ".ndjson", ".json", ".csv", ".tsv", ".parquet")
_SHOWN = 60  # characters of a wrong value that a message shows
_EXPECTED = '{"context": text, "completion": text or list of texts}'
_CHAT = 'a prompt in "messages", and its gold answer as the last message, of the assistant, or as "completion"'


@dataclass(frozen=True)
class Row:
    """One labelled example.

    Attributes:
        context: the prompt as a text; of a conversation the contents of its messages, one per line.
        completion: its gold text, or all gold texts that count as right; an empty tuple: it has none.
        references: all gold texts, if the data has more than the official metric reads.
        adapter: the adapter made for such rows, if the data names it.
        messages: the conversation before the answer; empty: the prompt is a text.
    """

    context: str
    completion: str | tuple[str, ...]
    references: tuple[str, ...] = ()
    adapter: str | None = None
    messages: tuple[Mapping[str, Any], ...] = ()

    @property
    def prompt(self) -> str | Conversation:
        """What a model is given: the messages, or the context."""
        return self.messages or self.context

    @property
    def key(self) -> str:
        """The prompt as one text, in which conversations with other roles differ."""
        return json.dumps(self.messages, sort_keys=True) if self.messages else self.context

    @property
    def golds(self) -> tuple[str, ...]:
        """All gold texts, each once: those of `completion` first, then the other `references`."""
        texts = (self.completion,) if isinstance(self.completion, str) else self.completion
        return tuple(dict.fromkeys((*texts, *self.references)))

    @property
    def whole(self) -> bool:
        """Whether a gold text that counts as right has several lines, so that an answer is not only its first line."""
        texts = (self.completion,) if isinstance(self.completion, str) else self.completion
        return any(len(text.strip().splitlines()) > 1 for text in texts)

    def as_dict(self) -> dict[str, object]:
        """The row as an object of a data file, without empty fields."""
        names = ("context", "completion", "references", "adapter", "messages")
        fields = {name: getattr(self, name) for name in names}
        return {name: value for name, value in fields.items() if value}


# A file that marks the folder of a result or of an adapter -> the file of JSON lines there that is no row of a user.
_MARKS: Mapping[str, str] = {"run.json": "rows.jsonl", "adapter_config.json": "examples.jsonl"}


def row_files(root: Path) -> list[Path]:
    """The files below a folder that may hold rows, sorted: not hidden ones, and not those of results and adapters."""
    shown = _shown_files(root)
    marked = {path.parent for path in shown if path.name in _MARKS}
    return [path for path in shown if path.parent not in marked]


def passed_over(root: Path, suffixes: Collection[str] = (".jsonl",)) -> dict[Path, list[Path]]:
    """The files of these suffixes that `row_files` leaves out although they are not what a result or an adapter has
    there itself, by the file that marks their folder."""
    shown = _shown_files(root)
    skipped: dict[Path, list[Path]] = {}
    for mark in (path for path in shown if path.name in _MARKS):
        beside = [path for path in shown if path.parent == mark.parent and path.suffix in suffixes]
        files = [path for path in beside if path.name != _MARKS[mark.name]]
        if files:
            skipped[mark] = files
    return skipped


def why_passed_over(root: Path, skipped: Mapping[Path, Sequence[Path]]) -> str:
    """In words, the files that are `passed_over`, and the file beside them that marks a result or an adapter."""
    reasons = []
    for mark, files in skipped.items():
        names = listed([file.relative_to(root).as_posix() for file in files], 5)
        beside = f"{mark.relative_to(root).as_posix()} beside {'it' if len(files) == 1 else 'them'}"
        held = "a result" if mark.name == "run.json" else "an adapter"
        reasons.append(f"{names} not read: {beside} says that the folder holds {held}")
    return f"{'; '.join(reasons)}; keep rows in a folder of their own"


def _shown_files(root: Path) -> list[Path]:
    """The files below a folder that are not hidden, sorted."""
    return [
        path for path in sorted(walked(root)) if not any(part.startswith(".") for part in path.relative_to(root).parts)
    ]


def unread(root: Path, read: Collection[Path]) -> list[str]:
    """The files below a folder that probably hold rows, too, though neither they nor their folders are `read`."""
    likely = (path for path in row_files(root) if path.suffix.lower() in _LIKELY)
    return [path.relative_to(root).as_posix() for path in likely if not {path, path.parent} & {*read}]


def is_broken(text: str) -> bool:
    """Whether a text holds half of a surrogate pair, which no tokenizer accepts."""
    return any("\ud800" <= character <= "\udfff" for character in text)


def text_lines(file: Path) -> list[str]:
    """The lines of a text file in UTF-8, with or without a byte order mark.

    Only line ends separate them, so a line may hold form feeds and Unicode's own separators of lines.

    Raises:
        OSError, UnicodeDecodeError: it cannot be read.
    """
    lines = file.read_text(encoding="utf-8-sig").split("\n")
    return lines if lines[-1] else lines[:-1]


def read_rows(file: Path, limit: int | None = None, *, answers: bool = True) -> list[Row]:
    """All rows of a file, or the first `limit` of them, after every line was checked.

    Args:
        answers: False: a row may be a prompt without gold texts.

    Raises:
        DataError: no such file, an empty one, or a malformed line (the message starts with `file:line`).
        StorageError: the file cannot be read.
        UsageError: a limit below 1.
    """
    if limit is not None and limit < 1:
        raise UsageError(f"limit {limit}: expected at least 1 row; leave it out for all rows")
    return [row_of(value, f"{file}:{number}", answers=answers) for number, value in objects(file)][:limit]


def training_rows(file: Path, *, answers: bool = True) -> list[Row]:
    """The rows of a task to learn, from JSON lines (see `read_rows`) or CSV. Raises DataError or StorageError."""
    return list(_csv_rows(file)) if file.suffix == ".csv" else read_rows(file, answers=answers)


def _csv_rows(file: Path) -> Iterator[Row]:
    """The rows of a CSV file with the columns `context` and `completion`; every cell is a text, also 007."""
    csv.field_size_limit(2**31 - 1)  # a context may be a book
    number = 1
    try:
        with file.open(encoding="utf-8-sig", newline="") as stream:
            reader = csv.DictReader(stream, strict=True)
            if sum(name in ("context", "completion") for name in reader.fieldnames or ()) > 2:
                raise malformed(f"{file}:1", "two of one name", "one column each for context and completion")
            for row in reader:
                number = reader.line_num
                if None in row or None in row.values():
                    raise malformed(f"{file}:{number}", "another number of fields", "as many as in line 1")
                yield row_of({key: row[key] for key in ("context", "completion") if key in row}, f"{file}:{number}")
            if number == 1:
                raise DataError(f"{file}: expected a line of names and one line per row, found no rows")
    except (csv.Error, UnicodeDecodeError) as error:
        raise DataError(f"{file}:{number}: is not valid CSV in UTF-8: {error}") from None
    except OSError as error:
        raise StorageError(f"{file}: cannot be read ({error.strerror or error})") from error


def objects(file: Path) -> Iterator[tuple[int, dict[str, Any]]]:
    """The line numbers and objects of a JSONL file, which has at least one.

    Raises:
        DataError: no such file, an empty one, or a line that is no object (the message starts with `file:line`).
        StorageError: the file cannot be read.
    """
    blank = 0  # the first of the blank lines before this one, which may only be at the end of the file
    empty = True
    try:
        content = file.read_bytes().removeprefix(b"\xef\xbb\xbf")
    except (FileNotFoundError, NotADirectoryError):
        raise DataError(f"{file}: expected a file, found none; put it there or name another folder") from None
    except OSError as error:
        raise StorageError(f"{file}: cannot be read ({error.strerror or error}); check its permissions") from error
    for number, line in enumerate(content.split(b"\n"), start=1):
        if not line.strip():
            blank = blank or number
            continue
        if blank:
            raise malformed(f"{file}:{blank}", "an empty line between rows")
        empty = False
        where = f"{file}:{number}"
        try:
            value = json.loads(line.decode("utf-8"))
        except UnicodeDecodeError as error:
            raise malformed(where, f"bytes that are not UTF-8 at column {error.start + 1}") from None
        except json.JSONDecodeError as error:
            raise malformed(where, f"invalid JSON: {error.msg} at column {error.colno}") from None
        except (ValueError, RecursionError) as error:  # also an integer of thousands of digits, or very deep nesting
            raise malformed(where, f"unreadable JSON: {error}") from None
        if not isinstance(value, dict):
            raise malformed(where, _shown(value))
        yield number, value
    if empty:
        raise DataError(f"{file}: expected one JSON object per line, found an empty file")


def malformed(where: str, found: str, expected: str = _EXPECTED) -> DataError:
    """The error for a malformed line; `where`: the file and the line."""
    return DataError(f"{where}: expected {expected}, found {found}; fix or delete the line")


def row_of(value: Mapping[str, Any], where: str, *, answers: bool = True) -> Row:
    """Makes a row of an object.

    Args:
        where: the file and the line, for errors.
        answers: False: it may have no gold text.

    Raises:
        DataError: a field is missing, empty or of another kind.
    """
    turns: tuple[Mapping[str, Any], ...] = ()
    if "prompt" in value and "context" not in value:  # as other tools call it
        value = {**value, "context": value["prompt"]}
    if value.get("messages") is not None:
        value, turns = _conversation(value, where, answers)
    for key in ("context", "completion") if answers else ("context",):
        if key not in value:
            raise malformed(where, f"no {key!r}, only {_shown(', '.join(map(str, value)))}")
    # Table formats write null for a missing value, and real datasets have blank references.
    gold = value.get("completion")
    references = value.get("references")
    adapter = value.get("adapter")
    if isinstance(references, list) and references:
        references = [text for text in references if not isinstance(text, str) or text.strip()] or None
    read: Callable[[str, str, object], str | tuple[str, ...]] = _texts if isinstance(gold, list) else _text
    return Row(
        context=_text(where, "'context'", value["context"]),
        completion=() if gold is None and not answers else read(where, "'completion'", gold),
        references=() if references is None else _texts(where, "'references'", references),
        adapter=None if adapter is None else _text(where, "'adapter'", adapter),
        messages=turns,
    )


def _conversation(
    row: Mapping[str, Any], where: str, answers: bool
) -> tuple[Mapping[str, Any], tuple[Mapping[str, Any], ...]]:
    """A row with messages as one with a context and a completion; and the messages before the answer.

    If the last message is the assistant's and there is no other completion, it is the completion.
    """
    messages = row["messages"]
    if not isinstance(messages, (list, tuple)) or not messages:
        raise malformed(where, "no messages" if messages in ([], ()) else _shown(messages), _CHAT)
    try:
        turns = checked_turns(messages)
    except UsageError as error:  # it says what was expected
        raise DataError(f"{where}: {error}; fix or delete the line") from None
    completion = row.get("completion")
    last = turns[-1]
    answer = last["content"] if last["role"] == "assistant" else None
    if completion in (None, answer) and (answers or answer is not None):
        turns = turns[:-1]
        completion = answer
        if not turns or answer is None or not answer.strip():
            what = f"{len(messages)} message(s), the last one of the {last['role']}, and no completion"
            raise malformed(where, what, _CHAT)
    if turns[-1]["role"] == "assistant":  # the model would be asked to answer an answer
        raise malformed(where, f"two answers: {_shown(turns[-1]['content'])} and {_shown(completion)}", _CHAT)
    return {**row, "context": plain(turns), "completion": completion}, tuple(turns)


def _texts(where: str, name: str, value: object) -> tuple[str, ...]:
    if not isinstance(value, list) or not value:
        raise malformed(where, f"{name} is {'an empty list' if value == [] else _shown(value)}")
    return tuple(_text(where, f"{name}[{index}]", text) for index, text in enumerate(value))


def _text(where: str, name: str, value: object) -> str:
    if not isinstance(value, str):
        raise malformed(where, f"{name} is {_shown(value)}")
    if not value.strip():
        raise malformed(where, f"{name} is empty")
    if is_broken(value):
        raise malformed(where, f"{name} holds half of a surrogate pair: {_shown(value)}")
    return value


def _shown(value: object) -> str:
    """A wrong JSON value as the file has it, shortened; of a container only its kind."""
    if isinstance(value, (dict, list)):
        return "an object" if isinstance(value, dict) else "a list"
    text = json.dumps(value)
    return text if len(text) <= _SHOWN else f"{text[:_SHOWN]}..."


def requested(request: str, names: Collection[str], unknown: Callable[[str], LoGoError]) -> list[str]:
    """Of `names`, those that a request means, in its order.

    Args:
        request: names, patterns (`bbh.*`) or first parts of names (`bbh`) between commas; empty: all.
        unknown: makes the error that is raised for a part that means none.
    """
    meant: dict[str, None] = {}
    for part in [part.strip() for part in request.split(",") if part.strip()] or ["*"]:
        matching = [name for name in names if fnmatch.fnmatchcase(name, part) or name.partition(".")[0] == part]
        if part not in names and not matching:
            raise unknown(part)
        meant |= dict.fromkeys([part] if part in names else matching)
    return list(meant)
