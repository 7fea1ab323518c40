"""The progress of tasks for display, possibly by another process than the one that trains."""

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
    """The progress of a task for display.

    Attributes:
        task: name of the task.
        step, steps: steps so far, and the largest number of steps.
        tokens: tokens trained on so far; `expected`: the approximate total.
        loss, held_out: the latest losses; None if there are none yet.
        status: as in `logo.training.learner.Course`.
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
    """Writes the progress of a group to a file, for a driver in another process."""

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


def states(file: Path) -> list[Status]:
    """The progress that `Telling` wrote last; empty before its first write."""
    try:
        return [Status(**one) for one in json.loads(file.read_text(encoding="utf-8"))]
    except (OSError, ValueError):
        return []
