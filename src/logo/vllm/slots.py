"""`Slots`: which adapter is in which of vLLM's slots. Slots are reused least recently used.

A mixture holds the slots of its adapters while it answers. Those that find no free slots wait, and are served in turn.
But a mixture whose adapters all answer already may overtake the first one, a limited number of times.
"""

from __future__ import annotations

import asyncio
from collections import Counter, OrderedDict
from collections.abc import AsyncIterator, Awaitable, Callable, Collection
from contextlib import asynccontextmanager
from dataclasses import dataclass
from typing import Any

from logo.errors import UsageError

# How many mixtures may pass the first one that waits, since each may keep an adapter that it could replace.
_PASSES = 32


@dataclass(eq=False)
class _WaitingMixture:
    """A mixture that waits for its slots: the keys of its adapters, and how many later ones have passed it."""

    keys: frozenset[str]
    admitted: asyncio.Future[None]
    passed: int = 0


class Slots:
    """The `count` slots of one engine, as the process that talks to it sees them; it is the only one that fills them.
    `load` puts adapters into slots: `(slot, key), ...`. If it raises, the slots are empty."""

    def __init__(self, count: int, load: Callable[[list[tuple[int, str]]], Awaitable[Any]]) -> None:
        self.count = count
        self._load = load
        self._free = list(reversed(range(count)))
        self._slot_of: OrderedDict[str, int] = OrderedDict()  # key -> slot, the latest used last
        self._users: Counter[str] = Counter()  # answers in progress of each adapter
        self._loading: dict[str, Any] = {}  # key -> the task that loads it
        self._waiting: list[_WaitingMixture] = []

    @asynccontextmanager
    async def held(self, keys: Collection[str]) -> AsyncIterator[None]:
        """Inside the block, these adapters are in slots; UsageError: there can never be room for them; LoGoError: one
        cannot be loaded."""
        if not keys:  # the base model alone waits for nobody
            yield
            return
        self.check(keys)
        mixture = _WaitingMixture(frozenset(keys), asyncio.get_running_loop().create_future())
        self._waiting.append(mixture)
        self._serve()
        try:
            await mixture.admitted
            await self._filled(mixture.keys)
            yield
        finally:
            if not mixture.admitted.cancelled():  # else its client has left while it waited
                self._users -= Counter(mixture.keys)
            self._serve()

    def check(self, keys: Collection[str]) -> None:
        """Raises UsageError if there can never be room for these adapters together."""
        if len(keys) > self.count:
            raise UsageError(
                f"this mixture has {len(keys)} adapters, and vLLM has {self.count} slots for them: ask for a smaller "
                f"k, or start vLLM with --max-loras {len(keys)} or more"
            )

    def _serve(self) -> None:
        """Admits those that wait, as far as there is room."""
        self._waiting = [mixture for mixture in self._waiting if not mixture.admitted.done()]
        while self._waiting and self._fits(self._waiting[0].keys):
            self._admit(self._waiting[0])
        for mixture in self._waiting[1:]:
            first = self._waiting[0]
            if first.passed >= _PASSES:
                break
            if mixture.keys <= self._users.keys():
                first.passed += 1
                self._admit(mixture)

    def _fits(self, keys: frozenset[str]) -> bool:
        return len(keys | self._users.keys() | self._loading.keys()) <= self.count

    def _admit(self, mixture: _WaitingMixture) -> None:
        self._waiting.remove(mixture)
        self._users.update(mixture.keys)
        mixture.admitted.set_result(None)

    async def _filled(self, keys: frozenset[str]) -> None:
        """Waits until these adapters, which were admitted, are in slots. Where others load one of them beside an
        adapter that cannot be loaded, it is loaded again."""
        while True:
            for key in keys & self._slot_of.keys():
                self._slot_of.move_to_end(key)
            own = self._start_loading(sorted(keys - self._slot_of.keys()))
            loading = {self._loading[key] for key in keys if key in self._loading}
            if not loading:
                return
            await asyncio.wait(loading)
            if own is not None:
                own.result()  # raises its error

    def _start_loading(self, keys: list[str]) -> asyncio.Task[None] | None:
        """Gives these adapters slots, and starts to load them; None if there are none."""
        if not keys:
            return None
        for key in keys:
            self._slot_of[key] = self._free_slot()
        task = asyncio.create_task(self._fill(keys))
        self._loading |= dict.fromkeys(keys, task)
        return task

    def _free_slot(self) -> int:
        """The number of a slot that is empty, or else that of the adapter that was used least recently."""
        if self._free:
            return self._free.pop()
        needed = self._users.keys() | self._loading.keys()
        unneeded = next(key for key in self._slot_of if key not in needed)
        return self._slot_of.pop(unneeded)

    async def _fill(self, keys: list[str]) -> None:
        try:
            await self._load([(self._slot_of[key], key) for key in keys])
        except BaseException:
            self._free += [self._slot_of.pop(key) for key in keys]
            raise
        finally:
            for key in keys:
                del self._loading[key]
            self._serve()  # whoever asked for these may have left
