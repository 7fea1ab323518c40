"""Sends answers, whole or as server-sent events, and ends them at once when the client disconnects."""

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
from logo.serving.answers import Answers, Asked
from logo.serving.errors import api_error
from logo.serving.logs import request_id
from logo.serving.rendering import Collected, Rendering
from logo.serving.replies import DONE, event

_T = TypeVar("_T")
_log = logging.getLogger("logo.serving")


async def unless_left(request: Request, work: Coroutine[Any, Any, _T]) -> _T:
    """What `work` returns; it is cancelled if the client hangs up meanwhile.

    Raises:
        ApiError: that is what happened.
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


async def whole(answers: Answers, asked: Asked, rendering: Rendering, state: State) -> Response:
    """The answer of a request that is not streamed; `state` is the request's, for the log."""
    collected = [Collected() for _ in range(len(asked.prompts) * asked.n)]
    async with aclosing(answers.pieces(asked)) as pieces:
        async for piece in pieces:
            collected[piece.index].add(piece)
    state.completion_tokens = sum(len(answer.tokens) for answer in collected)
    reply = rendering.whole(collected, asked)
    return Response(reply.model_dump_json(), media_type="application/json")


class Streamed(StreamingResponse):
    """The answer as events. The resources of the request are released when it ends, in every case."""

    def __init__(self, answers: Answers, asked: Asked, rendering: Rendering, state: State, held: ExitStack) -> None:
        self._events = _events(answers, asked, rendering, state)
        self._held = held
        super().__init__(self._events, media_type="text/event-stream", headers={"Cache-Control": "no-cache"})

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Sends the events."""
        with self._held:
            async with aclosing(self._events):
                await super().__call__(scope, receive, send)


async def _events(answers: Answers, asked: Asked, rendering: Rendering, state: State) -> AsyncGenerator[bytes, None]:
    tokens, options = 0, rendering.options
    yield event(rendering.first(asked))
    try:
        async with aclosing(answers.pieces(asked)) as pieces:
            async for piece in pieces:
                state.completion_tokens = tokens = tokens + len(piece.tokens)
                if piece.text or piece.finish_reason or options.token_ids or options.logprobs:
                    yield event(rendering.chunk(piece))
    except Exception as error:  # the status is sent already: the client learns of it in an event
        _log.warning("a stream failed: %s", error, exc_info=error)
        yield api_error(error, request_id.get()).event()
    else:
        if options.usage:
            yield event(rendering.last(asked, tokens))
    yield DONE
