"""Prompts from the command line: arguments, a file with one per line, or stdin."""

from __future__ import annotations

import sys
from collections.abc import Container
from pathlib import Path
from typing import Annotated, Any

from logo.cli.options import EngineOptions, option
from logo.cli.output import note
from logo.errors import StorageError, UsageError
from logo.models import DEMO
from logo.rows import text_lines

PromptsFile = Annotated[Path | None, option("A file with one prompt per line.", metavar="FILE")]
Chat = Annotated[bool, option("Each prompt is a user's message.")]
System = Annotated[str | None, option("A system message before it; implies --chat.", metavar="TEXT")]


def read_prompts(arguments: list[str] | None, file: Path | None) -> list[str]:
    """The prompts to answer; `-` reads one from stdin. Blank lines of the file are skipped.

    Raises:
        UsageError: there is none, or an argument is empty.
        StorageError: the file cannot be read.
    """
    prompts = [sys.stdin.read().rstrip("\n") if text == "-" else text for text in arguments or []]
    if file is not None:
        try:
            prompts += [line for line in text_lines(file) if line.strip()]
        except (OSError, UnicodeDecodeError) as error:
            raise StorageError(f"prompt file {file}: cannot be read: {error}") from error
    if not prompts:
        raise UsageError("no prompt: give one in quotes, '-' to read it from stdin, or --prompts with one per line")
    for number, prompt in enumerate(prompts, start=1):
        if not prompt.strip():
            raise UsageError(f"prompt {number} is empty: expected some text")
    return prompts


def as_asked(prompts: list[str], chat: bool, system: str | None) -> list[Any]:
    """The prompts, or with `--chat` and `--system` a conversation for each, of which it is the user's message."""
    if not chat and system is None:
        return list(prompts)
    before = [] if system is None else [{"role": "system", "content": system}]
    return [[*before, {"role": "user", "content": prompt}] for prompt in prompts]


def forced(
    adapter: list[str] | None, base_only: bool = False, names: Container[str] | None = None
) -> dict[str, float] | None:
    """The mixture that `--adapter NAME=WEIGHT` and `--base-only` name; None: it is selected.

    Args:
        names: of the pool: such a name is not split at its `=`. None: they are not known yet, so that the mixture only
            says whether there is one.
    """
    if base_only:
        if adapter:
            raise UsageError("--base-only and --adapter exclude each other: give one of them")
        return {}
    if not adapter:
        return None
    weights: dict[str, float] = {}
    for entry in adapter:
        name, _, weight = (entry, "", "1") if entry in (names or ()) else entry.rpartition("=")
        try:
            value = float(weight) if name else 1.0
        except ValueError:
            raise UsageError(
                f"--adapter {entry!r}: expected NAME or NAME=WEIGHT with a number; "
                f"an adapter of this name is {f'{entry}=1'!r}"
            ) from None
        if (name := name or entry) in weights and names is not None:
            raise UsageError(
                f"--adapter {name!r}: given with the weights {weights[name]:g} and {value:g}; give it once"
            )
        weights[name] = value
    return weights


def or_demo(options: EngineOptions) -> str:
    """The base model: the bundled demo where none is named (and says so)."""
    if options.base_model is not None:
        return options.base_model
    note("No --base-model given: using the bundled demo model.")
    return DEMO
