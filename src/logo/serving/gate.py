"""`Gate`: makes requests wait while the pool changes; `Gated`: an app behind it. Pure ASGI, so streams stay streams."""

from __future__ import annotations

import asyncio
import time
from collections.abc import Callable, Container, Mapping

from starlette.datastructures import MutableHeaders
from starlette.types import ASGIApp, Message, Receive, Scope, Send

from logo.api.visits import Visit, visit

# What says nothing of the pool, or waits for the gate itself.
FREE = ("/health", "/ready", "/version", "/metrics", "/", "/v1/load_lora_adapter", "/v1/unload_lora_adapter")


class Gate:
    """Whether requests may use the pool."""

    def __init__(self) -> None:
        self._open, self._empty = asyncio.Event(), asyncio.Event()
        self._empty.set()
        self._inside = 0
        self._closed_since: float | None = time.monotonic()

    @property
    def closed_for(self) -> float:
        """Seconds since it was closed; 0 if it is open."""
        return 0.0 if self._closed_since is None else time.monotonic() - self._closed_since

    def open(self) -> None:
        """Lets all requests pass."""
        self._closed_since = None
        self._open.set()

    def shut(self) -> None:
        """Makes all requests wait."""
        self._open.clear()
        self._closed_since = self._closed_since or time.monotonic()

    async def close(self) -> None:
        """Lets nobody in, and waits until all who are inside have decided what answers them."""
        self.shut()
        await self._empty.wait()

    async def enter(self) -> Visit:
        """Waits until it is open."""
        while not self._open.is_set():
            await self._open.wait()
        self._inside += 1
        self._empty.clear()
        return Visit(self._leave)

    def _leave(self) -> None:
        self._inside -= 1
        if not self._inside:
            self._empty.set()


class Gated:
    """An app whose requests pass a gate after their bodies have arrived, so that a slow client does not keep it busy.

    Args:
        app: the app behind the gate.
        gate: passed by all requests except `FREE` and the page's files.
        told: headers of `/health`.
        only: the paths that pass the gate, if no others depend on the pool; None: as `gate` says.
    """

    def __init__(
        self,
        app: ASGIApp,
        gate: Gate,
        told: Callable[[], Mapping[str, str]],
        only: Container[str] | None = None,
    ) -> None:
        self.app, self._gate, self._told, self._only = app, gate, told, only

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] != "http":
            return await self.app(scope, receive, send)
        path = scope["path"]
        if path in FREE or path.startswith("/page/") or not (self._only is None or path in self._only):
            return await self.app(scope, receive, self._telling(send) if path == "/health" else send)
        inside: Visit | None = None

        async def enter() -> None:
            nonlocal inside
            inside = await self._gate.enter()
            visit.set(inside)

        async def received() -> Message:
            message = await receive()
            if message["type"] == "http.request" and not message.get("more_body") and inside is None:
                await enter()
            return message

        async def watched(message: Message) -> None:
            if inside is not None:  # an answer that begins is decided
                inside.leave()
            await send(message)

        try:
            if scope["method"] in ("GET", "HEAD"):
                await enter()
            await self.app(scope, received, watched)
        finally:
            if inside is not None:
                inside.leave()

    def _telling(self, send: Send) -> Send:
        async def told(message: Message) -> None:
            if message["type"] == "http.response.start":
                MutableHeaders(scope=message).update(self._told())
            await send(message)

        return told
