"""`Begun`: starts an app before its server starts, for servers that need what the app opens at its start."""

from __future__ import annotations

import asyncio

from starlette.types import ASGIApp, Message, Receive, Scope, Send

from logo.errors import LoGoError


class Begun:
    """Wraps an app that `start` starts. The server's startup event then has no effect; its shutdown event ends the app.

    Args:
        app: the app to start.
    """

    def __init__(self, app: ASGIApp) -> None:
        self.app = app
        self._told, self._said = asyncio.Queue[Message](), asyncio.Queue[Message]()

    async def start(self) -> None:
        """Starts the app.

        Raises:
            LoGoError: the app cannot start.
        """
        scope: Scope = {"type": "lifespan", "asgi": {"version": "3.0", "spec_version": "2.0"}, "state": {}}
        self._running = asyncio.create_task(self._run(scope))
        found = await self._asked("lifespan.startup")
        if found["type"] != "lifespan.startup.complete":
            self._running.cancel()  # it may wait for the shutdown event
            lines = str(found.get("message", "")).strip().splitlines()  # Starlette's is a traceback
            raise LoGoError(lines[-1] if lines else "the app did not start")

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] != "lifespan":
            return await self.app(scope, receive, send)
        await receive()
        await send({"type": "lifespan.startup.complete"})
        await receive()
        await send(await self._asked("lifespan.shutdown"))

    async def _asked(self, what: str) -> Message:
        self._asking = what
        await self._told.put({"type": what})
        return await self._said.get()

    async def _run(self, scope: Scope) -> None:
        try:
            await self.app(scope, self._told.get, self._said.put)
        except Exception as error:  # usually the app has reported the error already
            await self._said.put({"type": f"{self._asking}.failed", "message": f"{type(error).__name__}: {error}"})
