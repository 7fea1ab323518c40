"""The progress of a study: bars on a terminal, else a line now and then."""

from __future__ import annotations

import time
from collections import deque
from typing import TYPE_CHECKING

from rich.progress import Progress

from logo.cli.output import err, note

if TYPE_CHECKING:
    from logo.evaluation.contest import Lesson

EVERY = 60.0  # seconds between two lines
WINDOW = 20  # last steps, from which the remaining time is estimated
AT_ONCE = 0.005  # seconds; faster steps were done by an earlier process


class Pace:
    """Prints to stderr, once a minute, the number of finished steps and the remaining time.

    Args:
        what: name of the steps; `total`: their number.
    """

    def __init__(self, what: str, total: int) -> None:
        self._what, self._total, self._done = what, total, 0
        self._last = self._told = time.monotonic()
        self._took: deque[float] = deque(maxlen=WINDOW)

    def begin(self) -> None:
        """Restarts the clock: the time since the last step was spent on something else."""
        self._last = time.monotonic()

    def step(self) -> None:
        """Counts a finished step."""
        now = time.monotonic()
        self._done += 1
        if now - self._last >= AT_ONCE:
            self._took.append(now - self._last)
        self._last = now
        if self._took and (now - self._told >= EVERY or self._done == self._total):
            self._told = now
            each = sum(self._took) / len(self._took)
            left = duration(each * (self._total - self._done))
            note(f"{self._what}: {self._done} of {self._total} · {each:.1f} s each · {left} left")


class Bars:
    """The progress of a study.

    Args:
        shown: bars, where there is a terminal.
        plain: a line now and then, where there is none.
    """

    def __init__(self, shown: Progress, lessons: int, rows: int, *, plain: bool) -> None:
        self._shown = shown
        self._lessons = shown.add_task("learning", total=lessons, visible=lessons > 0)
        self._rows = shown.add_task("rows", total=rows)
        self._pace = {"lessons": Pace("lessons", lessons), "rows": Pace("rows", rows)}
        self._plain = plain and not err.is_terminal

    def lesson(self, lesson: Lesson) -> None:
        """Counts a finished lesson."""
        self._shown.update(self._lessons, advance=1, description=f"{lesson.method}: {lesson.of}")
        if self._plain:
            self._pace["lessons"].step()
            self._pace["rows"].begin()

    def row(self, task: str) -> None:
        """Counts a measured row of a task."""
        self._shown.update(self._rows, advance=1, description=task)
        if self._plain:
            self._pace["rows"].step()
            self._pace["lessons"].begin()


def duration(seconds: float) -> str:
    """Hours and minutes: `2 h 05 min`."""
    minutes = round(seconds / 60)
    return f"{minutes // 60} h {minutes % 60:02d} min"
