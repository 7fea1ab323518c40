"""Items of work for several processes (`logo.backends.ray`), the values that stand for missing results, and the queue.
Independent of Ray.
"""

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
        args: arguments of the call. Large ones that many items have should be `Shared`.
        size: amount of work, for the displayed speeds.
    """

    args: tuple[Any, ...]
    size: int


@dataclass(frozen=True)
class Lost:
    """Stands for the result of an item that no process finished. `reason`: in words, what became of the last one."""

    reason: str


@dataclass
class Queue(Generic[I]):
    """Waiting items; those that came back from a process are handed out first."""

    source: Iterator[I]
    back: deque[tuple[I, int, object]] = field(default_factory=deque)
    dry: bool = False

    def next(self, worker: object, *, alone: bool) -> tuple[I, int] | None:
        """The next item for a process, and the number of processes that had it before; None if there is none for it.

        Args:
            alone: no other process is open, so that this one also gets items that came back from itself.
        """
        for at, (item, tries, before) in enumerate(self.back):
            if alone or before is not worker:
                del self.back[at]
                return item, tries
        for item in () if self.dry else self.source:
            return item, 0
        self.dry = True
        return None
