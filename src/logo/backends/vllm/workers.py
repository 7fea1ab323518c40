"""What the HTTP router asks of vLLM's workers."""

from __future__ import annotations

import asyncio
from typing import Any

from logo.backends.vllm.core import Core, new_key, values
from logo.backends.vllm.marks import marked


class Workers:
    """The workers of one engine.

    Args:
        client: vLLM's client of the engine.
    """

    def __init__(self, client: Any) -> None:
        self._client = client
        self._waiting: dict[str, asyncio.Future[Any]] = {}
        self._taking: asyncio.Task[None] | None = None

    async def call(self, name: str, *args: Any) -> list[Any]:
        """What each worker answers to one of `logo.backends.vllm.worker.CALLS`.

        Raises:
            WorkerError: one of them refused.
        """
        return values(await self._client.collective_rpc(name, args=args))

    async def open(self, core: Core) -> None:
        """Opens the pool in all workers; runs texts through the model where a calibration is not known yet.

        Raises:
            LoGoError: the workers have another pool, or cannot be probed.
        """
        core.opened(await self.call("logo_open"))
        for signal in core.options.all_signals:
            opened = (await self.call("logo_signal", signal))[0]
            if opened["texts"]:
                keys = [new_key() for _ in opened["texts"]]
                await asyncio.gather(*map(self._run, opened["texts"], keys))
                opened = (await self.call("logo_calibrate", signal, keys))[0]
            core.scored(signal, opened["names"])

    async def _run(self, text: list[int], key: str) -> None:
        from vllm import SamplingParams

        parameters = SamplingParams(max_tokens=1, temperature=0.0, extra_args=marked(key, ""))
        async for _ in self._client.generate({"prompt_token_ids": text}, parameters, f"logo-{key}"):
            pass

    async def take(self, key: str) -> Any:
        """See `logo.backends.vllm.worker.Worker.take`; those that wait are asked for together."""
        waiting: asyncio.Future[Any] = asyncio.get_running_loop().create_future()
        self._waiting[key] = waiting
        if self._taking is None or self._taking.done():
            self._taking = asyncio.create_task(self._take())
        return await waiting

    async def _take(self) -> None:
        while self._waiting:
            waiting, self._waiting = self._waiting, {}
            try:
                found = (await self.call("logo_take", list(waiting)))[0]
            except BaseException as error:
                for future in waiting.values():
                    if not future.done():
                        future.set_exception(error)
                raise
            for key, future in waiting.items():
                if not future.done():  # its client may have left
                    future.set_result(found[key])
