"""`Encoding`: what a text encoder says of prompts, read in the server's process beside the event loop."""

from __future__ import annotations

import asyncio
from collections.abc import Sequence

from logo.adapters.pool import AdapterPool
from logo.files import Store, cache_folder
from logo.models import load_tokenizer
from logo.prompts import Prompts
from logo.selection.encoder import EncodedExamples
from logo.selection.settings import SelectionSettings
from logo.selection.texts import NEUTRAL, REQUESTS, windowed


class Encoding:
    """Reads prompts by the text encoder of a pool, all that wait together, in a thread."""

    def __init__(self, examples: EncodedExamples) -> None:
        self._examples = examples
        self._waiting: list[tuple[Sequence[int], asyncio.Future[tuple[float, ...]]]] = []
        self._reading: asyncio.Task[None] | None = None

    @classmethod
    def of(cls, pool: AdapterPool, settings: SelectionSettings, tokenizer_path: str) -> Encoding | None:
        """The encoding that the settings ask for; None: they ask for none, or no adapter has example prompts. Errors as
        `logo.selection.encoder.embed`."""
        if settings.encoder is None or settings.examples != "use":
            return None
        tokenizer = load_tokenizer(tokenizer_path)
        prompts = Prompts(tokenizer, None)
        window = settings.reading(pool).window

        def read(texts: Sequence[str]) -> list[Sequence[int]]:
            return [windowed(row, window) for row in prompts.texts(texts)]

        ordinary = read([*NEUTRAL, *(settings.calibration_prompts or REQUESTS)])
        examples = [read(adapter.examples) if adapter.examples else [] for adapter in pool]
        store = Store(cache_folder(settings.cache))
        encoded = EncodedExamples.of(settings.encoder, prompts.text_of, examples, ordinary, store)
        return None if encoded is None else cls(encoded)

    async def similarities(self, row: Sequence[int]) -> tuple[float, ...]:
        """`e` of a prompt's token ids, which were cut to the window, for the adapters with example prompts."""
        future = asyncio.get_running_loop().create_future()
        self._waiting.append((row, future))
        if self._reading is None or self._reading.done():
            self._reading = asyncio.create_task(self._read())
        values: tuple[float, ...] = await future
        return values

    async def _read(self) -> None:
        while self._waiting:
            waiting = self._waiting
            self._waiting = []
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
