"""`Batched`: one call of a function for all that wait for it."""

from __future__ import annotations

import asyncio
from collections.abc import Awaitable, Callable, Sequence
from typing import Generic, TypeVar

Item = TypeVar("Item")
Value = TypeVar("Value")


class Batched(Generic[Item, Value]):
    """A function of many items, for callers that have one each: what they ask for while it runs is its next batch.

    Args:
        function: gives a value for each item. If it raises, all that wait for this batch get the error.
    """

    def __init__(self, function: Callable[[list[Item]], Awaitable[Sequence[Value]]]) -> None:
        self._function = function
        self._waiting: list[tuple[Item, asyncio.Future[Value]]] = []
        self._running: asyncio.Task[None] | None = None

    async def __call__(self, item: Item) -> Value:
        """The value of an item; errors as the function's."""
        future: asyncio.Future[Value] = asyncio.get_running_loop().create_future()
        self._waiting.append((item, future))
        if self._running is None or self._running.done():
            self._running = asyncio.create_task(self._run())
        return await future

    async def _run(self) -> None:
        while self._waiting:
            batch = [(item, future) for item, future in self._waiting if not future.done()]  # others have left
            self._waiting = []
            if not batch:
                continue
            try:
                values = await self._function([item for item, _ in batch])
            except Exception as error:
                for _, future in batch:
                    if not future.done():
                        future.set_exception(error)
                continue
            for (_, future), value in zip(batch, values, strict=True):
                if not future.done():  # the caller may have left meanwhile
                    future.set_result(value)
