"""Changes the responses of vLLM's app on their way to the client, or ends them early."""

from __future__ import annotations

import asyncio
import json
from collections.abc import Awaitable, Callable
from typing import Any

from logo.api.asgi import App, Message, Receive, Scope, Send, answer_error
from logo.api.errors import ApiError


class Rewriting:
    """A `send` that changes the JSON objects of a response: of a whole one, or of each event of a stream.

    Args:
        send: where the response goes.
        change: changes one object in place; gets whether it is the first.
        check: awaited before the end of a response; an error that it returns replaces a whole response, and
            ends a stream.
        spoilt: once this is set, only the end of a stream is still sent.
    """

    def __init__(
        self,
        send: Send,
        change: Callable[[dict[str, Any], bool], None],
        check: Callable[[], Awaitable[ApiError | None]] | None = None,
        spoilt: asyncio.Event | None = None,
    ) -> None:
        self._send, self._change, self._check, self._spoilt = send, change, check, spoilt
        self._start: Message | None = None
        self.streams = False
        self._rest = b""
        self._first = True
        self._ended = False

    async def __call__(self, message: Message) -> None:
        if message["type"] == "http.response.start":
            kinds = [value for name, value in message.get("headers", ()) if name.lower() == b"content-type"]
            self.streams = any(kind.startswith(b"text/event-stream") for kind in kinds)
            self._start = message
            if self.streams:
                await self._send(message)
            return
        if message["type"] != "http.response.body":
            await self._send(message)
        elif self.streams:
            await self._pass_on(message.get("body", b""), more=bool(message.get("more_body")))
        else:
            self._rest += message.get("body", b"")
            if not message.get("more_body"):
                await self._answer()

    async def end(self) -> None:
        """Completes a response that the app did not finish, with the error that `check` returns."""
        if self._ended:
            return
        self._ended, error = True, await self._checked()
        if self.streams:  # without an error if `check` finds none
            body = b"" if error is None else error.event() + b"data: [DONE]\n\n"
            await self._send({"type": "http.response.body", "body": body})
        elif error is not None:
            await answer_error(self._send, error)

    async def _pass_on(self, data: bytes, *, more: bool) -> None:
        if self._spoilt is not None and self._spoilt.is_set():
            if not more:
                await self.end()
            return
        *lines, self._rest = (self._rest + data).split(b"\n")
        if not more and self._rest:
            lines, self._rest = [*lines, self._rest], b""
        if any(line.startswith(b"data: [DONE]") for line in lines) and (error := await self._checked()):
            lines = [line for line in lines if not line.startswith(b"data: [DONE]")]
            lines = [*lines, *error.event().split(b"\n"), b"data: [DONE]", b""]
        elif not more and (error := await self._checked()):  # a stream that ends without [DONE]
            lines = [*lines, b"", *error.event().split(b"\n")]
        body = b"".join(self._event(line) + b"\n" for line in lines)
        self._ended = not more
        await self._send({"type": "http.response.body", "body": body, "more_body": more})

    async def _answer(self) -> None:
        assert self._start is not None
        spoilt = self._spoilt is not None and self._spoilt.is_set()
        self._ended = True
        if (spoilt or self._start["status"] == 200) and (error := await self._checked()):
            await answer_error(self._send, error)
            return
        body = self._changed(self._rest)
        headers = [(k, v) for k, v in self._start.get("headers", ()) if k.lower() != b"content-length"]
        headers.append((b"content-length", str(len(body)).encode()))
        await self._send({**self._start, "headers": headers})
        await self._send({"type": "http.response.body", "body": body})

    async def _checked(self) -> ApiError | None:
        if self._check is None:
            return None
        error = await self._check()
        self._check = None  # only now: if the app is cancelled during `check`, `end` has to call it again
        return error

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


async def run(app: App, scope: Scope, receive: Receive, send: Rewriting, spoilt: asyncio.Event) -> None:
    """Runs an app for one request. Once `spoilt` is set, the app is told that its client has disconnected."""
    answering = asyncio.create_task(_call(app, scope, _leaving(receive, spoilt), send))
    waiting = asyncio.create_task(spoilt.wait())
    try:
        await asyncio.wait((answering, waiting), return_when=asyncio.FIRST_COMPLETED)
        if spoilt.is_set() and send.streams:  # a streaming app may never check for it
            answering.cancel()
        await asyncio.wait((answering,))
        if not answering.cancelled():
            answering.result()  # raises what the app has raised
    finally:
        answering.cancel()
        waiting.cancel()
    if spoilt.is_set():
        await send.end()


async def _call(app: App, scope: Scope, receive: Receive, send: Send) -> None:
    await app(scope, receive, send)


def _leaving(receive: Receive, spoilt: asyncio.Event) -> Receive:
    """A `receive` that reports a disconnected client once `spoilt` is set."""

    async def either() -> Message:
        coming = [asyncio.ensure_future(receive()), asyncio.ensure_future(spoilt.wait())]
        try:
            await asyncio.wait(coming, return_when=asyncio.FIRST_COMPLETED)
            found = coming[0]
            return found.result() if found.done() else {"type": "http.disconnect"}  # type: ignore[return-value]
        finally:
            for one in coming:
                one.cancel()

    return either
