"""Sends answers, whole or as server-sent events, and ends them when the client disconnects."""

from __future__ import annotations

import asyncio
import logging
from collections.abc import AsyncGenerator, Coroutine
from contextlib import ExitStack, aclosing
from typing import Any, TypeVar

from starlette.datastructures import State
from starlette.requests import Request
from starlette.responses import Response, StreamingResponse
from starlette.types import Receive, Scope, Send

from logo.api.errors import client_left
from logo.serving.answers import Answers, PreparedRequest
from logo.serving.error_handlers import api_error
from logo.serving.logs import request_id
from logo.serving.openai import DONE, event
from logo.serving.rendering import Collected, Rendering

_T = TypeVar("_T")
_log = logging.getLogger("logo.serving")

GRACE = 5.0
"""Seconds that a client has, after the time limit of its request, to read what was generated."""


async def unless_left(request: Request, work: Coroutine[Any, Any, _T]) -> _T:
    """Runs `work`, and cancels it if the client disconnects meanwhile.

    Raises:
        ApiError: the client has disconnected.
    """
    working = asyncio.ensure_future(work)
    leaving = asyncio.ensure_future(_left(request))
    try:
        await asyncio.wait({working, leaving}, return_when=asyncio.FIRST_COMPLETED)
        if working.done():
            return working.result()
        raise client_left()
    finally:
        for task in (working, leaving):
            task.cancel()
        await asyncio.gather(working, leaving, return_exceptions=True)


async def _left(request: Request) -> None:
    while (await request.receive())["type"] != "http.disconnect":
        pass


async def whole(answers: Answers, request: PreparedRequest, rendering: Rendering, state: State) -> Response:
    """Sends the answer of a request that is not streamed; `state` is the request's, for the log."""
    collected = [Collected() for _ in range(len(request.prompts) * request.n)]
    async with aclosing(answers.chunks(request)) as chunks:
        async for chunk in chunks:
            collected[chunk.index].add(chunk)
    state.completion_tokens = sum(len(answer.tokens) for answer in collected)
    reply = rendering.whole(collected, request)
    return Response(reply.model_dump_json(), media_type="application/json")


class Streamed(StreamingResponse):
    """Sends the answer as events; everything that the request holds is released when it ends in any way.

    It also ends if the client does not read it, `GRACE` seconds after the time limit.
    """

    def __init__(
        self, answers: Answers, request: PreparedRequest, rendering: Rendering, state: State, held: ExitStack
    ) -> None:
        self._events = _events(answers, request, rendering, state)
        self._held = held
        left = answers.left(request.began)
        self._limit = None if left is None else left + GRACE
        super().__init__(self._events, media_type="text/event-stream", headers={"Cache-Control": "no-cache"})

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Sends the events."""
        with self._held:
            async with aclosing(self._events):
                try:
                    await asyncio.wait_for(super().__call__(scope, receive, send), self._limit)
                except asyncio.TimeoutError:
                    _log.warning("a stream was ended, since its client does not read it")


async def _events(
    answers: Answers, request: PreparedRequest, rendering: Rendering, state: State
) -> AsyncGenerator[bytes, None]:
    tokens, options = 0, rendering.options
    yield event(rendering.first(request))
    try:
        async with aclosing(answers.chunks(request)) as chunks:
            async for chunk in chunks:
                state.completion_tokens = tokens = tokens + len(chunk.tokens)
                if chunk.text or chunk.finish_reason or options.token_ids:
                    yield event(rendering.chunk(chunk))
    except Exception as error:  # the status was sent already, so the error is an event
        _log.warning("a stream failed: %s", error, exc_info=error)
        yield api_error(error, request_id.get()).event()
    else:
        if options.usage:
            yield event(rendering.last(request, tokens))
    yield DONE
