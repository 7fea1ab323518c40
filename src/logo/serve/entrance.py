"""`Entrance`: how many requests a server takes in at a time."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager

from logo.api.errors import ApiError, NotReady
from logo.errors import UsageError
from logo.serve.turns import STOPPED


class Entrance:
    """Reserves room for answers, up to `most` at a time, while the server `is_alive`.

    Attributes:
        draining: whether new requests are refused, since the server is about to end.
    """

    def __init__(self, most: int, is_alive: Callable[[], bool]) -> None:
        self.draining = False
        self._most = most
        self._is_alive = is_alive
        self._admitted = 0

    @property
    def alive(self) -> bool:
        """Whether the server can do what it is for."""
        return self._is_alive()

    @property
    def ready(self) -> bool:
        """Whether requests are accepted."""
        return self.alive and not self.draining

    @property
    def busy(self) -> bool:
        """Whether a request is being answered."""
        return self._admitted > 0

    @contextmanager
    def admitted(self, count: int = 1) -> Iterator[None]:
        """Within the block, room for this many answers is reserved; ApiError: the queue is full; NotReady: no requests
        are accepted; UsageError: there can never be room."""
        if not self.ready:
            raise NotReady("the server is shutting down" if self.draining else STOPPED)
        if count > self._most:
            most = f"this request asks for {count} answers, and this server takes at most {self._most} at a time"
            raise UsageError(f"{most}; send fewer prompts, or a smaller n")
        if self._admitted + count > self._most:
            advice = "too many requests are waiting; try again in 1 s"
            raise ApiError(429, advice, "rate_limit_error", None, "queue_full", {"Retry-After": "1"})
        self._admitted += count
        try:
            yield
        finally:
            self._admitted -= count
