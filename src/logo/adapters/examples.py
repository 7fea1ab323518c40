"""Example prompts that come with an adapter: a few of its own, without answers.

    <adapter>/examples.jsonl        one JSON object per line: `{"prompt": "..."}`
    <adapter>/README.md             else the texts of the model card's widget

What the base model makes of them says what an adapter's prompts look like, however the adapter was trained
(`logo.selection.signature`). Examples are read where the adapter lies and are never sent anywhere.
"""

from __future__ import annotations

import json
import warnings
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from logo.adapters.files import CONFIG, EXAMPLES, MODEL_CARD
from logo.errors import DataError
from logo.folders import replace_file

# Examples that are read: more tell hardly more (docs/how-selection-works.md), and each is read by the base model once.
MOST = 16


def examples_of(folder: Path) -> tuple[str, ...]:
    """The example prompts of the adapter in a folder, `MOST` at most; none where it has none.

    A file that makes no sense is a warning and counts as none: the adapter can be used without it.
    """
    if not (folder / CONFIG).is_file():  # an adapter that is in memory only
        return ()
    try:
        found = read_examples(folder / EXAMPLES)
    except FileNotFoundError:
        found = _of_card(folder / MODEL_CARD)
    except DataError as error:
        warnings.warn(f"{error}; the examples are left out", UserWarning, stacklevel=2)
        found = []
    return tuple(found[:MOST])


def read_examples(file: Path) -> list[str]:
    """The prompts in a file of JSON objects with `prompt` (or `context`, as in rows of data sets), one per line.

    Raises:
        FileNotFoundError: there is no such file.
        DataError: it cannot be read, or a line is no such object.
    """
    try:
        lines = file.read_text(encoding="utf-8").splitlines()
    except FileNotFoundError:
        raise
    except (OSError, ValueError) as error:
        raise DataError(f"{file}: cannot be read as UTF-8 text ({error})") from error
    prompts = []
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
        prompts.append(prompt)
    return prompts


def write_examples(folder: Path, prompts: Sequence[str]) -> Path:
    """Writes the examples of the adapter in a folder, in the place of those that it had; returns the file.

    Raises:
        StorageError: it cannot be written.
    """
    lines = [json.dumps({"prompt": prompt}, ensure_ascii=False) for prompt in prompts]
    replace_file(folder / EXAMPLES, ("\n".join(lines) + "\n").encode())
    return folder / EXAMPLES


def _of_card(card: Path) -> list[str]:
    """The texts of a model card's widget. Cards are written for people: one that cannot be read has none."""
    from huggingface_hub.repocard import metadata_load

    try:
        widget = (metadata_load(card) or {}).get("widget") if card.is_file() else None
    except Exception as error:  # whatever a YAML parser makes of a text that anybody wrote
        warnings.warn(f"{card}: its metadata cannot be read ({error}); it gives no examples", UserWarning, stacklevel=3)
        return []
    entries = widget if isinstance(widget, list) else []
    texts = [entry.get("text") for entry in entries if isinstance(entry, dict)]
    return [text for text in texts if isinstance(text, str) and text.strip()]
