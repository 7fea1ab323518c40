"""A process of `logo.backends.ray`, as the driver sees it, and what is said of one that has ended."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any


@dataclass(eq=False)
class Process:
    """A process, as the driver sees it.

    Attributes:
        name: for people.
        actor: Ray's handle.
        opening: the reference of its description, until it is open.
        item, tries, running: what it is doing, how many processes that item has had before, and the reference of its
            result. Without an item it still does what a `map` that ended early had given it.
        since: when it began that.
        done: size of the items it has finished; `busy`: seconds they took.
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
    """Says in a few words how a process has ended."""
    if isinstance(error, TimeoutError):
        return str(error)
    if type(error).__name__ == "OutOfMemoryError":
        return "was ended because its node had no memory left"
    last = str(error).strip().splitlines()[-1].strip()  # where something was raised: what
    return f"ended ({type(error).__name__}: {last[:200]})"
