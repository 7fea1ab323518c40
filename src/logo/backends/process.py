"""A process of `logo.backends.ray` from the driver's side, and the description of one that has ended."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any


@dataclass(eq=False)
class Process:
    """A process from the driver's side.

    Attributes:
        name: for display.
        actor: Ray's handle.
        opening: the reference of its description, until it is open.
        item, tries, running: its present item, the number of processes that had the item before, and the reference of
            the result. Without an item it still works on one of a `map` that ended early.
        since: start time of that work.
        done: size of its finished items; `busy`: seconds that they took.
    """

    name: str
    actor: Any
    opening: Any = None
    item: Any = None
    tries: int = 0
    running: Any = None
    since: float = 0.0
    done: int = 0
    busy: float = 0.0


def how_ended(error: Exception) -> str:
    """How a process has ended, in a few words."""
    if isinstance(error, TimeoutError):
        return str(error)
    if type(error).__name__ == "OutOfMemoryError":
        return "was ended because its node had no memory left"
    last = str(error).strip().splitlines()[-1].strip()  # of a traceback, the line with the error
    return f"ended ({type(error).__name__}: {last[:200]})"
