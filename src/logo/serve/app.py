"""The server's app: the routes of the API over one service, the same way for both endpoints, streamed or not; the page.

body -> Call, with a mixture per prompt -> Chunk, Chunk, ... -> one of OpenAI's objects, or events
"""

from __future__ import annotations

import asyncio
import logging
import time
from collections.abc import AsyncGenerator, AsyncIterator, Callable, Coroutine
from contextlib import ExitStack, aclosing, asynccontextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any, TypeVar

from prometheus_client import CONTENT_TYPE_PLAIN_0_0_4, generate_latest
from starlette.applications import Starlette
from starlette.exceptions import HTTPException
from starlette.requests import Request
from starlette.responses import FileResponse, JSONResponse, PlainTextResponse, Response, StreamingResponse
from starlette.routing import Mount, Route
from starlette.staticfiles import StaticFiles
from starlette.types import Receive, Scope, Send

from logo.api import bodies
from logo.api.errors import ApiError, bad_request, forbidden, model_not_found, not_found, plain, shown, shown_line
from logo.api.guards import PAGE_FILES, response
from logo.api.names import AUTO, Models
from logo.api.replies import Role, adapter_list, model_card
from logo.errors import AdapterError, LoGoError, closest
from logo.serve.answering import Answering
from logo.serve.answers import Call
from logo.serve.metrics import Metrics
from logo.serve.reading import PromptReader, beside_the_loop
from logo.serve.sampling import Sampling
from logo.serve.service import Service

_Route = Callable[[Request], Coroutine[Any, Any, Response]]
_B = TypeVar("_B", bound=bodies.Body)
_log = logging.getLogger("logo.serve")

GRACE = 5.0  # seconds that a client has, after the time limit of its request, to read what was generated
_FILES = Path(__file__).parent / "page"


@dataclass(frozen=True)
class AppSettings:
    """The settings of a server's app."""

    base_model: str  # the name under which the base model alone answers
    request_timeout: float = 600.0  # the most seconds for a request
    adapter_changes: Path | None = None  # from which adapters may be added; None: the pool cannot be changed
    log_prompts: bool = False


def create_app(service: Service, settings: AppSettings) -> Starlette:
    """The app, which starts and ends the service; `logo.api.layers.guard` is to be put around it."""

    @asynccontextmanager
    async def lifespan(app: Starlette) -> AsyncIterator[None]:
        service.batching.start()
        try:
            yield
        finally:
            await service.close()

    api = _Api(service, settings)
    routes: list[Mount | Route] = [
        Route("/", api.page),
        Mount(PAGE_FILES.rstrip("/"), StaticFiles(directory=_FILES)),
        Route("/v1/completions", api.posted(bodies.CompletionRequest, api.text), methods=["POST"]),
        Route("/v1/chat/completions", api.posted(bodies.ChatRequest, api.text), methods=["POST"]),
        Route("/v1/logo/select", api.posted(bodies.SelectRequest, api.select), methods=["POST"]),
        Route("/v1/logo/adapters", api.adapters),
        Route("/v1/models", api.models),
        Route("/v1/models/{name:path}", api.models),
        Route("/health", api.state),
        Route("/ready", api.state),
        Route("/metrics", api.scraped),
    ]
    if settings.adapter_changes is not None:
        routes += [
            Route("/v1/load_lora_adapter", api.posted(bodies.LoadAdapter, api.load), methods=["POST"]),
            Route("/v1/unload_lora_adapter", api.posted(bodies.UnloadAdapter, api.unload), methods=["POST"]),
        ]
    errors = (ApiError, HTTPException, LoGoError, MemoryError, Exception)
    return Starlette(routes=routes, lifespan=lifespan, exception_handlers=dict.fromkeys(errors, api.failed))


class _Api:
    """The routes. What they find in `request.state` is from `logo.api.guards` and `logo.api.layers`."""

    def __init__(self, service: Service, settings: AppSettings) -> None:
        self.service = service
        self.settings = settings
        self.metrics = Metrics(service)
        self.reader = PromptReader(service)
        self.answering = Answering(service, self.metrics, settings.request_timeout, settings.log_prompts)
        self._created = int(time.time())

    def posted(self, kind: type[_B], answer: Callable[[Request, _B], Coroutine[Any, Any, Response]]) -> _Route:
        """A route that answers bodies of this kind, until the client leaves, which cancels the answer."""

        async def route(request: Request) -> Response:
            # A web page elsewhere cannot send JSON that is called so without asking first.
            if request.headers.get("content-type", "").partition(";")[0].strip().lower() != "application/json":
                raise bad_request("expected a JSON object and 'Content-Type: application/json', found another type")
            raw = await request.body()
            body = await beside_the_loop(len(raw), lambda: bodies.checked(kind, bodies.read_json(raw)))
            working = asyncio.ensure_future(answer(request, body))
            watching = asyncio.ensure_future(_cancel_when_the_client_leaves(request, working))
            try:
                return await working
            except asyncio.CancelledError:
                if not watching.done():  # somebody else has cancelled both
                    raise
                raise bad_request("the client has left", None, "client_left", 499) from None  # as in nginx's logs
            finally:
                watching.cancel()

        return route

    # -- what is answered with text ------------------------------------------------------------------------------------

    async def text(self, request: Request, body: bodies.CompletionRequest | bodies.ChatRequest) -> Response:
        """Continues prompts or answers a conversation, each with the mixture of adapters that it selects."""
        began = time.perf_counter()
        logged = getattr(request.state, "logged", {})
        logged["model"] = plain(body.model)
        mixture_request = self._models(request).mixture_request(body.model, body.logo)
        count = body.n if isinstance(body, bodies.ChatRequest) else body.n * len(body.prompts)
        with ExitStack() as held:
            held.enter_context(self.service.admitted(count))
            prompts = await self.reader.prompts(body, len(await request.body()))
            logged["prompt_tokens"] = sum(map(len, prompts))
            most_tokens = self.reader.most_tokens(body, prompts)
            sampling = Sampling(most_tokens, body.temperature, body.top_p, body.seed, body.ignore_eos)
            chosen = await self.answering.choose(prompts, mixture_request, began, logged)
            for mixture in chosen:
                held.callback(mixture.release)
            call = Call(body, prompts, chosen, sampling, began, logged)
            if body.stream:
                return Streamed(self.answering.events(call), held.pop_all(), self.answering.seconds_left(began))
            return JSONResponse(await self.answering.whole(call))

    # -- the pool ------------------------------------------------------------------------------------------------------

    def _models(self, request: Request) -> Models:
        """The models that the request's API key may use."""
        patterns = getattr(request.state, "adapters", None)
        return Models(self.settings.base_model, self.service.usable(patterns), self.service.signals, patterns)

    async def select(self, request: Request, body: bodies.SelectRequest) -> Response:
        """Selects the adapters that would answer a prompt, with their weights, the scores of all (none for a named
        mixture) and the number of the prompt's tokens."""
        began = time.perf_counter()
        mixture_request = self._models(request).mixture_request(body.model, body.logo)
        with self.service.admitted():
            prompts = await self.reader.prompts(body, len(await request.body()))
            self.reader.most_tokens(body, prompts)  # raises where no answer would fit
            [mixture] = await self.answering.choose(
                prompts, mixture_request, began, getattr(request.state, "logged", {})
            )
            mixture.release()
        return JSONResponse(mixture.chosen.reply_with_scores(len(prompts[0])))

    async def adapters(self, request: Request) -> Response:
        """Lists the adapters of the pool that the API key may use."""
        service = self.service
        models = self._models(request)
        all_cards = service.adapters  # a change of the pool replaces it
        cards = [all_cards[name] for name in models.adapters if name in all_cards]
        settings = service.logo.settings
        return JSONResponse(
            adapter_list(models.base, service.logo.k, service.signals, settings, cards, service.selected)
        )

    async def models(self, request: Request) -> Response:
        """Lists the names that requests may give as `model`, or tells of one."""
        models = self._models(request)
        roles: dict[str, Role] = {AUTO: "auto", models.base: "base"}
        roles |= dict.fromkeys(models.adapters, "adapter")
        about = {
            "object": "model",
            "created": self._created,
            "owned_by": "logo",
            "max_model_len": self.service.batching.context,
            "permission": [],
        }
        name = request.path_params.get("name")
        if name is None:
            cards = [model_card(listed, role, models.base, about) for listed, role in roles.items()]
            return JSONResponse({"object": "list", "data": cards})
        if name not in roles:
            raise model_not_found(name, closest(name, roles))
        return JSONResponse(model_card(name, roles[name], models.base, about))

    async def load(self, request: Request, body: bodies.LoadAdapter) -> Response:
        """Adds an adapter to the pool, from below the server's folder; if a check fails, nothing changes."""
        folder = _inside(self.settings.adapter_changes or Path(), body.lora_path)
        self._models(request).check_new(body.lora_name, replace=body.load_inplace)
        try:
            await self.service.add(folder, body.lora_name, replace=body.load_inplace)
        except AdapterError as error:
            raise bad_request(shown_line(str(error)), "lora_path") from error
        return PlainTextResponse(f"Success: LoRA adapter '{body.lora_name}' added successfully.")

    async def unload(self, request: Request, body: bodies.UnloadAdapter) -> Response:
        """Removes an adapter from the pool; requests that have selected it are still answered with it."""
        self._models(request).check_there(body.lora_name)
        await self.service.remove(body.lora_name)
        return PlainTextResponse(f"Success: LoRA adapter '{body.lora_name}' removed successfully.")

    # -- the server ----------------------------------------------------------------------------------------------------

    async def failed(self, request: Request, error: Exception) -> Response:
        """The answer to any exception. One that is unexpected is raised again, so that it is logged."""
        if isinstance(error, HTTPException):
            error.detail += f": {request.method} {shown(request.scope['path'])}"
        else:
            self.metrics.failure.labels(ApiError.of(error).code or "invalid").inc()
        return response(error)

    async def page(self, request: Request) -> Response:
        """The page, which asks for a key itself."""
        return FileResponse(_FILES / "index.html")

    async def state(self, request: Request) -> Response:
        """200 as long as answers can be generated (`/health`) or requests are accepted (`/ready`), else 503."""
        is_fine = self.service.ready if request.url.path == "/ready" else self.service.batching.alive
        if is_fine:
            return PlainTextResponse("ok")
        return PlainTextResponse("not generating or not taking requests", 503)

    async def scraped(self, request: Request) -> Response:
        """The metrics in Prometheus' text format."""
        return Response(generate_latest(self.metrics.registry), media_type=CONTENT_TYPE_PLAIN_0_0_4)


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


async def _cancel_when_the_client_leaves(request: Request, working: asyncio.Future[Response]) -> None:
    while (await request.receive())["type"] != "http.disconnect":
        pass
    working.cancel()


def _inside(root: Path, path: str) -> Path:
    """The folder that a client names, absolute or relative to `root`; ApiError unless it is one inside of `root`."""
    try:
        folder = (root / path).resolve()
        is_folder = folder.is_dir()
    except (OSError, RuntimeError, ValueError):  # too long a path, or links in a circle
        raise bad_request(f"lora_path: expected a path, found {shown(path)}", "lora_path") from None
    if not folder.is_relative_to(root.resolve()):
        expected = f"expected a folder inside the one this server was given, found {shown(path)}"
        raise forbidden(f"lora_path: {expected}", "lora_path")
    if not is_folder:
        raise not_found(f"lora_path: expected a folder, found none at {shown(path)}", "lora_path")
    return folder
