"""`Visit`: a request while it depends on the pool. A pool that several servers share changes only when no request is in
that state (`logo.serving.gate`), so every request reports when it has selected its adapters.
"""

from __future__ import annotations

from collections.abc import Callable
from contextvars import ContextVar


class Visit:
    """A request that uses the pool, until it has selected its adapters.

    A request with several prompts selects several times concurrently; it counts until the last selection is done.
    """

    def __init__(self, leave: Callable[[], None]) -> None:
        self._leave: Callable[[], None] | None = leave
        self._choosing = 0

    def choosing(self) -> None:
        """Begins to choose."""
        self._choosing += 1

    def chosen(self) -> None:
        """Has chosen, once."""
        self._choosing -= 1
        if not self._choosing:
            self.leave()

    def leave(self) -> None:
        """What the pool becomes is of no concern from here on."""
        leave, self._leave = self._leave, None
        if leave is not None:
            leave()


visit: ContextVar[Visit | None] = ContextVar("visit", default=None)
"""Of the request that is being answered."""


def choosing(times: int = 1) -> None:
    """The request that is being answered begins to choose, for so many prompts."""
    inside = visit.get()
    if inside is not None:
        for _ in range(times):
            inside.choosing()


def chosen() -> None:
    """It has chosen for one of them."""
    inside = visit.get()
    if inside is not None:
        inside.chosen()


def indifferent() -> None:
    """Its answer does not depend on the pool."""
    inside = visit.get()
    if inside is not None:
        inside.leave()
