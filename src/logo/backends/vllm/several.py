"""One request with several prompts. Each prompt is sent to vLLM as its own request, because each has its own mixture,
and the answers or streams are joined into one response.
"""

from __future__ import annotations

import asyncio
import json
from collections.abc import Awaitable, Callable, Sequence
from typing import Any

from logo.api.asgi import Message, Send, answer, answer_error
from logo.api.errors import ApiError
from logo.backends.vllm.asgi import Answer
from logo.errors import LoGoError

# Runs one of the requests, and sends its response to the given `send`.
Run = Callable[[Send], Awaitable[None]]


async def merged(send: Send, run: Sequence[Run], fields: Sequence[Any], n: int) -> None:
    """Runs the requests of all prompts and sends one response with all answers, or the first error alone.

    Args:
        run: the requests, one per prompt.
        fields: the field `logo` of each response.
        n: answers per prompt.
    """
    answers = await asyncio.gather(*map(_kept, run))
    for found in answers:
        if found.status != 200:
            await answer(send, found.status, found.body, found.headers)
            return
    replies = [found.json() for found in answers]
    choices = [
        {**choice, "index": prompt * n + choice.get("index", 0)}
        for prompt, reply in enumerate(replies)
        for choice in reply["choices"]
    ]
    usages = [reply.get("usage") or {} for reply in replies]
    reply = {**replies[0], "choices": choices, "logo": list(fields)}
    if replies[0].get("usage"):
        reply["usage"] = _sum(usages)
    await answer(send, 200, json.dumps(reply, ensure_ascii=False).encode())


async def merged_stream(send: Send, run: Sequence[Run], fields: Sequence[Any], n: int) -> None:
    """Runs the requests of all prompts and sends their events as one stream, as they come; indices as in `merged`."""
    events: asyncio.Queue[tuple[int, Message | None]] = asyncio.Queue()

    async def one(number: int, request: Run) -> None:
        async def sink(message: Message) -> None:
            await events.put((number, message))

        try:
            await request(sink)
        except (ApiError, LoGoError) as error:
            await answer_error(sink, ApiError.of(error))
        finally:
            await events.put((number, None))

    tasks = [asyncio.create_task(one(number, request)) for number, request in enumerate(run)]
    try:
        await _forwarded(send, events, len(tasks), fields, n)
        await asyncio.gather(*tasks)
    finally:
        for task in tasks:
            task.cancel()


async def _forwarded(send: Send, events: asyncio.Queue[Any], count: int, fields: Sequence[Any], n: int) -> None:
    """Forwards events until all requests have ended. The error of a refused request becomes an event; if all requests
    are refused, the first error is the whole response."""
    left, began, first, identity = count, False, True, None
    starts: list[Message] = [{} for _ in range(count)]
    rest, refused, usages, last = [b""] * count, list[Answer](), list[Any](), {}
    while left:
        number, message = await events.get()
        if message is None:
            left -= 1
            if starts[number].get("status", 200) != 200:
                refused.append(Answer(starts[number]["status"], list(starts[number]["headers"]), rest[number]))
                if began:
                    await _line(send, rest[number].replace(b"\n", b" "))
        elif message["type"] == "http.response.start":
            starts[number] = message
            if message["status"] == 200 and not began:
                began = True
                await send(message)
                for one in refused:
                    await _line(send, one.body.replace(b"\n", b" "))
        elif starts[number].get("status") != 200:
            rest[number] += message.get("body", b"")
        else:
            *lines, rest[number] = (rest[number] + message.get("body", b"")).split(b"\n")
            for line in lines:
                if not line.startswith(b"data: {"):
                    continue
                found = json.loads(line[6:])
                identity = identity or found.get("id")
                if "error" not in found:
                    found["id"] = identity
                    found.pop("logo", None)
                    if first:
                        found["logo"], first = list(fields), False
                if found.get("usage") and not found.get("choices"):
                    usages.append(found["usage"])
                    last = found
                    continue
                for choice in found.get("choices", ()):
                    choice["index"] = number * n + choice.get("index", 0)
                await _event(send, found)
    if not began:
        if refused:  # else the caller raises what a request has raised
            await answer(send, refused[0].status, refused[0].body, refused[0].headers)
        return
    if usages:
        await _event(send, {**last, "usage": _sum(usages)})
    await send({"type": "http.response.body", "body": b"data: [DONE]\n\n", "more_body": False})


async def _line(send: Send, data: bytes) -> None:
    await send({"type": "http.response.body", "body": b"data: " + data + b"\n\n", "more_body": True})


async def _event(send: Send, found: Any) -> None:
    await _line(send, json.dumps(found, ensure_ascii=False, separators=(",", ":")).encode())


async def _kept(request: Run) -> Answer:
    """Runs a request and returns its whole response."""
    start: Message = {"status": 500, "headers": []}
    parts: list[bytes] = []

    async def keep(message: Message) -> None:
        nonlocal start
        if message["type"] == "http.response.start":
            start = message
        elif message["type"] == "http.response.body":
            parts.append(message.get("body", b""))

    await request(keep)
    return Answer(start["status"], list(start["headers"]), b"".join(parts))


def _sum(usages: Sequence[Any]) -> dict[str, Any]:
    names = ("prompt_tokens", "completion_tokens", "total_tokens")
    return {**usages[0], **{name: sum(usage.get(name) or 0 for usage in usages) for name in names}}
