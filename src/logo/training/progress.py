"""How far tasks are, to be shown, perhaps by another process than the one that trains."""

from __future__ import annotations

import json
import os
import time
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import Path

from logo.training.learner import RUNNING


@dataclass(frozen=True)
class Status:
    """How far a task is, to be shown.

    Attributes:
        task: its name.
        step, steps: made, and at most to be made.
        tokens: learned from so far; `expected`: about so many in all.
        loss, held_out: the last ones; None: none yet.
        status: as `logo.training.learner.Course`.
    """

    task: str
    step: int
    steps: int
    tokens: int
    expected: float
    loss: float | None
    held_out: float | None
    status: str


class Telling:
    """Progress of a group as a file, for a driver in another process."""

    def __init__(self, file: Path, every: float = 1.0) -> None:
        self._file, self._every, self._last = file, every, 0.0

    def __call__(self, states: Sequence[Status]) -> None:
        now = time.monotonic()
        if now - self._last < self._every and any(one.status == RUNNING for one in states):
            return
        self._last = now
        part = self._file.with_suffix(f".{os.getpid()}")
        part.write_text(json.dumps([asdict(one) for one in states]), encoding="utf-8")
        os.replace(part, self._file)


def told(file: Path) -> list[Status]:
    """What `Telling` wrote last; nothing where it has not written yet."""
    try:
        return [Status(**one) for one in json.loads(file.read_text(encoding="utf-8"))]
    except (OSError, ValueError):
        return []
