"""`Visit`: marks the time in which a request depends on the pool, until its mixtures are selected.

A pool that several servers share only changes while no request is in that time (`logo.serving.gate`)."""

from __future__ import annotations

from collections.abc import Callable
from contextvars import ContextVar


class Visit:
    """A request that depends on the pool until its mixtures are selected.

    The selections for the prompts of one request run concurrently; the visit ends with the last of them.
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
"""The visit of the request that is being answered; None if it has none."""


def choosing(times: int = 1) -> None:
    """Notes that the current request begins `times` selections."""
    inside = visit.get()
    if inside is not None:
        for _ in range(times):
            inside.choosing()


def chosen() -> None:
    """Notes that the current request has finished one selection."""
    inside = visit.get()
    if inside is not None:
        inside.chosen()


def indifferent() -> None:
    """Ends the visit of the current request, because the request does not depend on the pool."""
    inside = visit.get()
    if inside is not None:
        inside.leave()
