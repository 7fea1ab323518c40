"""A server on the loopback whose answers, valid or broken, the prompt chooses, for tests of the load generator.

    async with OddServer() as server:
        await send(server.endpoint.client(), "logo", 0, Ask("cut", 4, stream=True))

Bare sockets, so that it can also break what a web framework would not let it break.
"""

from __future__ import annotations

import asyncio
import contextlib
import json
from collections.abc import Callable
from typing import Any

from logo.bench.load import Endpoint

USAGE = {"prompt_tokens": 3, "completion_tokens": 4, "total_tokens": 7}
LOGO = {"adapters": ["b", "a"], "weights": [0.75, 0.25], "probe_ms": 1.0, "queue_ms": 0.0}
TOKENS = [5, 6, 7, 8]


def whole(**changes: Any) -> dict[str, Any]:
    """An answer of four tokens; `changes` go into its choice."""
    choice = {"index": 0, "text": "abcd", "token_ids": TOKENS, "finish_reason": "length", **changes}
    return {"choices": [choice], "usage": USAGE, "logo": LOGO}


def piece(tokens: list[int], finish: str | None = None, **more: Any) -> str:
    """One event of a stream."""
    choice = {"index": 0, "text": "x" * len(tokens), "token_ids": tokens, "finish_reason": finish}
    return f"data: {json.dumps({'choices': [choice], **more})}\n\n"


FIRST = piece([], logo=LOGO)
STREAM = [FIRST, piece([5]), piece([6, 7, 8], "length"), f"data: {json.dumps({'choices': [], 'usage': USAGE})}\n\n"]


class OddServer:
    """Attributes:
    requests: bodies, in the order in which they came, with the path as `path`.
    most: most requests at once.
    together: nothing is answered before so many requests were there at once.
    left: set when a client closes its connection before its answer is over.
    kv_blocks: what the metrics say, one value per question (the last one stays).
    """

    def __init__(self) -> None:
        self.requests: list[dict[str, Any]] = []
        self.keys: list[str | None] = []
        self.most = 0
        self.together = 1
        self._met = asyncio.Event()
        self.left = asyncio.Event()
        self.kv_blocks = [0]
        self._now = 0
        self._connections: set[asyncio.Task[None]] = set()

    @property
    def endpoint(self) -> Endpoint:
        return Endpoint(f"http://127.0.0.1:{self._server.sockets[0].getsockname()[1]}", "key")

    async def __aenter__(self) -> OddServer:
        self._server = await asyncio.start_server(self._connected, "127.0.0.1", 0)
        return self

    async def __aexit__(self, *_: object) -> None:
        self._server.close()
        await asyncio.gather(*self._connections)  # their clients are gone

    async def _connected(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        own = asyncio.current_task()
        assert own is not None
        self._connections.add(own)
        own.add_done_callback(self._connections.discard)
        with contextlib.suppress(ConnectionError, asyncio.IncompleteReadError):
            while await self._one(reader, writer):
                pass
        writer.close()
        with contextlib.suppress(ConnectionError):
            await writer.wait_closed()

    async def _one(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> bool:
        """Answers one request; whether the connection stays."""
        head = (await reader.readuntil(b"\r\n\r\n")).decode()
        path = head.split(" ")[1]
        headers = dict(line.lower().split(": ", 1) for line in head.splitlines()[1:] if ": " in line)
        body = await reader.readexactly(int(headers.get("content-length", 0)))
        self.keys.append(headers.get("authorization"))
        if path == "/metrics":
            blocks = self.kv_blocks.pop(0) if len(self.kv_blocks) > 1 else self.kv_blocks[0]
            text = f"logo:kv_blocks_used {blocks}\nlogo:num_requests_running 0.0\nprocess_resident_memory_bytes 5e+07\n"
            return self._say(writer, 200, text)
        request = json.loads(body)
        self.requests.append({"path": path, **request})
        if path != "/v1/completions":
            refused = request["lora_name"] == "refused"
            return self._say(writer, 400 if refused else 200, '{"error": {"message": "no"}}' if refused else "Success")
        self._now += 1
        self.most = max(self.most, self._now)
        if self.most >= self.together:
            self._met.set()
        await self._met.wait()
        try:
            return await self._complete(request, reader, writer)
        finally:
            self._now -= 1

    async def _complete(self, request: dict[str, Any], reader: asyncio.StreamReader, writer: Any) -> bool:
        say: Callable[[int, str], bool] = lambda status, text: self._say(writer, status, text)  # noqa: E731
        match request["prompt"], bool(request.get("stream")):
            case "ok", False:
                await asyncio.sleep(0.01)
                return say(200, json.dumps(whole()))
            case "ok", True:
                return await self._stream(writer, [*STREAM, ": a comment\n\n", "data: [DONE]\n\n"])
            case "full", _:
                return say(429, '{"error": {"message": "the queue is full"}}')
            case "broken", _:
                return say(500, "<h1>Internal\nerror</h1>")
            case "junk", False:
                return say(200, "<html>")
            case "no choices", False:
                return say(200, "{}")
            case "endless", False:
                return say(200, json.dumps(whole(finish_reason=None)))
            case "miscounted", False:
                return say(200, json.dumps(whole(token_ids=[5])))
            case "cut", True:
                return await self._stream(writer, STREAM[:2])
            case "failing", True:
                return await self._stream(writer, [FIRST, 'data: {"error": {"message": "out of memory"}}\n\n'])
            case "short", False:  # promises more than comes
                writer.write(b"HTTP/1.1 200 OK\r\nContent-Length: 100\r\n\r\n{")
                return False
            case "stuck", False:
                await self._until_left(reader)
            case "stuck", True:
                writer.write(b"HTTP/1.1 200 OK\r\nContent-Type: text/event-stream\r\n\r\n" + FIRST.encode())
                for token in range(3):
                    writer.write(piece([token]).encode())
                    await writer.drain()
                await self._until_left(reader)
            case prompt:
                raise AssertionError(prompt)
        return False

    async def _until_left(self, reader: asyncio.StreamReader) -> None:
        assert await reader.read() == b""
        self.left.set()

    async def _stream(self, writer: asyncio.StreamWriter, events: list[str]) -> bool:
        writer.write(b"HTTP/1.1 200 OK\r\nContent-Type: text/event-stream\r\nTransfer-Encoding: chunked\r\n\r\n")
        for event in events:
            data = event.encode()
            writer.write(f"{len(data):x}\r\n".encode() + data + b"\r\n")
            await writer.drain()
            await asyncio.sleep(0.01)
        writer.write(b"0\r\n\r\n")
        return True

    def _say(self, writer: asyncio.StreamWriter, status: int, text: str) -> bool:
        data = text.encode()
        writer.write(f"HTTP/1.1 {status} X\r\nContent-Length: {len(data)}\r\n\r\n".encode() + data)
        return True
