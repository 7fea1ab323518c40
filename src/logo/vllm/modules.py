"""`--lora-modules` of a command line of vLLM: the adapters that it names become LoGo's pool, or join it."""

from __future__ import annotations

import json
from collections.abc import Sequence
from typing import Any

from logo.errors import UsageError

FLAG = "--lora-modules"
_EXPECTED = f'{FLAG}: expected NAME=PATH, or JSON such as {{"name": "sql", "path": "adapters/sql"}}'


def lora_modules(words: Sequence[str]) -> tuple[list[str], list[str]]:
    """The sources `NAME=PATH` (see `logo.adapters.sources`) that the option names, and all other words; UsageError: it
    is not written as vLLM takes it."""
    sources: list[str] = []
    others: list[str] = []
    reading = False
    for word in words:
        flag, equals, value = word.partition("=")
        if flag.replace("_", "-") == FLAG:
            reading = not equals  # behind `--lora-modules=` is one value, behind `--lora-modules` are several words
            if equals:
                sources.append(_source(value))
        elif reading and not word.startswith("-"):
            sources.append(_source(word))
        else:
            reading = False
            others.append(word)
    return sources, others


def _source(value: str) -> str:
    if "=" in value and "," not in value:
        return value
    try:
        module: Any = json.loads(value)
        name, path = module["name"], module["path"]
    except (ValueError, TypeError, KeyError):
        raise UsageError(f"{_EXPECTED}, found {value!r:.80}") from None
    return f"{name}={path}"
