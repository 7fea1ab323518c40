"""A small app behind the server's guards, for tests of how guards and log treat requests."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator
from typing import Any

import httpx
from fastapi import FastAPI, Request
from starlette.responses import HTMLResponse, Response, StreamingResponse

from logo.serving.error_handlers import install

KEYS = ("key-one", "key-two")
LIMIT = 10_000


class App(FastAPI):
    """Counts events that are hard to observe from outside: disconnections, and bytes that were read."""

    hung_up = 0
    bytes_read = 0


def make() -> App:
    app = App()
    install(app)

    @app.get("/")
    @app.get("/page/app.js")
    async def page() -> Response:
        return HTMLResponse("<p>page</p>")

    @app.get("/health")
    @app.get("/metrics")
    @app.get("/v1/models")
    @app.get("/page/../v1/models")
    async def fine(request: Request) -> dict[str, str]:
        return {"id": request.state.request_id}

    @app.post("/v1/echo")
    async def echo(request: Request, body: dict[str, Any]) -> dict[str, Any]:
        request.state.model = "logo\nFAKE LINE"
        request.state.prompt_tokens, request.state.completion_tokens = 3, 4
        return body

    @app.post("/v1/read")
    async def read(request: Request) -> int:
        async for piece in request.stream():
            app.bytes_read += len(piece)
        return app.bytes_read

    @app.post("/v1/ignore")
    async def ignore() -> str:
        return "fine"

    @app.get("/v1/stream")
    async def stream(count: int = 3) -> StreamingResponse:
        async def pieces() -> AsyncIterator[bytes]:
            try:
                for i in range(count):
                    yield b"data: %d\n\n" % i
                    await asyncio.sleep(0.001)
            except asyncio.CancelledError:
                app.hung_up += 1
                raise

        return StreamingResponse(pieces(), media_type="text/event-stream")

    @app.get("/v1/crash")
    async def crash() -> None:
        raise RuntimeError("secret")

    return app


def error(answer: httpx.Response, status: int) -> str:
    assert answer.status_code == status, answer.text
    body = answer.json()["error"]
    assert body.keys() == {"message", "type", "param", "code"}
    assert answer.headers["x-request-id"] and answer.headers["x-content-type-options"] == "nosniff"
    return str(body["message"])
