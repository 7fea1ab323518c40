"""`Loading`: the adapters of requests, which wait in turn where the memory for adapters is short."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator, Sequence
from contextlib import asynccontextmanager
from dataclasses import replace

from logo.adapters.adapter import Adapter
from logo.api.errors import bad_request
from logo.api.names import MixtureRequest
from logo.errors import CacheFull, listed
from logo.mixing.cache import AdapterCache
from logo.serve.packed import HeldMixture
from logo.serve.scheduling import Schedule

_AGAIN = 0.02  # seconds until a request whose adapters have no room looks for it again


class Loading:
    """Loads what requests have selected. The adapters of a request are loaded as one: its prompts do not wait for each
    other. Only the thread of the event loop uses it."""

    def __init__(self, cache: AdapterCache, schedule: Schedule) -> None:
        self.waiting = 0  # how many requests wait for memory, or behind the one that does
        self._cache = cache
        self._schedule = schedule
        self._turn = asyncio.Lock()  # of the request that waits for memory
        self._passes = 0  # how many requests have passed that one

    async def let_pass(self, request: MixtureRequest) -> None:
        """Waits behind the request that waits for memory, if that was passed often enough."""
        needs_adapters = request.adapters is None or any(request.adapters.values())
        someone_waits = self._turn.locked()
        if self._schedule.waits_for_memory(needs_adapters, someone_waits, self._passes):
            async with self._in_turn():
                pass
        elif needs_adapters and someone_waits:
            self._passes += 1

    async def load(self, mixtures: Sequence[HeldMixture]) -> list[HeldMixture]:
        """The mixtures of a request's prompts, with their adapters loaded; waits until other requests give back the
        memory that they need together. After an error or a cancellation nothing is held.

        Raises:
            LoGoError: an adapter cannot be read, or overflows the dtype of mixtures.
            ApiError: the adapters can never have room together.
        """
        try:
            return await _loaded(mixtures)
        except CacheFull:
            self._check_fits(mixtures)
        async with self._in_turn():  # since several would take what becomes free from each other
            self._passes = 0
            return await self._loaded_when_there_is_room(mixtures)

    @asynccontextmanager
    async def _in_turn(self) -> AsyncIterator[None]:
        """The block begins when no earlier request waits for memory."""
        self.waiting += 1
        try:
            async with self._turn:
                yield
        finally:
            self.waiting -= 1

    def _check_fits(self, mixtures: Sequence[HeldMixture]) -> None:
        """Raises ApiError if the adapters of a request have no room even if no other request holds any."""
        adapters = _adapters_of(mixtures)
        if not self._cache.has_room(adapters, alone=True):
            size = sum(adapter.parameters for adapter in adapters) * self._cache.dtype.itemsize
            names = listed([repr(adapter.name) for adapter in adapters])
            raise bad_request(
                f"adapters {names}: together they need {size / 1e6:.1f} MB, and this server has room for "
                f"{self._cache.budget / 2e6:.1f} MB of adapters at a time: ask for fewer of them (logo.k), or start it "
                "with more memory for adapters (--adapter-memory-gb)",
                code="adapters_too_large",
            )

    async def _loaded_when_there_is_room(self, mixtures: Sequence[HeldMixture]) -> list[HeldMixture]:
        adapters = _adapters_of(mixtures)
        while True:
            if self._cache.has_room(adapters):
                again = [replace(mixture, hold=self._cache.reserve(mixture.adapters)) for mixture in mixtures]
                try:
                    return await _loaded(again)
                except CacheFull:  # another request was quicker
                    pass
            await asyncio.sleep(_AGAIN)


async def _loaded(mixtures: Sequence[HeldMixture]) -> list[HeldMixture]:
    """Mixtures whose adapters are loaded. After an error or a cancellation none of them holds any more: others may need
    the memory."""
    try:
        for mixture in mixtures:
            await mixture.loaded()
        return list(mixtures)
    except BaseException:
        for mixture in mixtures:
            mixture.release()
        raise


def _adapters_of(mixtures: Sequence[HeldMixture]) -> list[Adapter]:
    """The adapters of some mixtures, each file once."""
    return list({adapter.file: adapter for mixture in mixtures for adapter in mixture.adapters}.values())
