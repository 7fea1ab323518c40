"""The router's calls to vLLM's workers."""

from __future__ import annotations

import asyncio
import logging
import time
from collections.abc import Coroutine, Iterable, Iterator, Sequence
from typing import Any

from logo.backends.vllm.core import Core, new_key, texts_of, values
from logo.backends.vllm.marks import marking
from logo.backends.vllm.pool import Change, KeyedPool
from logo.errors import LoGoError

log = logging.getLogger("vllm.logo")

# Seconds: until a process asks again for what others have to do first; between looks at what others have changed; and
# for which a change waits for all processes to know it.
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
        self._staged: tuple[KeyedPool, dict[str, Any]] | None = None  # and the adapters that each signal scores
        self._tasks: set[asyncio.Task[None]] = set()
        self._waiting: dict[str, list[asyncio.Future[Any]]] = {}  # several answers may have one recipe
        self._taking: asyncio.Task[None] | None = None

    async def call(self, name: str, *args: Any) -> list[Any]:
        """What each worker answers to one of `logo.backends.vllm.calls.CALLS`.

        Raises:
            WorkerError: one of them refused.
        """
        return values(await self._client.collective_rpc(name, args=args))

    async def change(self, core: Core, change: Change | None = None) -> None:
        """Opens the pool in all workers, or changes it, all or nothing; answers go on meanwhile.

        Texts are run through the model where a calibration is not known yet. Adapters that leave are forgotten when the
        last answer with them has ended. Where several processes answer HTTP, one of them opens the pool, and a change
        is done when all of them know it.

        Raises:
            LoGoError: the workers cannot do it; nothing has changed then.
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
        """Makes the pool ready in all workers that a change leads to, and returns it. Answers go on with the pool that
        there is, until `commit`; or `abandon` leaves it as it is.

        Raises:
            LoGoError: the workers cannot do it; nothing has changed then.
        """
        async with self._changing:
            try:
                self._staged = await self._prepared(core, change, await self._begun(core, change))
            except BaseException:
                await self.call("logo_abandon", self._name)
                raise
            return self._staged[0]

    async def commit(self, core: Core) -> None:
        """Makes true what was staged, in all workers; where one of them cannot, they are not alike any more.

        Raises:
            LoGoError: nothing was staged, or a worker cannot do it.
        """
        async with self._changing:
            if self._staged is None:
                raise LoGoError("no change of the pool was staged")
            staged, self._staged = self._staged, None
            left = await self._committed(core, staged)
        self._release(core, left)

    async def abandon(self) -> None:
        """Leaves what was staged."""
        async with self._changing:
            self._staged = None
            await self.call("logo_abandon", self._name)

    async def follow(self, core: Core) -> None:
        """Takes over what another process has changed.

        Raises:
            LoGoError: an adapter cannot be opened here.
        """
        if not self._alone:
            async with self._changing:
                await self._follow(core)

    async def _begun(self, core: Core, change: Change | None) -> list[Any]:
        """What the workers say of the change that has begun: as soon as no other process changes the pool."""
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
        """The pool that the workers have begun, and what each signal scores, when it is calibrated."""
        pool = await asyncio.to_thread(core.staged, change, replies)
        return pool, await self._scored(core.signals)

    async def _committed(self, core: Core, staged: tuple[KeyedPool, dict[str, Any]]) -> Sequence[str]:
        """Makes it true, and returns the keys of adapters that have left."""
        await self.call("logo_commit", self._name)
        return core.commit(*staged)

    async def _scored(self, signals: Sequence[str]) -> dict[str, Any]:
        """What each signal scores, when it is calibrated."""
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
        """See `follow`. Returns how many processes select from another pool than the workers have."""
        replies = await self.call("logo_pool", self._name, core.pool.digest)
        if "scored" not in replies[0]:
            return int(replies[0]["behind"])
        core.commit(await asyncio.to_thread(core.followed, replies), replies[0]["scored"])
        self._release(core, replies[0]["left"])
        return int((await self.call("logo_pool", self._name, core.pool.digest))[0]["behind"])

    async def _following(self, core: Core) -> None:
        """Follows what others change, for as long as this process runs."""
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
        """Has adapters that have left forgotten, when no answer of this process is on its way with them."""

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

    async def take(self, key: str) -> Any:
        """See `logo.backends.vllm.worker.Worker.take`; those that wait are asked for together."""
        waiting: asyncio.Future[Any] = asyncio.get_running_loop().create_future()
        self._waiting.setdefault(key, []).append(waiting)
        if self._taking is None or self._taking.done():
            self._taking = asyncio.create_task(self._take())
        return await waiting

    async def _take(self) -> None:
        while self._waiting:
            waiting, self._waiting = self._waiting, {}
            try:
                found = (await self.call("logo_take", list(waiting)))[0]
            except Exception as error:  # all waiters get it; others may wait by now
                for future in _open(waiting.values()):
                    future.set_exception(error)
                continue
            for key, futures in waiting.items():
                for future in _open([futures]):
                    future.set_result(found[key])


def _open(futures: Iterable[Sequence[asyncio.Future[Any]]]) -> Iterator[asyncio.Future[Any]]:
    """Those that somebody still waits for: a client may have left."""
    return (future for some in futures for future in some if not future.done())
