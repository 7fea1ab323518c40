"""Changes the responses of vLLM's app on their way to the client."""

from __future__ import annotations

import json
from collections.abc import Awaitable, Callable
from typing import Any

from logo.backends.vllm.asgi import Message, Send, answer_error
from logo.serve.errors import ApiError


class Rewriting:
    """A `send` that changes the JSON objects of a response: of a whole one, or of each event of a stream.

    Args:
        send: where the response goes.
        change: changes one object in place; gets whether it is the first.
        check: awaited before the end of a response; an error that it returns replaces a whole response, and
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
        elif self._streams:
            await self._pass_on(message.get("body", b""), more=bool(message.get("more_body")))
        else:
            self._rest += message.get("body", b"")
            if not message.get("more_body"):
                await self._answer()

    async def _pass_on(self, data: bytes, *, more: bool) -> None:
        *lines, self._rest = (self._rest + data).split(b"\n")
        if not more and self._rest:
            lines, self._rest = [*lines, self._rest], b""
        if any(line.startswith(b"data: [DONE]") for line in lines) and (error := await self._checked()):
            lines = [line for line in lines if not line.startswith(b"data: [DONE]")]
            lines = [*lines, *error.event().split(b"\n"), b"data: [DONE]", b""]
        elif not more and (error := await self._checked()):  # a stream that ends without [DONE]
            lines = [*lines, b"", *error.event().split(b"\n")]
        body = b"".join(self._event(line) + b"\n" for line in lines)
        await self._send({"type": "http.response.body", "body": body, "more_body": more})

    async def _answer(self) -> None:
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
