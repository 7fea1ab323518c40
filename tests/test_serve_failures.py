"""Answers that do not end: they are counted by reason, and nothing is held for them."""

from __future__ import annotations

import asyncio
import gc
import json
import re
import socket
import threading
from collections.abc import AsyncGenerator
from typing import Any

import httpx
import pytest

from http_server import eventually, serving
from logo.errors import CacheFull, UsageError
from logo.protocol import Delta, GenerationFailed, GenerationTimeout, MixtureRequest
from logo.serving import sending
from logo.serving.app import AppSettings, create_app
from test_serving_any_engine import Scripted, asked
from tolerances import PATIENCE


def failures(text: str) -> dict[str, float]:
    """Reason -> the number of answers that `/metrics` counts."""
    found = re.findall(r'^logo:request_failure_total{reason="(.+)"} (.+)$', text, re.M)
    return {reason: float(count) for reason, count in found}


def test_who_leaves_before_the_selection_is_counted_and_no_trouble(caplog: pytest.LogCaptureFixture) -> None:
    engine = Scripted()
    waiting = threading.Event()

    async def choose(prompt: Any, wanted: MixtureRequest) -> Any:
        waiting.set()
        await asyncio.sleep(PATIENCE)

    engine.choose = choose  # type: ignore[method-assign]
    with serving(create_app(engine, AppSettings("base"))) as url:
        for stream in (True, False):
            body = json.dumps({"model": "logo", "prompt": ["x", "y"], "n": 2, "stream": stream}).encode()
            host, port = url.removeprefix("http://").split(":")
            with socket.create_connection((host, int(port))) as line:
                head = f"POST /v1/completions HTTP/1.1\r\nHost: {host}\r\nContent-Type: application/json\r\n"
                line.sendall(f"{head}Content-Length: {len(body)}\r\n\r\n".encode() + body)
                assert waiting.wait(PATIENCE)
            waiting.clear()
        eventually(lambda: failures(httpx.get(f"{url}/metrics").text) == {"left": 8})
        gc.collect()
    assert not [record for record in caplog.records if record.name == "asyncio"]


@pytest.mark.parametrize(
    ("error", "status", "reason"),
    [(GenerationTimeout(), 504, "timeout"), (GenerationFailed(), 500, "error")],
)
def test_answers_of_a_request_that_fails_count_under_its_reason(error: Exception, status: int, reason: str) -> None:
    """Also those that were ended because of another one's failure; the one that was complete has succeeded."""

    async def use(client: httpx.AsyncClient, engine: Scripted) -> None:
        answered, numbers, complete = engine.generate, iter(range(9)), asyncio.Event()

        async def generate(*arguments: Any) -> AsyncGenerator[Delta, None]:
            number = next(numbers)
            if number == 0:
                try:
                    async for delta in answered(*arguments):
                        yield delta
                finally:
                    complete.set()
            else:
                yield Delta((1,), None)
                await (complete.wait() if number == 1 else asyncio.sleep(PATIENCE))
                raise error

        engine.generate = generate  # type: ignore[method-assign]
        body = {"model": "logo", "prompt": [5, 6], "n": 4, "max_tokens": 3}
        assert (await client.post("/v1/completions", json=body)).status_code == status
        text = (await client.get("/metrics")).text
        assert failures(text) == {reason: 3}
        assert 'logo:request_success_total{finished_reason="length"} 1.0' in text

    asked(use)


@pytest.mark.parametrize(
    ("error", "status", "counted"),
    [(CacheFull("full"), 503, {"error": 4}), (UsageError("no such adapter"), 400, {}), (None, 504, {"timeout": 4})],
)
def test_answers_whose_mixture_fails_are_counted(error: Exception | None, status: int, counted: Any) -> None:
    """None: the selection takes too long. A client's own mistake is no failure."""

    async def use(client: httpx.AsyncClient, engine: Scripted) -> None:
        async def choose(prompt: Any, wanted: MixtureRequest) -> Any:
            if error is not None:
                raise error
            await asyncio.sleep(PATIENCE)

        engine.choose = choose  # type: ignore[method-assign]
        body = {"model": "logo", "prompt": ["x", "y"], "n": 2}
        assert (await client.post("/v1/completions", json=body)).status_code == status
        assert failures((await client.get("/metrics")).text) == counted

    asked(use, request_timeout=PATIENCE if error else 0.05)


def test_a_client_that_does_not_read_holds_nothing_beyond_the_time_limit(monkeypatch: pytest.MonkeyPatch) -> None:
    """Its socket is full, so that no more can be sent, and it does not disconnect."""
    monkeypatch.setattr(sending, "GRACE", 0.05)
    sent: list[Any] = []

    async def use(client: httpx.AsyncClient, engine: Scripted) -> None:
        app: Any = client._transport.app  # type: ignore[attr-defined]
        body = json.dumps({"model": "logo", "prompt": [5] * 50, "max_tokens": 40, "stream": True}).encode()
        received = iter([{"type": "http.request", "body": body}])

        async def receive() -> Any:
            return next(received, None) or await asyncio.sleep(PATIENCE)

        async def send(message: Any) -> None:
            sent.append(message)
            if len(sent) > 4:
                await asyncio.sleep(PATIENCE)

        headers = [(b"content-type", b"application/json")]
        scope = {"type": "http", "method": "POST", "path": "/v1/completions", "query_string": b"", "headers": headers}
        await app(scope, receive, send)
        assert len(sent) == 5 and sent[-1]["more_body"]
        assert engine.released == ["a"]
        assert failures((await client.get("/metrics")).text) == {"timeout": 1}

    asked(use, request_timeout=2.0)
