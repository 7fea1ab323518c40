"""The router's calls to vLLM's workers."""

from __future__ import annotations

import asyncio
from collections.abc import Iterable, Iterator, Sequence
from functools import partial
from typing import Any

from logo.backends.vllm.core import Core, new_key, outcomes, texts_of, values
from logo.backends.vllm.marks import probing
from logo.backends.vllm.pool import Change
from logo.errors import UsageError

# Seconds between two attempts while this process waits.
_AGAIN = 0.05


class Workers:
    """The workers of one engine.

    Args:
        client: vLLM's client of the engine.

    Attributes:
        scores: takes the result of `logo.backends.vllm.worker.Worker.scores` for a probe.
        failures: takes that of `Worker.failures` for an answer.
    """

    def __init__(self, client: Any) -> None:
        self._client = client
        self._name = new_key()  # of this process
        self._alone = getattr(client.vllm_config.parallel_config, "_api_process_count", 1) <= 1
        self._changing = asyncio.Lock()
        self._tasks: set[asyncio.Task[None]] = set()
        self.scores = Taking(self, "logo_scores")
        self.failures = Taking(self, "logo_failures")

    async def call(self, name: str, *args: Any) -> list[Any]:
        """Calls one of `logo.backends.vllm.calls.CALLS` on every worker, and returns their values.

        Raises:
            WorkerError: a worker returned an error.
        """
        return values(await self._client.collective_rpc(name, args=args))

    async def change(self, core: Core, change: Change | None = None) -> None:
        """Opens or changes the pool in all workers or in none; answers continue meanwhile.

        If a calibration is not cached, its texts are run through the model. A removed adapter stays loaded until the
        last answer with it has ended. If several processes answer HTTP, one of them opens the pool.

        Raises:
            LoGoError: a worker cannot open or change the pool; nothing has changed then. After an error of the last
                step, which only takes what the others have prepared, nothing is answered any more (`Core.broken`).
        """
        if change is not None and not self._alone:
            raise UsageError(
                "the pool cannot change while several processes answer HTTP: leave out --api-server-count, or start "
                "the server again with the new pool"
            )
        async with self._changing:
            try:
                while "wait" in (replies := await self._stage(change))[0]:
                    await asyncio.sleep(_AGAIN)
                pool = await asyncio.to_thread(core.staged, change, replies)
                if "scored" in replies[0]:  # another process has opened it
                    core.commit(pool, replies[0]["scored"])
                    return
                scored = await self._scored(core.signals)
            except BaseException:
                await self.call("logo_abandon", self._name)
                raise
            try:
                await self.call("logo_commit")
            except BaseException as error:
                core.broken = (
                    "a change of the pool has failed in a worker, so the workers' pools differ: start the server "
                    f"again ({error})"
                )
                raise
            left = core.commit(pool, scored)
        self._release(core, left)

    async def _stage(self, change: Change | None) -> list[Any]:
        return await self.call("logo_stage", change and list(change), self._name)

    async def _scored(self, signals: Sequence[str]) -> dict[str, Any]:
        """Signal -> the result of `Scoring.open`, after running the texts of its calibration if necessary."""
        scored = {}
        for signal in signals:
            opened = await self.call("logo_signal", signal)
            while texts := texts_of(opened):
                keys = [new_key() for _ in texts]
                await asyncio.gather(*map(self._run, texts, keys))
                opened = await self.call("logo_calibrate", signal, texts, keys)
            scored[signal] = opened[0]
        return scored

    def _release(self, core: Core, keys: Sequence[str]) -> None:
        """Has the workers remove adapters that have left the pool, once all answers with them have ended."""

        async def wait() -> None:
            while core.answering(keys):
                await asyncio.sleep(_AGAIN)
            await self.call("logo_forget", list(keys))

        if keys:
            task = asyncio.create_task(wait())
            self._tasks.add(task)
            task.add_done_callback(self._tasks.discard)

    async def _run(self, text: list[int], key: str) -> None:
        from vllm import SamplingParams

        parameters = SamplingParams(max_tokens=1, temperature=0.0)
        with probing(key, ""):
            async for _ in self._client.generate({"prompt_token_ids": text}, parameters, f"logo-{key}"):
                pass


class Taking:
    """Results of single requests from the workers; callers that wait share one call.

    Args:
        workers: of the engine.
        name: of the function in `logo.backends.vllm.calls`.
    """

    def __init__(self, workers: Workers, name: str) -> None:
        self._call = partial(workers.call, name)
        self._waiting: dict[str, asyncio.Future[Any]] = {}
        self._taking: asyncio.Task[None] | None = None

    async def __call__(self, key: str) -> Any:
        """The result for one key."""
        waiting = self._waiting[key] = asyncio.get_running_loop().create_future()
        if self._taking is None or self._taking.done():
            self._taking = asyncio.create_task(self._take())
        return await waiting

    async def _take(self) -> None:
        while self._waiting:
            waiting, self._waiting = self._waiting, {}
            try:
                found = outcomes(await self._call(list(waiting)))
            except Exception as error:  # all of these waiters get it; new ones may have come
                for _, future in _open(waiting.items()):
                    future.set_exception(error)
                continue
            for key, future in _open(waiting.items()):
                future.set_result(found[key])


def _open(waiting: Iterable[tuple[str, asyncio.Future[Any]]]) -> Iterator[tuple[str, asyncio.Future[Any]]]:
    """The futures that are not done yet; that of a client that has left is cancelled."""
    return ((key, future) for key, future in waiting if not future.done())
