"""`Visit`: marks the time in which a request depends on the pool, until its mixtures are selected.

A pool that several servers share only changes while no request is in that time (`logo.serving.gate`)."""

from __future__ import annotations

from collections.abc import Callable
from contextvars import ContextVar


class Visit:
    """A request that depends on the pool until its mixtures are selected.

    The prompts of a request are selected for at the same time; the visit lasts until the last one is done.
    """

    def __init__(self, leave: Callable[[], None]) -> None:
        self._leave: Callable[[], None] | None = leave
        self._choosing = 0

    def choosing(self) -> None:
        """Begins a selection."""
        self._choosing += 1

    def chosen(self) -> None:
        """Ends a selection."""
        self._choosing -= 1
        if not self._choosing:
            self.leave()

    def leave(self) -> None:
        """Ends the visit: changes of the pool no longer matter."""
        leave, self._leave = self._leave, None
        if leave is not None:
            leave()


visit: ContextVar[Visit | None] = ContextVar("visit", default=None)
"""Of the request that is being answered."""


def choosing(times: int = 1) -> None:
    """The current request begins to select for so many prompts."""
    inside = visit.get()
    if inside is not None:
        for _ in range(times):
            inside.choosing()


def chosen() -> None:
    """The current request has selected for one prompt."""
    inside = visit.get()
    if inside is not None:
        inside.chosen()


def indifferent() -> None:
    """The current request does not depend on the pool."""
    inside = visit.get()
    if inside is not None:
        inside.leave()
