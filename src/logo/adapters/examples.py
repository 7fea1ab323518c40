"""Example prompts of an adapter: a few prompts of its task, without answers.

    <adapter>/examples.jsonl        one JSON object per line: `{"prompt": "..."}`, and `"learned"` if it was learned:
                                    the confidence of the selection, or true if its request named the adapter
    <adapter>/README.md             else the texts of the model card's widget

The base model describes an adapter's prompts by them (`logo.selection.signature`). Examples are read from the folder of
the adapter, and are never sent anywhere.
"""

from __future__ import annotations

import hashlib
import json
import warnings
from collections.abc import Sequence
from functools import cached_property
from pathlib import Path
from typing import Any

from logo.adapters.files import CONFIG, EXAMPLES, MODEL_CARD
from logo.errors import DataError, StorageError
from logo.folders import replace_file

# The most examples that are read; more hardly help (docs/how-selection-works.md), and the base model reads each once.
MOST = 16
# What stands for the digest of the examples of an adapter that has none.
NO_EXAMPLES = "none"


def examples_of(folder: Path) -> tuple[str, ...]:
    """The example prompts of the adapter in a folder, `MOST` at most; empty if it has none.

    A file that cannot be read gives a warning and no examples, since the adapter can be used without.
    """
    if not (folder / CONFIG).is_file():  # an adapter that is in memory only
        return ()
    try:
        found = read_examples(folder / EXAMPLES)
    except FileNotFoundError:
        found = _of_card(folder)
    except DataError as error:
        warnings.warn(f"{error}; the examples are left out", UserWarning, stacklevel=2)
        found = []
    return tuple(found[:MOST])


class FolderExamples:
    """The example prompts of the adapter in a folder as they were at their first use.

    Whoever has the adapter sees the same prompts, whatever is written to the folder later.
    """

    def __init__(self, folder: Path) -> None:
        self._folder = folder

    @cached_property
    def prompts(self) -> tuple[str, ...]:
        """`examples_of` the folder."""
        return examples_of(self._folder)


def read_examples(file: Path) -> list[str]:
    """The prompts in a file of JSON objects, one per line, with `prompt` (or `context`, as in evaluation rows).

    Raises:
        FileNotFoundError: there is no such file.
        DataError: it cannot be read, or a line is no such object.
    """
    return [row["prompt"] for row in _rows(file)]


def is_learned(folder: Path) -> bool:
    """Whether the example prompts in a folder were learned (`logo.learning`), which is noted with each."""
    marks = [row.get("learned") for row in _readable_rows(folder)]
    return bool(marks) and all(mark is True or isinstance(mark, float) for mark in marks)


def named_examples(folder: Path) -> list[str]:
    """The learned example prompts in a folder whose requests named the adapter."""
    return [row["prompt"] for row in _readable_rows(folder) if row.get("learned") is True]


def _readable_rows(folder: Path) -> list[dict[str, Any]]:
    """The objects in a folder's file of examples; none if there is no file, or it cannot be read."""
    try:
        return _rows(folder / EXAMPLES)
    except (FileNotFoundError, DataError):
        return []


def _rows(file: Path) -> list[dict[str, Any]]:
    """The objects in a file, each with a `prompt`; errors as `read_examples`."""
    try:
        # Not `splitlines`, since a JSON text may hold other separators of lines.
        lines = file.read_text(encoding="utf-8-sig").split("\n")
    except FileNotFoundError:
        raise
    except (OSError, ValueError) as error:
        raise DataError(f"{file}: cannot be read as UTF-8 text ({error})") from error
    rows = []
    for number, line in enumerate(lines, start=1):
        if not line.strip():
            continue
        try:
            row: Any = json.loads(line)
        except (ValueError, RecursionError) as error:
            raise DataError(f"{file}, line {number}: expected a JSON object, found no JSON ({error})") from error
        prompt = row.get("prompt", row.get("context")) if isinstance(row, dict) else None
        if not isinstance(prompt, str) or not prompt.strip():
            raise DataError(f'{file}, line {number}: expected an object with the text of a "prompt"')
        rows.append({**row, "prompt": prompt})
    return rows


def write_examples(folder: Path, prompts: Sequence[str], learned: Sequence[float] | None = None) -> Path:
    """Replaces the examples of the adapter in a folder, and returns the file.

    A link is replaced itself: in the cache of the Hub, equal files of several adapters are links to one file.

    Args:
        learned: parallel to `prompts`, the confidence of the selection from which each was learned, or True if its
            request named the adapter; None: a user gave them.

    Raises:
        StorageError: it cannot be written.
    """
    file = folder / EXAMPLES
    replace_file(file, examples_text(prompts, learned), follow=False)
    return file


def examples_sha256(prompts: Sequence[str]) -> str:
    """The SHA-256 of the file that `write_examples` writes for prompts of a user or of training."""
    return hashlib.sha256(examples_text(prompts)).hexdigest()


def examples_record(prompts: Sequence[str]) -> str:
    """How a record names the example prompts of an adapter: their digest, or `NO_EXAMPLES`."""
    return examples_sha256(prompts) if prompts else NO_EXAMPLES


def examples_text(prompts: Sequence[str], learned: Sequence[float] | None = None) -> bytes:
    """The content of the file that `write_examples` writes."""
    rows: list[dict[str, Any]] = [{"prompt": prompt} for prompt in prompts]
    if learned is not None:
        marks = [mark if mark is True else round(float(mark), 4) for mark in learned]
        rows = [{**row, "learned": mark} for row, mark in zip(rows, marks, strict=True)]
    lines = [json.dumps(row, ensure_ascii=False) for row in rows]
    return ("\n".join(lines) + "\n").encode()


def remove_examples(folder: Path) -> bool:
    """Removes the learned examples of the adapter in a folder, and returns whether there were any.

    Raises:
        StorageError: they cannot be removed.
    """
    if not is_learned(folder):
        return False
    try:
        (folder / EXAMPLES).unlink()
    except OSError as error:
        raise StorageError(f"{folder / EXAMPLES}: cannot be removed ({error.strerror})") from error
    return True


def card_metadata(folder: Path) -> dict[str, Any]:
    """The metadata of the model card in an adapter's folder; empty, with a warning, if it cannot be read."""
    from huggingface_hub.repocard import metadata_load

    card = folder / MODEL_CARD
    try:
        return (metadata_load(card) or {}) if card.is_file() else {}
    except Exception as error:  # a YAML parser raises many kinds
        warnings.warn(f"{card}: its metadata cannot be read ({error}); it gives no examples", UserWarning, stacklevel=3)
        return {}


def _of_card(folder: Path) -> list[str]:
    """The texts of a model card's widget."""
    widget = card_metadata(folder).get("widget")
    entries = widget if isinstance(widget, list) else []
    texts = [entry.get("text") for entry in entries if isinstance(entry, dict)]
    return [text for text in texts if isinstance(text, str) and text.strip()]
