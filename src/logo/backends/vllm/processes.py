"""The processes of one server that answer HTTP, as each worker knows them: one process changes the pool at a time, all
others follow, and a removed adapter stays until no process has an answer that uses it.

Calls of all processes reach every worker in the same order, so all workers agree.
"""

from __future__ import annotations

from collections.abc import Iterable


class Processes:
    """One worker's record of the processes that answer HTTP; each process has a key."""

    def __init__(self) -> None:
        self._changing: str | None = None
        self._known: dict[str, str] = {}  # process -> digest of the pool that it selects from
        self._holding: dict[str, set[str]] = {}  # key of an adapter that has left -> processes that may still use it

    def begin(self, process: str) -> bool:
        """Lets a process change the pool, until it calls `end`. Returns False while another process changes it."""
        if self._changing not in (None, process):
            return False
        self._changing = process
        return True

    def end(self, process: str) -> bool:
        """Ends the change of a process, made or abandoned. Returns whether this process was changing the pool."""
        found = self._changing == process
        if found:
            self._changing = None
        return found

    def note(self, process: str, digest: str) -> None:
        """Notes from which pool, by its digest, a process selects adapters."""
        self._known[process] = digest

    def behind(self, digest: str) -> int:
        """How many processes still select from a pool with another digest."""
        return sum(known != digest for known in self._known.values())

    def changed(self, before: Iterable[str], now: Iterable[str]) -> None:
        """Notes that the pool has changed from the adapters with the keys `before` to those with the keys `now`."""
        now = set(now)
        for key in set(before) - now:
            self._holding[key] = set(self._known)
        for key in now & self._holding.keys():
            del self._holding[key]

    def held(self, process: str) -> list[str]:
        """Adapters that have left, and that the process has not released."""
        return sorted(key for key, holding in self._holding.items() if process in holding)

    def release(self, process: str, keys: Iterable[str]) -> list[str]:
        """Notes that a process no longer uses these removed adapters. Returns those that no process uses."""
        gone = []
        for key in keys:
            if key in self._holding:
                self._holding[key].discard(process)
                if not self._holding[key]:
                    del self._holding[key]
                    gone.append(key)
        return gone
