"""One request with several prompts. Each prompt is sent to vLLM as its own request, because each has its own mixture,
and the answers or streams are joined into one response. If a prompt fails, the others are aborted.
"""

from __future__ import annotations

import asyncio
import json
from collections.abc import Callable, Coroutine, Sequence
from typing import Any

from logo.backends.vllm.asgi import Answer, Message, Send, answer, answer_error, together
from logo.errors import LoGoError
from logo.serve.errors import ApiError

# Runs one of the requests, and sends its response to the given `send`.
Run = Callable[[Send], Coroutine[Any, Any, None]]


class Refused(Exception):
    """vLLM's response to a prompt is no answer.

    Attributes:
        answer: the response.
    """

    def __init__(self, answer: Answer) -> None:
        super().__init__()
        self.answer = answer


async def merged(send: Send, run: Sequence[Run], fields: Sequence[Any], n: int) -> None:
    """Runs the requests of all prompts and sends one response with all answers.

    Args:
        run: the requests, one per prompt.
        fields: the field `logo` of each response.
        n: answers per prompt.

    Raises:
        Refused: a prompt has no answer.
    """
    replies = await together(map(_reply, run))
    choices = [
        {**choice, "index": prompt * n + choice.get("index", 0)}
        for prompt, reply in enumerate(replies)
        for choice in reply["choices"]
    ]
    reply = {**replies[0], "choices": choices, "logo": list(fields)}
    if replies[0].get("usage"):
        reply["usage"] = _sum([reply.get("usage") or {} for reply in replies])
    await answer(send, 200, json.dumps(reply, ensure_ascii=False).encode())


async def merged_stream(send: Send, run: Sequence[Run], fields: Sequence[Any], n: int) -> None:
    """Runs the requests of all prompts and sends their events as one stream, as they come; indices as in `merged`.

    Raises:
        Refused: a prompt has no answer, and nothing was sent yet. Later errors end the stream.
    """
    events: asyncio.Queue[tuple[int, Message]] = asyncio.Queue()

    async def one(number: int, request: Run) -> None:
        async def sink(message: Message) -> None:
            await events.put((number, message))

        try:
            await request(sink)
        except (ApiError, LoGoError) as error:
            await answer_error(sink, ApiError.of(error))

    running = asyncio.ensure_future(together(one(number, request) for number, request in enumerate(run)))
    joined = _Joined(send, fields, n)
    try:
        while not (running.done() and events.empty()):
            coming = asyncio.ensure_future(events.get())
            await asyncio.wait((coming, running), return_when=asyncio.FIRST_COMPLETED)
            if not coming.done():
                coming.cancel()
            elif not await joined.take(*coming.result()):
                return
        running.result()
        await joined.end()
    finally:
        running.cancel()
        await asyncio.gather(running, return_exceptions=True)


class _Joined:
    """The stream that is made of those of all prompts."""

    def __init__(self, send: Send, fields: Sequence[Any], n: int) -> None:
        self._send, self._fields, self._n = send, fields, n
        self._began, self._first, self._identity = False, True, None
        self._starts: dict[int, Message] = {}
        self._rest: dict[int, bytes] = {}
        self._usages: list[Any] = []
        self._last: dict[str, Any] = {}

    async def take(self, number: int, message: Message) -> bool:
        """Takes a message of one prompt's response. Returns whether the stream goes on.

        Raises:
            Refused: it is an error, and nothing was sent yet.
        """
        if message["type"] == "http.response.start":
            self._starts[number] = message
            if message["status"] == 200 and not self._began:
                self._began = True
                await self._send(message)
            return True
        data = self._rest.pop(number, b"") + message.get("body", b"")
        start = self._starts[number]
        if start["status"] != 200:
            if message.get("more_body"):
                self._rest[number] = data
                return True
            if not self._began:
                raise Refused(Answer(start["status"], list(start["headers"]), data))
            await self._line(data.replace(b"\n", b" "))
            await self._done()
            return False
        *lines, self._rest[number] = data.split(b"\n")
        for line in lines:
            if line.startswith(b"data: {") and not await self._event(number, json.loads(line[6:])):
                await self._done()
                return False
        return True

    async def end(self) -> None:
        """Ends the stream, after the usage of all prompts."""
        if self._usages:
            await self._line(_json({**self._last, "usage": _sum(self._usages)}))
        await self._done()

    async def _event(self, number: int, found: dict[str, Any]) -> bool:
        if found.get("error") is not None:
            await self._line(_json(found))
            return False
        self._identity = self._identity or found.get("id")
        found["id"] = self._identity
        found.pop("logo", None)
        if self._first:
            found["logo"], self._first = list(self._fields), False
        if found.get("usage") and not found.get("choices"):
            self._usages.append(found["usage"])
            self._last = found
            return True
        for choice in found.get("choices", ()):
            choice["index"] = number * self._n + choice.get("index", 0)
        await self._line(_json(found))
        return True

    async def _line(self, data: bytes) -> None:
        await self._send({"type": "http.response.body", "body": b"data: " + data + b"\n\n", "more_body": True})

    async def _done(self) -> None:
        await self._send({"type": "http.response.body", "body": b"data: [DONE]\n\n", "more_body": False})


async def _reply(request: Run) -> Any:
    """Runs a request and returns the object of its response; raises Refused if it is none."""
    start: Message = {"status": 500, "headers": []}
    parts: list[bytes] = []

    async def keep(message: Message) -> None:
        nonlocal start
        if message["type"] == "http.response.start":
            start = message
        elif message["type"] == "http.response.body":
            parts.append(message.get("body", b""))

    await request(keep)
    found = Answer(start["status"], list(start["headers"]), b"".join(parts))
    if found.status != 200:
        raise Refused(found)
    return found.json()


def _json(found: Any) -> bytes:
    return json.dumps(found, ensure_ascii=False, separators=(",", ":")).encode()


def _sum(usages: Sequence[Any]) -> Any:
    """The sums of all numbers in usages, also in their details."""
    given = [usage for usage in usages if usage is not None]
    if not given or not isinstance(given[0], dict):
        return sum(given) if given else None
    return {name: _sum([usage.get(name) for usage in given]) for name in given[0]}
