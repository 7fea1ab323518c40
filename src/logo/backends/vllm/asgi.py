"""ASGI helpers: reading the body of a request, and sending a further request to an app."""

from __future__ import annotations

import asyncio
import json
from dataclasses import dataclass
from typing import Any

from logo.api.asgi import App, Message, Receive, Scope


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

    await app(asking(scope, path, method, body), sending(body, receive or _silence), send)
    return Answer(status, headers, b"".join(parts))
