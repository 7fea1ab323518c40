"""Pieces of ASGI: read a request's body, ask an app once more, and change what it answers on its way out."""

from __future__ import annotations

import asyncio
import json
from collections.abc import Awaitable, Callable
from dataclasses import dataclass
from typing import Any

from logo.api.asgi import App, Message, Receive, Scope, Send, answer_error
from logo.api.errors import ApiError


@dataclass(frozen=True)
class Answer:
    """A whole response."""

    status: int
    headers: list[tuple[bytes, bytes]]
    body: bytes

    def json(self) -> Any:
        """Its body; None where that is no JSON."""
        try:
            return json.loads(self.body)
        except ValueError:
            return None


async def body_of(receive: Receive) -> bytes | None:
    """The whole body of a request; None where the client has left."""
    parts = []
    while True:
        message = await receive()
        if message["type"] == "http.disconnect":
            return None
        parts.append(message.get("body", b""))
        if not message.get("more_body"):
            return b"".join(parts)


def sending(body: bytes, receive: Receive) -> Receive:
    """A `receive` that gives this body, and then what the client does."""
    given = False

    async def receive_again() -> Message:
        nonlocal given
        if not given:
            given = True
            return {"type": "http.request", "body": body, "more_body": False}
        return await receive()

    return receive_again


def asking(scope: Scope, path: str, method: str, body: bytes) -> Scope:
    """The scope of another request by the same client, with its credentials."""
    kept = [(k, v) for k, v in scope["headers"] if k not in (b"content-length", b"content-type", b"transfer-encoding")]
    headers = [*kept, (b"content-type", b"application/json"), (b"content-length", str(len(body)).encode())]
    again = {name: value for name, value in scope.items() if name not in ("endpoint", "path_params", "router", "route")}
    root = scope.get("root_path", "")
    return {
        **again,
        "method": method,
        "path": root + path,
        "raw_path": (root + path).encode(),
        "query_string": b"",
        "headers": headers,
    }


async def _silence() -> Message:
    """Never anything."""
    await asyncio.Event().wait()
    raise AssertionError


async def ask(
    app: App, scope: Scope, path: str, method: str = "POST", body: bytes = b"", receive: Receive | None = None
) -> Answer:
    """What an app answers to another request by the same client.

    Args:
        receive: what the client does, once its own request was read; None: nothing of it is read.
    """
    status, headers, parts = 500, list[tuple[bytes, bytes]](), []

    async def send(message: Message) -> None:
        nonlocal status, headers
        if message["type"] == "http.response.start":
            status, headers = message["status"], list(message.get("headers", ()))
        elif message["type"] == "http.response.body":
            parts.append(message.get("body", b""))

    await app(asking(scope, path, method, body), sending(body, receive or _silence), send)
    return Answer(status, headers, b"".join(parts))


class Rewriting:
    """A `send` that changes the JSON objects of a response: of a whole one, or of each event of a stream.

    Args:
        send: where the response goes.
        change: changes one object in place; told whether it is the first.
        check: awaited before the end of a response; an error that it returns stands instead of a whole response, and
            ends a stream.
    """

    def __init__(
        self,
        send: Send,
        change: Callable[[dict[str, Any], bool], None],
        check: Callable[[], Awaitable[ApiError | None]] | None = None,
    ) -> None:
        self._send, self._change, self._check = send, change, check
        self._start: Message | None = None
        self._streams = False
        self._rest = b""
        self._first = True

    async def __call__(self, message: Message) -> None:
        if message["type"] == "http.response.start":
            kinds = [value for name, value in message.get("headers", ()) if name.lower() == b"content-type"]
            self._streams = any(kind.startswith(b"text/event-stream") for kind in kinds)
            self._start = message
            if self._streams:
                await self._send(message)
            return
        if message["type"] != "http.response.body":
            await self._send(message)
            return
        more = bool(message.get("more_body"))
        if self._streams:
            *lines, self._rest = (self._rest + message.get("body", b"")).split(b"\n")
            if not more and self._rest:
                lines, self._rest = [*lines, self._rest], b""
            if any(line.startswith(b"data: [DONE]") for line in lines) and (error := await self._checked()):
                lines = [line for line in lines if not line.startswith(b"data: [DONE]")]
                lines = [*lines, *error.event().split(b"\n"), b"data: [DONE]", b""]
            elif not more and (error := await self._checked()):  # a stream that says [DONE] to nobody
                lines = [*lines, b"", *error.event().split(b"\n")]
            body = b"".join(self._event(line) + b"\n" for line in lines)
            await self._send({"type": "http.response.body", "body": body, "more_body": more})
            return
        self._rest += message.get("body", b"")
        if not more:
            assert self._start is not None
            if self._start["status"] == 200 and (error := await self._checked()):
                await answer_error(self._send, error)
                return
            body = self._changed(self._rest)
            headers = [(k, v) for k, v in self._start.get("headers", ()) if k.lower() != b"content-length"]
            headers.append((b"content-length", str(len(body)).encode()))
            await self._send({**self._start, "headers": headers})
            await self._send({"type": "http.response.body", "body": body})

    async def _checked(self) -> ApiError | None:
        check, self._check = self._check, None
        return None if check is None else await check()

    def _event(self, line: bytes) -> bytes:
        return b"data: " + self._changed(line[6:]) if line.startswith(b"data: {") else line

    def _changed(self, data: bytes) -> bytes:
        try:
            found = json.loads(data)
        except ValueError:
            return data
        if not isinstance(found, dict):
            return data
        self._change(found, self._first)
        self._first = False
        return json.dumps(found, ensure_ascii=False, separators=(",", ":")).encode()
