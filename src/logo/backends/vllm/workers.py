"""The router's calls to vLLM's workers."""

from __future__ import annotations

import asyncio
import logging
import time
from collections.abc import Collection, Coroutine, Iterable, Iterator, Sequence
from typing import Any

from logo.backends.vllm.core import Core, new_key, outcomes, texts_of, values
from logo.backends.vllm.marks import marking
from logo.backends.vllm.pool import Change, KeyedPool
from logo.errors import LoGoError

log = logging.getLogger("vllm.logo")

# Seconds: between two attempts while a process waits for others; between two checks for changes by other processes; and
# the longest that a change waits until all processes have taken it over.
_AGAIN, _LOOKING, _LONGEST = 0.05, 1.0, 60.0


class Workers:
    """The workers of one engine.

    Args:
        client: vLLM's client of the engine.
    """

    def __init__(self, client: Any) -> None:
        self._client = client
        self._name = new_key()  # of this process
        self._alone = getattr(client.vllm_config.parallel_config, "_api_process_count", 1) <= 1
        self._changing = asyncio.Lock()
        self._staged: tuple[KeyedPool, dict[str, Any]] | None = None  # pool, and what each signal scores
        self._tasks: set[asyncio.Task[None]] = set()
        self._waiting: dict[str, list[asyncio.Future[Any]]] = {}  # several answers may have one recipe
        self._among: dict[str, list[str]] = {}
        self._taking: asyncio.Task[None] | None = None

    async def call(self, name: str, *args: Any) -> list[Any]:
        """Calls one of `logo.backends.vllm.calls.CALLS` on every worker, and returns their values.

        Raises:
            WorkerError: a worker returned an error.
        """
        return values(await self._client.collective_rpc(name, args=args))

    async def change(self, core: Core, change: Change | None = None) -> None:
        """Opens or changes the pool in all workers or in none; answers continue meanwhile.

        If a calibration is not cached, its texts are run through the model. A removed adapter stays loaded until the
        last answer with it has ended. If several processes answer HTTP, one of them opens the pool, and a change is
        complete when all of them have taken it over.

        Raises:
            LoGoError: a worker cannot open or change the pool; nothing has changed then.
        """
        async with self._changing:
            try:
                replies = await self._begun(core, change)
                if "scored" in replies[0]:  # another process has opened it
                    core.commit(await asyncio.to_thread(core.followed, replies), replies[0]["scored"])
                    left: Sequence[str] = ()
                else:
                    left = await self._committed(core, await self._prepared(core, change, replies))
            except BaseException:
                await self.call("logo_abandon", self._name)
                raise
            if change is None and not self._alone:
                self._keep(self._following(core))
            elif not self._alone:
                await self._known_by_all(core)
        self._release(core, left)

    async def stage(self, core: Core, change: Change) -> KeyedPool:
        """Prepares the pool after a change in all workers, and returns it. Answers use the current pool until `commit`;
        `abandon` drops the prepared one.

        Raises:
            LoGoError: a worker cannot make the change; nothing has changed then.
        """
        async with self._changing:
            try:
                self._staged = await self._prepared(core, change, await self._begun(core, change))
            except BaseException:
                await self.call("logo_abandon", self._name)
                raise
            return self._staged[0]

    async def commit(self, core: Core) -> None:
        """Makes the staged pool the current one in all workers. After an error in one of them, their pools may differ.

        Raises:
            LoGoError: nothing was staged, or a worker has failed.
        """
        async with self._changing:
            if self._staged is None:
                raise LoGoError("no change of the pool was staged")
            staged, self._staged = self._staged, None
            left = await self._committed(core, staged)
        self._release(core, left)

    async def abandon(self) -> None:
        """Drops the staged pool in all workers."""
        async with self._changing:
            self._staged = None
            await self.call("logo_abandon", self._name)

    async def follow(self, core: Core) -> None:
        """Takes over a change of the pool that another process has made.

        Raises:
            LoGoError: an adapter cannot be opened here.
        """
        if not self._alone:
            async with self._changing:
                await self._follow(core)

    async def _begun(self, core: Core, change: Change | None) -> list[Any]:
        """Begins a change in all workers, once no other process is changing the pool; returns their replies."""
        while True:
            if change is not None:
                await self._follow(core)
            replies = await self.call("logo_stage", change and list(change), self._name, core.pool.digest)
            if not any("wait" in one for one in replies):
                return replies
            await asyncio.sleep(_AGAIN)

    async def _prepared(
        self, core: Core, change: Change | None, replies: Sequence[Any]
    ) -> tuple[KeyedPool, dict[str, Any]]:
        """The pool that the workers have staged, and what each signal scores, after calibrating the pool for it."""
        pool = await asyncio.to_thread(core.staged, change, replies)
        return pool, await self._scored(core.signals)

    async def _committed(self, core: Core, staged: tuple[KeyedPool, dict[str, Any]]) -> Sequence[str]:
        """Makes the staged pool the current one, and returns the keys of adapters that are no longer in it."""
        await self.call("logo_commit", self._name)
        return core.commit(*staged)

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

    async def _follow(self, core: Core) -> int:
        """As `follow`; returns the number of processes that select from another pool than that of the workers."""
        replies = await self.call("logo_pool", self._name, core.pool.digest)
        if "scored" not in replies[0]:
            return int(replies[0]["behind"])
        core.commit(await asyncio.to_thread(core.followed, replies), replies[0]["scored"])
        self._release(core, replies[0]["left"])
        return int((await self.call("logo_pool", self._name, core.pool.digest))[0]["behind"])

    async def _following(self, core: Core) -> None:
        """Takes over the changes of other processes, for as long as this process runs."""
        while True:
            await asyncio.sleep(_LOOKING)
            try:
                await self.follow(core)
            except LoGoError as error:
                log.error("LoGo: a change of the pool could not be taken over: %s", error)

    async def _known_by_all(self, core: Core) -> None:
        end = time.monotonic() + _LONGEST
        while await self._follow(core):
            if time.monotonic() > end:
                log.error("LoGo: a process has not taken over the change of the pool yet")
                return
            await asyncio.sleep(_AGAIN)

    def _release(self, core: Core, keys: Sequence[str]) -> None:
        """Tells the workers that this process has released removed adapters, once its answers with them have ended."""

        async def wait() -> None:
            while core.answering(keys):
                await asyncio.sleep(_AGAIN)
            await self.call("logo_forget", list(keys), self._name)

        if keys:
            self._keep(wait())

    def _keep(self, running: Coroutine[Any, Any, None]) -> None:
        task = asyncio.create_task(running)
        self._tasks.add(task)
        task.add_done_callback(self._tasks.discard)

    async def _run(self, text: list[int], key: str) -> None:
        from vllm import SamplingParams

        parameters = SamplingParams(max_tokens=1, temperature=0.0)
        with marking(key, ""):
            async for _ in self._client.generate({"prompt_token_ids": text}, parameters, f"logo-{key}"):
                pass

    async def take(self, key: str, among: Collection[str] | None = None) -> Any:
        """The result of `logo.backends.vllm.worker.Worker.take` for one key; waiting callers share one call.

        Args:
            among: names of the adapters that may be selected; None: all.
        """
        waiting: asyncio.Future[Any] = asyncio.get_running_loop().create_future()
        if among is not None:
            self._among[key] = list(among)
        self._waiting.setdefault(key, []).append(waiting)
        if self._taking is None or self._taking.done():
            self._taking = asyncio.create_task(self._take())
        return await waiting

    async def _take(self) -> None:
        while self._waiting:
            waiting, self._waiting = self._waiting, {}
            among, self._among = self._among, {}
            try:
                found = outcomes(await self.call("logo_take", list(waiting), among))
            except Exception as error:  # all of these waiters get it; new ones may have come
                for future in _open(waiting.values()):
                    future.set_exception(error)
                continue
            for key, futures in waiting.items():
                for future in _open([futures]):
                    future.set_result(found[key])


def _open(futures: Iterable[Sequence[asyncio.Future[Any]]]) -> Iterator[asyncio.Future[Any]]:
    """The futures that are not done yet; that of a client that has left is cancelled."""
    return (future for some in futures for future in some if not future.done())
