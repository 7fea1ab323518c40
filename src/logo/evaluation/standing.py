"""The content of a future result's folder: nothing, the result of this run, or another result.

A result is identified by its `run.json`, which holds everything that its rows depend on. Other content is not replaced
unless the user asks for it.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from logo.errors import StorageError
from logo.evaluation.differences import described, differences
from logo.evaluation.results import RESULT_FILES


@dataclass(frozen=True)
class Standing:
    """Result files in a folder.

    Attributes:
        folder: the folder; `names`: names of the result files that are there.
        run: the content of `run.json`; empty if it is missing or invalid.
        problem: why it is empty, in words; None if it is not.
    """

    folder: Path
    names: tuple[str, ...]
    run: Mapping[str, Any]
    problem: str | None

    @property
    def missing(self) -> tuple[str, ...]:
        """Result files that are not there."""
        return tuple(name for name in RESULT_FILES if name not in self.names)

    @property
    def asked(self) -> dict[str, Any]:
        """All that the rows depend on: the run's identity and the pool."""
        return {**self.run["identity"], "pool": self.run["pool"]}

    def other(self, asked: Mapping[str, Any]) -> str | None:
        """Why this is not the result of the run that asks, in words; None if it is.

        Args:
            asked: the facts of that run, as in the property `asked`.
        """
        if self.problem is not None:
            return f"{self.folder} holds {self.problem}"
        found = differences(asked, self.asked)
        return f"{self.folder} holds the result of another run: {described(found)}" if found else None


def standing(folder: Path) -> Standing | None:
    """The result files in a folder; None if there are none.

    Raises:
        StorageError: it cannot be read.
    """
    try:
        names = tuple(name for name in RESULT_FILES if (folder / name).exists())
        if not names:
            return None
        run, problem = _run(folder / "run.json")
    except OSError as error:
        raise StorageError(f"result {str(folder)!r}: cannot be read ({error.strerror or error})") from error
    if problem is not None and "run.json" not in names:
        problem = f"{', '.join(names)} {problem}"
    return Standing(folder, names, run, problem)


def _run(file: Path) -> tuple[dict[str, Any], str | None]:
    try:
        run = json.loads(file.read_text(encoding="utf-8"))
    except FileNotFoundError:
        return {}, "without a run.json that says which run it is of"
    except ValueError as error:
        return {}, f"a result whose run.json cannot be read ({error})"
    said = isinstance(run, dict) and isinstance(run.get("identity"), dict) and isinstance(run.get("pool"), dict)
    if not said or not run["identity"]:
        return {}, "a result whose run.json does not say which run it is of"
    return run, None
