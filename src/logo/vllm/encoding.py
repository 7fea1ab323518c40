"""`Encoding`: what a text encoder says of prompts, read in the server's process beside the event loop."""

from __future__ import annotations

import asyncio
from collections.abc import Sequence

from logo.selection.encoder import EncodedExamples


class Encoding:
    """Reads prompts by the text encoder of a pool, all that wait together, in a thread."""

    def __init__(self, examples: EncodedExamples) -> None:
        self._examples = examples
        self._waiting: list[tuple[Sequence[int], asyncio.Future[tuple[float, ...]]]] = []
        self._reading: asyncio.Task[None] | None = None

    async def similarities(self, row: Sequence[int]) -> tuple[float, ...]:
        """`e` of a prompt's token ids, which were cut to the window, for the adapters with example prompts; errors as
        `logo.selection.encoder.embed`."""
        future = asyncio.get_running_loop().create_future()
        self._waiting.append((row, future))
        if self._reading is None or self._reading.done():
            self._reading = asyncio.create_task(self._read())
        values: tuple[float, ...] = await future
        return values

    async def _read(self) -> None:
        while self._waiting:
            # Those whose clients have left are not read.
            waiting = [(row, future) for row, future in self._waiting if not future.done()]
            self._waiting = []
            if not waiting:
                continue
            try:
                found = await asyncio.to_thread(self._examples.similarities, [row for row, _ in waiting])
            except Exception as error:  # all of these waiters get it; new ones may have come
                for _, future in waiting:
                    if not future.done():
                        future.set_exception(error)
                continue
            for (_, future), values in zip(waiting, found.values.tolist(), strict=True):
                if not future.done():  # the client may have left
                    future.set_result(tuple(values))
