"""Items of work for several processes (`logo.backends.ray`): calls, the replacements of results, and the queue. Knows
nothing of Ray.
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
    """An item without a result, because every process that got it has died. `reason` says how, in words."""

    reason: str


@dataclass(frozen=True)
class Elsewhere:
    """A result that another process might improve, for example because memory was too small; the third one is used."""

    result: Any


@dataclass(frozen=True)
class Unlike:
    """Instead of a result: the process differs from the others and gets no more work. `reason` names the difference."""

    reason: str


@dataclass
class Queue(Generic[I]):
    """Waiting items; returned ones come first."""

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
