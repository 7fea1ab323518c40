"""API keys that may only use some adapters: reads them from a file, and matches them against the pool."""

from __future__ import annotations

import json
from collections.abc import Iterable, Mapping
from fnmatch import fnmatchcase
from pathlib import Path

from logo.errors import StorageError, UsageError
from logo.protocol import Patterns


def read_key_adapters(file: Path) -> dict[str, Patterns]:
    """Reads a JSON file: API key -> names of adapters, or patterns such as `"team-a/*"`.

    Raises:
        StorageError: it cannot be read.
        UsageError: it is malformed. The message never shows a key.
    """
    expected = f'--key-adapters {file}: expected JSON such as {{"KEY": ["team-a/*", "translate"]}}'
    try:
        found = json.loads(file.read_text(encoding="utf-8"))
    except OSError as error:
        raise StorageError(f"--key-adapters {file}: cannot be read: {error.strerror or error}") from error
    except ValueError:
        raise UsageError(f"{expected}, found no JSON") from None
    if not isinstance(found, dict) or not found:
        raise UsageError(f"{expected}, found {'an empty object' if found == {} else type(found).__name__}")
    for number, names in enumerate(found.values(), 1):
        if not isinstance(names, list) or not names or not all(isinstance(name, str) and name for name in names):
            raise UsageError(f"{expected}, found no list of names for key number {number}")
    return {key: tuple(names) for key, names in found.items()}


def usable(names: Iterable[str], patterns: Patterns | None) -> list[str]:
    """The names that match the patterns; None: all."""
    if patterns is None:
        return list(names)
    return [name for name in names if any(name == p or fnmatchcase(name, p) for p in patterns)]


def unmatched(names: Iterable[str], keys: Mapping[str, Patterns]) -> list[str]:
    """The distinct patterns that no adapter matches, in order."""
    listed = list(names)
    patterns = dict.fromkeys(pattern for own in keys.values() for pattern in own)
    return [pattern for pattern in patterns if not usable(listed, (pattern,))]
