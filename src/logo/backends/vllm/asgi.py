"""ASGI helpers: reading the body of a request, and sending further requests to an app, which can be abandoned."""

from __future__ import annotations

import asyncio
import json
from collections.abc import Coroutine, Iterable
from dataclasses import dataclass
from typing import Any, TypeVar

from starlette.types import ASGIApp
from starlette.types import Message as Message
from starlette.types import Receive as Receive
from starlette.types import Scope as Scope
from starlette.types import Send as Send

from logo.serve.errors import ApiError

_T = TypeVar("_T")
App = ASGIApp


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


@dataclass(frozen=True)
class Answer:
    """A whole response."""

    status: int
    headers: list[tuple[bytes, bytes]]
    body: bytes

    def json(self) -> Any:
        """The parsed body; None if it is no JSON."""
        try:
            return json.loads(self.body)
        except ValueError:
            return None


async def body_of(receive: Receive) -> bytes | None:
    """The whole body of a request; None if the client has disconnected."""
    parts = []
    while True:
        message = await receive()
        if message["type"] == "http.disconnect":
            return None
        parts.append(message.get("body", b""))
        if not message.get("more_body"):
            return b"".join(parts)


def sending(body: bytes, receive: Receive) -> Receive:
    """A `receive` that first returns this body, and then the client's further messages."""
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
    """A `receive` that never returns a message."""
    await asyncio.Event().wait()
    raise AssertionError


async def ask(
    app: App, scope: Scope, path: str, method: str = "POST", body: bytes = b"", receive: Receive | None = None
) -> Answer:
    """The app's response to a further request with the same client's credentials.

    Args:
        receive: the client's `receive`, after its own request was read, so that the app notices when the client
            disconnects; None: the app gets no further message.
    """
    status, headers, parts = 500, list[tuple[bytes, bytes]](), []

    async def send(message: Message) -> None:
        nonlocal status, headers
        if message["type"] == "http.response.start":
            status, headers = message["status"], list(message.get("headers", ()))
        elif message["type"] == "http.response.body":
            parts.append(message.get("body", b""))

    await run(app, asking(scope, path, method, body), sending(body, receive or _silence), send)
    return Answer(status, headers, b"".join(parts))


async def run(app: App, scope: Scope, receive: Receive, send: Send) -> None:
    """Runs an app for one request. If this is cancelled, the app is told that its client has left: vLLM goes on with a
    request whose task is merely cancelled."""
    left, streams = asyncio.Event(), False

    async def receive_until() -> Message:
        coming = [asyncio.ensure_future(receive()), asyncio.ensure_future(left.wait())]
        try:
            await asyncio.wait(coming, return_when=asyncio.FIRST_COMPLETED)
            found = coming[0]
            return found.result() if found.done() else {"type": "http.disconnect"}  # type: ignore[return-value]
        finally:
            for one in coming:
                one.cancel()

    async def send_until(message: Message) -> None:
        nonlocal streams
        streams = streams or bool(message.get("more_body"))
        if not left.is_set():
            await send(message)
        elif streams:
            raise OSError("the client has left")

    running = asyncio.ensure_future(app(scope, receive_until, send_until))
    try:
        await asyncio.shield(running)
    except asyncio.CancelledError:
        left.set()
        if streams:  # nobody may ask whether the client has left
            running.cancel()
        await asyncio.wait((running,))
        if not running.cancelled():
            running.exception()  # nobody is left to tell
        raise


async def together(coroutines: Iterable[Coroutine[Any, Any, _T]]) -> list[_T]:
    """Runs coroutines at the same time. If one fails, the others are cancelled, and its error is raised once they have
    ended."""
    tasks = [asyncio.ensure_future(one) for one in coroutines]
    try:
        return list(await asyncio.gather(*tasks))
    finally:
        for task in tasks:
            task.cancel()
        await asyncio.gather(*tasks, return_exceptions=True)
