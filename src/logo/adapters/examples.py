"""What is said about an adapter: example prompts of its task, without answers, and a description in a sentence.

    <adapter>/examples.jsonl        one JSON object per line: `{"prompt": "..."}`
    <adapter>/logo.yaml             description: Names the emotion of a tweet.

A prompt that is like the examples selects the adapter. Any number is used, in any wordings; the base model reads each
once. They are never sent anywhere. Only a text encoder reads the description.
"""

from __future__ import annotations

import hashlib
import json
import warnings
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from logo.adapters.peft import EXAMPLES, RECORD
from logo.errors import DataError
from logo.files import replace_file


def folder_examples(folder: Path) -> tuple[str, ...]:
    """The example prompts in the folder of an adapter; none, with a warning, if they cannot be read."""
    try:
        return tuple(read_examples(folder / EXAMPLES))
    except FileNotFoundError:
        return ()
    except DataError as error:
        warnings.warn(f"{error}; the examples are left out", UserWarning, stacklevel=2)
        return ()


def folder_description(folder: Path) -> str | None:
    """The description in the folder of an adapter; None if there is none or, with a warning, if it cannot be read."""
    import yaml

    file = folder / RECORD
    try:
        content = yaml.load(file.read_bytes(), Loader=getattr(yaml, "CSafeLoader", yaml.SafeLoader))
    except FileNotFoundError:
        return None
    except (OSError, ValueError, yaml.YAMLError, RecursionError) as error:
        reason = " ".join(str(error).split())
        warnings.warn(f"{file}: cannot be read ({reason}); the description is left out", UserWarning, stacklevel=2)
        return None
    description = content.get("description") if isinstance(content, dict) else None
    if description is None or is_text(description):
        return description
    warnings.warn(
        f"{file}: description: expected a text, found {description!r}; it is left out", UserWarning, stacklevel=2
    )
    return None


def is_text(value: Any) -> bool:
    """Whether a value is a text that says something."""
    return isinstance(value, str) and bool(value.strip())


def read_examples(file: Path) -> list[str]:
    """The prompts in a file of JSON objects, one per line, with `prompt` (or `context`, as in evaluation rows).

    Raises FileNotFoundError, or DataError if it cannot be read or a line is no such object.
    """
    try:
        # Not `splitlines`, since a JSON text may hold other separators of lines.
        lines = file.read_text(encoding="utf-8-sig").split("\n")
    except FileNotFoundError:
        raise
    except (OSError, ValueError) as error:
        raise DataError(f"{file}: cannot be read as UTF-8 text ({error})") from error
    prompts = []
    for number, line in enumerate(lines, start=1):
        if not line.strip():
            continue
        try:
            row = json.loads(line)
            json.dumps(row, ensure_ascii=False).encode()  # half a surrogate pair, which no tokenizer accepts
        except (ValueError, RecursionError):
            row = None
        prompt = row.get("prompt", row.get("context")) if isinstance(row, dict) else None
        if not isinstance(prompt, str) or not prompt.strip():
            raise DataError(f'{file}, line {number}: expected a JSON object with the text of a "prompt"')
        prompts.append(prompt)
    return prompts


def write_examples(folder: Path, prompts: Sequence[str]) -> None:
    """Replaces the examples of the adapter in a folder, or a link to a file of several. Raises StorageError."""
    replace_file(folder / EXAMPLES, examples_text(prompts))


def examples_sha256(prompts: Sequence[str]) -> str:
    """The SHA-256 of example prompts, in hex."""
    return hashlib.sha256(examples_text(prompts)).hexdigest()


def examples_text(prompts: Sequence[str]) -> bytes:
    """The content of the file that `write_examples` writes."""
    lines = [json.dumps({"prompt": prompt}, ensure_ascii=False) for prompt in prompts]
    return ("\n".join(lines) + "\n").encode()
