"""`Line`: requests that wait for a mixture. They join in the event loop and are taken in the thread that selects."""

from __future__ import annotations

import asyncio
import time
from collections import deque
from collections.abc import Sequence
from dataclasses import dataclass

from logo.prompts import Prompt
from logo.protocol import MixtureRequest
from logo.serving.mixtures import HeldMixture


@dataclass
class Waiting:
    """A request that waits for its mixture.

    Attributes:
        since: when it joined, in seconds of `time.perf_counter`.
        future: gets the mixture, or the error that the request fails with.
    """

    prompt: Prompt | Sequence[int]
    wanted: MixtureRequest
    since: float
    future: asyncio.Future[HeldMixture]


class Line:
    """Requests that wait for a mixture, the longest waiting first."""

    def __init__(self) -> None:
        self._waiting: deque[Waiting] = deque()  # two threads may use its two ends
        self._joined = asyncio.Event()

    def __len__(self) -> int:
        return len(self._waiting)

    async def join(self, prompt: Prompt | Sequence[int], wanted: MixtureRequest) -> HeldMixture:
        """Waits for the mixture of a prompt; raises what selecting for it raised."""
        waiting = Waiting(prompt, wanted, time.perf_counter(), asyncio.get_running_loop().create_future())
        self._waiting.append(waiting)
        self._joined.set()
        return await waiting.future

    async def filled(self) -> None:
        """Returns when a request waits."""
        while not self._waiting:
            self._joined.clear()
            await self._joined.wait()

    def take(self, count: int) -> list[Waiting]:
        """Takes at most `count` requests out of the line. Those that were cancelled are dropped."""
        taken: list[Waiting] = []
        while self._waiting and len(taken) < count:
            waiting = self._waiting.popleft()
            if not waiting.future.done():
                taken.append(waiting)
        return taken


def hand_out(batch: Sequence[Waiting], results: Sequence[HeldMixture | Exception]) -> None:
    """Gives each result to the request that still waits for it."""
    for waiting, result in zip(batch, results, strict=True):
        if waiting.future.done():
            continue
        if isinstance(result, Exception):
            waiting.future.set_exception(result)
        else:
            waiting.future.set_result(result)
