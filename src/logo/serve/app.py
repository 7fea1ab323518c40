"""The server's apps: one that answers, the same way for both endpoints, streamed or not, with its page; and one that
only selects.

body -> Call, with a mixture per prompt -> Chunk, Chunk, ... -> one of OpenAI's objects, or events
"""

from __future__ import annotations

import asyncio
import logging
import time
from collections.abc import AsyncGenerator, AsyncIterator, Sequence
from contextlib import ExitStack, aclosing, asynccontextmanager, nullcontext
from functools import partial
from pathlib import Path

from starlette.applications import Starlette
from starlette.requests import Request
from starlette.responses import FileResponse, JSONResponse, Response, StreamingResponse
from starlette.routing import Mount, Route
from starlette.staticfiles import StaticFiles
from starlette.types import Receive, Scope, Send

from logo.api import bodies
from logo.api.errors import plain
from logo.api.guards import PAGE_FILES
from logo.api.names import MixtureRequest, Patterns
from logo.api.shadow import Shadow
from logo.core import Prompt, Selection
from logo.engine import LoGo
from logo.serve.answering import Answering
from logo.serve.answers import Call
from logo.serve.entrance import Entrance
from logo.serve.reading import PromptReader
from logo.serve.routes import AppSettings, PoolRoutes, logged_of, posted
from logo.serve.sampling import Sampling
from logo.serve.selecting import Selecting
from logo.serve.service import Service

_log = logging.getLogger("logo.serve")

GRACE = 5.0  # seconds that a client has, after the time limit of its request, to read what was generated
_MOST_SELECTIONS = 512  # that may wait in a server that only selects
_FILES = Path(__file__).parent / "page"


def create_app(service: Service, settings: AppSettings) -> Starlette:
    """The app that answers, which starts and ends the service; `logo.api.layers.guard` is to be put around it."""

    @asynccontextmanager
    async def lifespan(app: Starlette) -> AsyncIterator[None]:
        service.batching.start()
        try:
            yield
        finally:
            await answers.close()
            await service.close()

    batching = service.batching
    reader = PromptReader(service.logo, batching.context, by_memory=batching.context == batching.kv_tokens[1])
    pool = PoolRoutes(service.selecting, service.entrance, reader, settings)
    answers = _AnswerRoutes(service, pool)
    routes: list[Mount | Route] = [
        Route("/", _page),
        Mount(PAGE_FILES.rstrip("/"), StaticFiles(directory=_FILES)),
        Route("/v1/completions", posted(bodies.CompletionRequest, answers.text), methods=["POST"]),
        Route("/v1/chat/completions", posted(bodies.ChatRequest, answers.text), methods=["POST"]),
        *pool.routes,
    ]
    return Starlette(routes=routes, lifespan=lifespan, exception_handlers=pool.errors)


def create_selector(logo: LoGo, settings: AppSettings, *, signals: Sequence[str] = ()) -> tuple[Starlette, Entrance]:
    """The app that only selects, by an engine that nobody else may use meanwhile, and its entrance; `signals` as of
    `Selecting`."""
    selecting = Selecting(logo, nullcontext, signals)
    entrance = Entrance(_MOST_SELECTIONS, lambda: True)

    @asynccontextmanager
    async def lifespan(app: Starlette) -> AsyncIterator[None]:
        yield
        selecting.close()

    pool = PoolRoutes(selecting, entrance, PromptReader(logo, logo.prompts.context), settings)
    return Starlette(routes=pool.routes, lifespan=lifespan, exception_handlers=pool.errors), entrance


async def _page(request: Request) -> Response:
    """The page, which asks for a key itself."""
    return FileResponse(_FILES / "index.html")


class _AnswerRoutes:
    """The routes that answer with text."""

    def __init__(self, service: Service, pool: PoolRoutes) -> None:
        self._service = service
        self._pool = pool
        self._answering = Answering(service, pool.metrics, pool.choosing)
        pool.metrics.watch(service)
        self._shadow: Shadow | None = None
        if pool.settings.shadow is not None:
            text_of = pool.choosing.text_of if pool.settings.log_prompts else None
            count = pool.metrics.count_shadow
            self._shadow = Shadow(pool.settings.shadow, lambda: service.entrance.busy, text_of, count)

    async def close(self) -> None:
        """Ends what goes on beside answers."""
        if self._shadow is not None:
            await self._shadow.close()

    async def text(self, request: Request, body: bodies.CompletionRequest | bodies.ChatRequest) -> Response:
        """Continues prompts or answers a conversation, each with the mixture of adapters that it selects."""
        began = time.perf_counter()
        logged = logged_of(request)
        logged["model"] = plain(body.model)
        models = self._pool.models_of(request)
        mixture_request = models.mixture_request(body.model, body.logo)
        count = body.n if isinstance(body, bodies.ChatRequest) else body.n * len(body.prompts)
        with ExitStack() as held:
            held.enter_context(self._service.entrance.admitted(count))
            prompts = await self._pool.reader.prompts(body, len(await request.body()))
            logged["prompt_tokens"] = sum(map(len, prompts))
            most_tokens = self._pool.reader.most_tokens(body, prompts)
            sampling = Sampling(most_tokens, body.temperature, body.top_p, body.seed, body.ignore_eos)
            chosen = await self._answering.choose(prompts, mixture_request, began, logged)
            for mixture in chosen:
                held.callback(mixture.release)
            is_watched = bool(models.adapters) and (body.logo is None or body.logo.shadow)
            if self._shadow is not None and is_watched and mixture_request.adapters is not None:
                self._shadow.offer(prompts, mixture_request.adapters, partial(self._selected, mixture_request.usable))
            call = Call(body, prompts, chosen, sampling, began, logged)
            if body.stream:
                return Streamed(self._answering.events(call), held.pop_all(), self._pool.choosing.seconds_left(began))
            return JSONResponse(await self._answering.whole(call))

    async def _selected(self, usable: Patterns | None, prompt: Prompt) -> Selection:
        """What a prompt selects, beside an answer that something else has been named for."""
        request = MixtureRequest(options={"when_unsure": "mix"}, usable=usable)
        [outcome] = await self._service.selecting.choose([prompt], request, lambda chosen, prompt: chosen.selection)
        if isinstance(outcome, BaseException):
            raise outcome
        return outcome


class Streamed(StreamingResponse):
    """Sends events; what the request holds is released when they end in any way, as also if the client does not read
    them, `GRACE` seconds after the time that is `left`."""

    def __init__(self, events: AsyncGenerator[bytes, None], held: ExitStack, left: float) -> None:
        self._events = events
        self._held = held
        self._limit = left + GRACE
        super().__init__(events, media_type="text/event-stream", headers={"Cache-Control": "no-cache"})

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Sends the events."""
        with self._held:
            async with aclosing(self._events):
                try:
                    await asyncio.wait_for(super().__call__(scope, receive, send), self._limit)
                except asyncio.TimeoutError:
                    _log.warning("a stream was ended, since its client does not read it")
