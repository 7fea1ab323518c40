"""`Gate`: makes requests wait while the pool changes; `Gated` is the app behind it, in pure ASGI."""

from __future__ import annotations

import asyncio
import time
from collections.abc import Callable, Container, Mapping

from starlette.datastructures import MutableHeaders
from starlette.types import ASGIApp, Message, Receive, Scope, Send

from logo.api.visits import Visit, visit
from logo.serving.guards import OPEN_PATHS, PAGE

# Paths that do not depend on the pool, or wait for the gate themselves.
FREE = (*OPEN_PATHS, "/metrics", "/v1/load_lora_adapter", "/v1/unload_lora_adapter")


class Gate:
    """Lets requests use the pool, or makes them wait."""

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
        """Opens the gate."""
        self._closed_since = None
        self._open.set()

    def shut(self) -> None:
        """Closes the gate for new requests."""
        self._open.clear()
        self._closed_since = self._closed_since or time.monotonic()

    async def close(self) -> None:
        """Closes the gate, and waits until the requests inside have selected their mixtures."""
        self.shut()
        await self._empty.wait()

    async def enter(self) -> Visit:
        """Waits until the gate is open, and enters."""
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
    """An app whose requests pass a gate once their bodies have arrived, so that slow clients do not block it.

    Args:
        app: the app behind the gate.
        gate: for all paths but `FREE` and the page's files.
        headers: more headers of `/health`.
        only: the paths that pass the gate, if no others depend on the pool; None: see `gate`.
    """

    def __init__(
        self,
        app: ASGIApp,
        gate: Gate,
        headers: Callable[[], Mapping[str, str]],
        only: Container[str] | None = None,
    ) -> None:
        self.app, self._gate, self._headers, self._only = app, gate, headers, only

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] != "http":
            return await self.app(scope, receive, send)
        path = scope["path"]
        if path in FREE or path.startswith(PAGE) or not (self._only is None or path in self._only):
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
            if inside is not None:  # its mixtures are selected
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
        async def with_headers(message: Message) -> None:
            if message["type"] == "http.response.start":
                MutableHeaders(scope=message).update(self._headers())
            await send(message)

        return with_headers
