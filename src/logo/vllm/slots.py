"""`Slots`: which adapter is in which of vLLM's slots. Slots are reused least recently used.

A mixture holds the slots of its adapters while it answers. One that finds no free slots waits. Those that wait are
served in the order in which they came, with one exception: a mixture whose adapters all answer already takes no slot,
so it may overtake the first one, a limited number of times.
"""

from __future__ import annotations

import asyncio
from collections import Counter, OrderedDict
from collections.abc import AsyncIterator, Awaitable, Callable, Collection
from contextlib import asynccontextmanager
from dataclasses import dataclass

from logo.errors import UsageError

# How many mixtures may pass the first one that waits, since each may keep an adapter that it could replace.
_PASSES = 32


@dataclass(eq=False)
class _Asked:
    keys: frozenset[str]
    admitted: asyncio.Future[None]
    passed: int = 0


class Slots:
    """The slots of one engine, as the process that talks to it sees them; it is the only one that fills them.

    Args:
        count: how many there are.
        load: puts adapters into slots: `(slot, key), ...`. If it raises, the slots are empty.
    """

    def __init__(self, count: int, load: Callable[[list[tuple[int, str]]], Awaitable[None]]) -> None:
        self.count, self._load = count, load
        self._free = list(reversed(range(count)))
        self._slot_of: OrderedDict[str, int] = OrderedDict()  # key -> slot, the latest used last
        self._users: Counter[str] = Counter()  # answers in progress of each adapter
        self._loading: dict[str, asyncio.Task[None]] = {}
        self._waiting: list[_Asked] = []

    @asynccontextmanager
    async def held(self, keys: Collection[str]) -> AsyncIterator[None]:
        """Inside the block, these adapters are in slots.

        Raises:
            UsageError: there can never be room for them.
            LoGoError: one cannot be loaded.
        """
        self.check(keys)
        asked = _Asked(frozenset(keys), asyncio.get_running_loop().create_future())
        self._waiting.append(asked)
        self._serve()
        try:
            await asked.admitted
            await self._filled(asked.keys)
            yield
        finally:
            if not asked.admitted.cancelled():  # else its client has left while it waited
                self._users -= Counter(asked.keys)
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
        self._waiting = [one for one in self._waiting if not one.admitted.done()]
        while self._waiting and self._fits(self._waiting[0].keys):
            self._admit(self._waiting[0])
        for one in self._waiting[1:]:
            first = self._waiting[0]
            if first.passed >= _PASSES:
                break
            if one.keys <= self._users.keys():
                first.passed += 1
                self._admit(one)

    def _fits(self, keys: frozenset[str]) -> bool:
        return len(keys | self._users.keys() | self._loading.keys()) <= self.count

    def _admit(self, asked: _Asked) -> None:
        self._waiting.remove(asked)
        self._users.update(asked.keys)
        asked.admitted.set_result(None)

    async def _filled(self, keys: frozenset[str]) -> None:
        """Waits until these adapters, which were admitted, are in slots. Where others load one of them beside an
        adapter that cannot be loaded, it is loaded again."""
        while True:
            own = self._begun(keys)
            some = {self._loading[key] for key in keys if key in self._loading}
            if not some:
                return
            await asyncio.wait(some)
            if own is not None:
                own.result()  # raises its error

    def _begun(self, keys: frozenset[str]) -> asyncio.Task[None] | None:
        """Gives slots to adapters that have none, and begins to load these; None: all of them have slots."""
        new = []
        for key in sorted(keys):
            if key in self._slot_of:
                self._slot_of.move_to_end(key)
                continue
            if not self._free:
                used = self._users.keys() | self._loading.keys()
                oldest = next(known for known in self._slot_of if known not in used)
                self._free.append(self._slot_of.pop(oldest))
            self._slot_of[key] = self._free.pop()
            new.append(key)
        if not new:
            return None
        task = asyncio.create_task(self._fill(new))
        self._loading |= dict.fromkeys(new, task)
        return task

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
