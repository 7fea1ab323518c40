"""ASGI types, whole answers, and a limit on the size of bodies."""

from __future__ import annotations

import asyncio
import time
from collections.abc import Awaitable, Callable, Iterable, MutableMapping
from typing import Any

from logo.api.errors import ApiError, too_large

Scope = MutableMapping[str, Any]
Message = MutableMapping[str, Any]
Receive = Callable[[], Awaitable[Message]]
Send = Callable[[Message], Awaitable[None]]
App = Callable[[Scope, Receive, Send], Awaitable[None]]


async def answer(send: Send, status: int, body: bytes, headers: Iterable[tuple[bytes, bytes]] = ()) -> None:
    """Sends a complete JSON response."""
    own = [(b"content-type", b"application/json"), (b"content-length", str(len(body)).encode())]
    others = [(k, v) for k, v in headers if k.lower() not in (b"content-type", b"content-length")]
    await send({"type": "http.response.start", "status": status, "headers": [*own, *others]})
    await send({"type": "http.response.body", "body": body})


async def answer_error(send: Send, error: ApiError) -> None:
    """Sends an error as a complete JSON response."""
    headers = [(name.lower().encode(), value.encode()) for name, value in error.headers.items()]
    await answer(send, error.status, error.content(), headers)


class BodyLimit:
    """Answers 413 to bodies above a limit: at once if the length is announced, else when the limit is passed.

    In the latter case the app gets an `ApiError` while it reads. After the answer the connection stays open for a short
    while, and further data is discarded: closing it under a client that still sends would reset it, and the client
    would lose the answer.
    """

    LINGER = 30.0  # the longest time, in seconds, that the connection stays open
    QUIET = 2.0  # the connection closes after this many seconds without data
    THROWN_AWAY = 64 * 2**20  # the most bytes that are discarded

    def __init__(self, app: App, limit: int) -> None:
        self.app = app
        self.limit = limit

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] != "http":
            return await self.app(scope, receive, send)
        announced = next((value for name, value in scope["headers"] if name == b"content-length"), b"0")
        seen = 0

        async def counted() -> Message:
            nonlocal seen
            message = await receive()
            seen += len(message.get("body", b""))
            if seen > self.limit:
                raise too_large(self.limit)
            return message

        async def lingering(message: Message) -> None:
            if seen <= self.limit or message["type"] != "http.response.body" or message.get("more_body", False):
                return await send(message)
            await send({**message, "more_body": True})
            await self._throw_away(receive)
            await send({"type": "http.response.body", "body": b""})

        if announced.isdigit() and (len(announced) > 18 or int(announced) > self.limit):
            seen = self.limit + 1
            return await answer_error(lingering, too_large(self.limit))
        await self.app(scope, counted, lingering)

    async def _throw_away(self, receive: Receive) -> None:
        seen, end = 0, time.monotonic() + self.LINGER
        while seen < self.THROWN_AWAY and time.monotonic() < end:
            try:
                message = await asyncio.wait_for(receive(), self.QUIET)
            except asyncio.TimeoutError:  # not the built-in TimeoutError before Python 3.11
                return
            seen += len(message.get("body", b""))
            if not message.get("more_body", False):
                return
