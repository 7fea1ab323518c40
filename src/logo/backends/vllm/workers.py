"""What the HTTP router asks of vLLM's workers."""

from __future__ import annotations

import asyncio
from collections.abc import Iterable, Iterator, Sequence
from typing import Any

from logo.backends.vllm.core import Core, new_key, values
from logo.backends.vllm.marks import marking
from logo.backends.vllm.pool import Change
from logo.errors import UsageError


class Workers:
    """The workers of one engine.

    Args:
        client: vLLM's client of the engine.
    """

    def __init__(self, client: Any) -> None:
        self._client = client
        self._api_servers = getattr(client.vllm_config.parallel_config, "_api_process_count", 1)
        self._changing = asyncio.Lock()
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
        last answer with them has ended.

        Raises:
            LoGoError: the workers cannot do it; nothing has changed then.
        """
        async with self._changing:
            if self._api_servers > 1:
                raise UsageError(
                    f"this server has {self._api_servers} processes for HTTP, and each would open the pool by itself: "
                    "start vLLM with --api-server-count 1"
                )
            pool = await asyncio.to_thread(core.staged, change, await self.call("logo_stage", change and list(change)))
            scored = {}
            for signal in core.signals:
                opened = (await self.call("logo_signal", signal))[0]
                if opened["texts"]:
                    keys = [new_key() for _ in opened["texts"]]
                    await asyncio.gather(*map(self._run, opened["texts"], keys))
                    opened = (await self.call("logo_calibrate", signal, keys))[0]
                scored[signal] = opened["names"]
            await self.call("logo_commit")
            left = core.commit(pool, scored)
        if left:
            task = asyncio.create_task(self._forget(core, left))
            self._tasks.add(task)
            task.add_done_callback(self._tasks.discard)

    async def _forget(self, core: Core, keys: Sequence[str]) -> None:
        while core.answering(keys):
            await asyncio.sleep(0.05)
        await self.call("logo_forget", list(keys))

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
            except Exception as error:  # everybody who waits is told; others may wait by now
                for future in _open(waiting.values()):
                    future.set_exception(error)
                continue
            for key, futures in waiting.items():
                for future in _open([futures]):
                    future.set_result(found[key])


def _open(futures: Iterable[Sequence[asyncio.Future[Any]]]) -> Iterator[asyncio.Future[Any]]:
    """Those that somebody still waits for: a client may have left."""
    return (future for some in futures for future in some if not future.done())
