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
from dataclasses import dataclass, field

from logo.errors import UsageError

# How many mixtures may pass the first one that waits, since each may keep an adapter that it could replace.
_PASSES = 32


@dataclass(eq=False)
class _Waiting:
    keys: frozenset[str]
    admitted: asyncio.Future[None] = field(default_factory=lambda: asyncio.get_running_loop().create_future())
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
        self._waiting: list[_Waiting] = []

    @asynccontextmanager
    async def held(self, keys: Collection[str]) -> AsyncIterator[None]:
        """Inside the block, these adapters are in slots.

        Raises:
            UsageError: there can never be room for them.
            LoGoError: one cannot be loaded.
        """
        self.check(keys)
        wanted = frozenset(keys)
        if self._waiting or not self._fits(wanted):
            entry = _Waiting(wanted)
            self._waiting.append(entry)
            try:
                await entry.admitted
            except asyncio.CancelledError:
                self._left(entry)
                raise
        else:
            self._admit(wanted)
        try:
            while some := [self._loading[key] for key in wanted if key in self._loading]:
                await asyncio.shield(asyncio.gather(*some))
            yield
        finally:
            self._users -= Counter(wanted)
            self._serve()

    def check(self, keys: Collection[str]) -> None:
        """Raises UsageError if there can never be room for these adapters together."""
        if len(keys) > self.count:
            raise UsageError(
                f"this mixture has {len(keys)} adapters, and vLLM has {self.count} slots for them: ask for a smaller "
                f"k, or start vLLM with --max-loras {len(keys)} or more"
            )

    def _fits(self, keys: frozenset[str]) -> bool:
        return len(keys | self._users.keys() | self._loading.keys()) <= self.count

    def _admit(self, keys: frozenset[str]) -> None:
        """Gives slots to adapters that have none, and begins to load these."""
        self._users.update(keys)
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
        if new:
            task = asyncio.create_task(self._fill(new))
            self._loading |= dict.fromkeys(new, task)

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

    def _serve(self) -> None:
        """Admits those that wait, as far as there is room."""
        while self._waiting and self._fits(self._waiting[0].keys):
            self._take(self._waiting[0])
        for entry in self._waiting[1:]:
            first = self._waiting[0]
            if first.passed >= _PASSES:
                break
            if entry.keys <= self._users.keys():
                first.passed += 1
                self._take(entry)

    def _take(self, entry: _Waiting) -> None:
        self._waiting.remove(entry)
        if not entry.admitted.done():
            self._admit(entry.keys)
            entry.admitted.set_result(None)

    def _left(self, entry: _Waiting) -> None:
        """A client has left while its mixture waited, or just when it was admitted."""
        if entry in self._waiting:
            self._waiting.remove(entry)
        elif entry.admitted.done() and not entry.admitted.cancelled():
            self._users -= Counter(entry.keys)
        self._serve()
