"""Prompts from the command line: arguments, a file with one per line, or stdin."""

from __future__ import annotations

import sys
from collections.abc import Container, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Any

from cyclopts import Parameter

from logo.cli.options import ModelOptions, ProbeText
from logo.cli.output import note
from logo.errors import StorageError, UsageError
from logo.models import DEMO
from logo.rows import text_lines


@Parameter(name="*")
@dataclass(frozen=True, kw_only=True)
class PromptOptions:
    """Further prompts, and how they are asked."""

    prompts: Annotated[Path | None, Parameter(name="--prompts", allow_leading_hyphen=True)] = None
    """A file with one prompt per line; `-`: one prompt from stdin."""

    chat: bool = False
    """Each prompt is a user's message."""

    system: str | None = None
    """A system message before it; implies --chat."""

    probe_text: Annotated[ProbeText | None, Parameter(show_default=False)] = None
    """The part of a conversation that selects adapters."""

    def read(self, arguments: Sequence[str]) -> tuple[list[str], list[Any]]:
        """The prompts to answer, and as the model is asked: the same, or a conversation for each. Blank lines of the
        file are skipped.

        Raises:
            UsageError: there is none, or an argument is empty.
            StorageError: the file cannot be read.
        """
        texts = list(arguments)
        if str(self.prompts) == "-":
            texts.append(sys.stdin.read().rstrip("\n"))
        elif self.prompts is not None:
            try:
                texts += [line for line in text_lines(self.prompts) if line.strip()]
            except (OSError, UnicodeDecodeError) as error:
                raise StorageError(f"prompt file {self.prompts}: cannot be read: {error}") from error
        if not texts:
            raise UsageError("no prompt: give one in quotes, or --prompts FILE with one per line")
        for number, text in enumerate(texts, start=1):
            if not text.strip():
                raise UsageError(f"prompt {number} is empty: expected some text")
        if not self.chat and self.system is None:
            return texts, list(texts)
        before = [] if self.system is None else [{"role": "system", "content": self.system}]
        return texts, [[*before, {"role": "user", "content": text}] for text in texts]


def forced(adapters: Sequence[str], names: Container[str]) -> dict[str, float]:
    """The mixture that `--adapter NAME=WEIGHT`, several times, names; a name of the pool is not split at its `=`."""
    weights: dict[str, float] = {}
    for entry in adapters:
        name, weight = _named(entry, names)
        if name in weights:
            raise UsageError(
                f"--adapter {name!r}: given with the weights {weights[name]:g} and {weight:g}; give it once"
            )
        weights[name] = weight
    return weights


def _named(entry: str, names: Container[str]) -> tuple[str, float]:
    """The adapter and the weight in `NAME` or `NAME=WEIGHT`."""
    name, _, weight = entry.rpartition("=")
    if entry in names or not name:
        return entry, 1.0
    try:
        return name, float(weight)
    except ValueError:
        raise UsageError(
            f"--adapter {entry!r}: expected NAME or NAME=WEIGHT with a number; "
            f"an adapter of this name is {f'{entry}=1'!r}"
        ) from None


def or_demo(options: ModelOptions) -> str:
    """The base model: the bundled demo where none is named (and says so)."""
    if options.base_model is not None:
        return options.base_model
    note("No --base-model given: using the bundled demo model.")
    return DEMO
