"""Items of work for several processes (`logo.backends.ray`): what a process is given, what comes back in place of a
result, and which process gets which item next. Knows nothing of Ray."""

from __future__ import annotations

from collections import deque
from collections.abc import Iterator
from dataclasses import dataclass, field
from typing import Any, Generic, TypeVar

I = TypeVar("I", bound="Item")  # noqa: E741 - an item of work


@dataclass(frozen=True)
class Item:
    """One piece of work.

    Attributes:
        args: the arguments of the call that does the work. Large ones that many items have should be `Shared`.
        size: how much it is, for the speeds that are shown.
    """

    args: tuple[Any, ...]
    size: int


@dataclass(frozen=True)
class Lost:
    """An item without a result: every process that was given it has gone. `reason` says how, in words."""

    reason: str


@dataclass(frozen=True)
class Elsewhere:
    """A result that another process might do better, as where memory did not suffice; the third one is taken."""

    result: Any


@dataclass(frozen=True)
class Unlike:
    """In place of a result: the process is not like the others, and gets no more work. `reason` says what differs."""

    reason: str


@dataclass
class Queue(Generic[I]):
    """Items that wait: those that come back go first."""

    source: Iterator[I]
    back: deque[tuple[I, int, object]] = field(default_factory=deque)
    dry: bool = False

    def next(self, worker: object, *, alone: bool) -> tuple[I, int] | None:
        """An item for a process and how many have had it before; None where there is none for this one.

        Args:
            alone: no other process is open, so that it gets what it has brought back, too.
        """
        for at, (item, tries, before) in enumerate(self.back):
            if alone or before is not worker:
                del self.back[at]
                return item, tries
        for item in () if self.dry else self.source:
            return item, 0
        self.dry = True
        return None
