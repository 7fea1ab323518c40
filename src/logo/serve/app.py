"""The server's app: the routes of the API over one service, and the page."""

from __future__ import annotations

import asyncio
import logging
import time
from collections.abc import AsyncGenerator, AsyncIterator, Coroutine
from contextlib import ExitStack, aclosing, asynccontextmanager
from importlib.metadata import version
from pathlib import Path
from typing import Any, TypeVar

from prometheus_client import CONTENT_TYPE_PLAIN_0_0_4, generate_latest
from starlette.applications import Starlette
from starlette.exceptions import HTTPException
from starlette.requests import Request
from starlette.responses import JSONResponse, PlainTextResponse, Response, StreamingResponse
from starlette.routing import Route
from starlette.types import Receive, Scope, Send

from logo import __version__
from logo.errors import AdapterError, LoGoError, PoolError, closest
from logo.serve import bodies
from logo.serve.answering import Answers, AppSettings
from logo.serve.errors import (
    ApiError,
    bad_request,
    client_left,
    forbidden,
    model_not_found,
    not_found,
    plain,
    shown,
    shown_line,
)
from logo.serve.guards import PAGE_ROUTES, response
from logo.serve.names import AUTO, Models
from logo.serve.service import Service

_T = TypeVar("_T")
_B = TypeVar("_B", bound=bodies.Body)
_log = logging.getLogger("logo.serve")

GRACE = 5.0
"""Seconds that a client has, after the time limit of its request, to read what was generated."""


def create_app(service: Service, settings: AppSettings) -> Starlette:
    """The app, which starts and ends the service; `logo.serve.guards.guard` is to be put around it."""

    @asynccontextmanager
    async def lifespan(app: Starlette) -> AsyncIterator[None]:
        service.batching.start()
        try:
            yield
        finally:
            await service.close()

    kinds = (ApiError, HTTPException, LoGoError, MemoryError, Exception)
    routes = [*PAGE_ROUTES, *_ROUTES, *(_CHANGES if settings.adapter_changes is not None else ())]
    app = Starlette(routes=routes, lifespan=lifespan, exception_handlers=dict.fromkeys(kinds, _failed))
    app.state.answers = Answers(service, settings)
    app.state.created, app.state.folder = int(time.time()), settings.adapter_changes
    return app


async def _failed(request: Request, error: Exception) -> Response:
    """The answer to any exception. One that is unexpected is raised again, so that it is logged."""
    if isinstance(error, HTTPException):
        error.detail += f": {request.method} {shown(request.scope['path'])}"
    return response(error)


def _answers(request: Request) -> Answers:
    found: Answers = request.app.state.answers
    return found


def _models(request: Request) -> Models:
    """The models that the request's API key may use; see `logo.serve.guards.Access`."""
    return _answers(request).models(getattr(request.state, "adapters", None))


def _logged(request: Request) -> dict[str, Any]:
    """The fields of the request's line in the log; see `logo.serve.guards.Observed`."""
    found: dict[str, Any] = getattr(request.state, "logged", {})
    return found


async def _parsed(request: Request, kind: type[_B]) -> _B:
    """The body of a request. It has to be called JSON, which a web page elsewhere cannot send unasked."""
    if request.headers.get("content-type", "").partition(";")[0].strip().lower() != "application/json":
        raise bad_request("expected a JSON object and 'Content-Type: application/json', found another type of content")
    return bodies.checked(kind, bodies.read_json(await request.body()))


async def _unless_left(request: Request, work: Coroutine[Any, Any, _T]) -> _T:
    """Runs `work`, and cancels it if the client disconnects meanwhile, which raises an ApiError."""

    async def left() -> None:
        while (await request.receive())["type"] != "http.disconnect":
            pass

    tasks = [asyncio.ensure_future(work), asyncio.ensure_future(left())]
    try:
        await asyncio.wait(tasks, return_when=asyncio.FIRST_COMPLETED)
        if tasks[0].done():
            return tasks[0].result()  # type: ignore[return-value]
        raise client_left()
    finally:
        for task in tasks:
            task.cancel()
        await asyncio.gather(*tasks, return_exceptions=True)


# -- generating and selecting --------------------------------------------------------------------------------------


async def completions(request: Request) -> Response:
    """Continues prompts, each with the mixture of adapters that it selects."""
    body = await _parsed(request, bodies.CompletionRequest)
    return await _text(request, body, len(body.prompts))


async def chat_completions(request: Request) -> Response:
    """Answers a conversation with the mixture of adapters that it selects."""
    return await _text(request, await _parsed(request, bodies.ChatRequest), 1)


async def _text(request: Request, body: bodies.CompletionRequest | bodies.ChatRequest, count: int) -> Response:
    answers, began, logged = _answers(request), time.perf_counter(), _logged(request)
    logged["model"] = plain(body.model)
    wanted = _models(request).mixture_request(body.model, body.logo)
    with ExitStack() as held:
        with answers.counting(count * body.n, began):
            held.enter_context(answers.service.admitted(count * body.n))
            call = await answers.call(body, wanted, began, logged)
            chosen = await _unless_left(request, answers.choose(call.prompts, call.wanted, began, logged))
        for one in chosen:
            held.callback(one.release)
        if body.stream:
            return Streamed(answers.events(call, chosen), held.pop_all(), answers.left(began))
        return JSONResponse(await _unless_left(request, answers.whole(call, chosen)))


class Streamed(StreamingResponse):
    """Sends events; everything that the request holds is released when they end in any way.

    They also end if the client does not read them, `GRACE` seconds after the time that is `left`.
    """

    def __init__(self, events: AsyncGenerator[bytes, None], held: ExitStack, left: float | None) -> None:
        self._events, self._held, self._limit = events, held, None if left is None else left + GRACE
        super().__init__(events, media_type="text/event-stream", headers={"Cache-Control": "no-cache"})

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Sends the events."""
        with self._held:
            async with aclosing(self._events):
                try:
                    await asyncio.wait_for(super().__call__(scope, receive, send), self._limit)
                except asyncio.TimeoutError:
                    _log.warning("a stream was ended, since its client does not read it")


async def select(request: Request) -> Response:
    """Selects the adapters that would answer a prompt, with their weights and the scores of all."""
    body, answers, began = await _parsed(request, bodies.SelectRequest), _answers(request), time.perf_counter()
    wanted = _models(request).mixture_request(body.model, body.logo)
    with answers.service.admitted():
        if body.prompt is not None:
            prompts = await answers.encoded([body.prompt])
        else:
            prompts = [await answers.conversation(body.messages or [], body.chat_template_kwargs)]
        answers.room(prompts, None, "prompt" if body.messages is None else "messages")
        [chosen] = await _unless_left(request, answers.choose(prompts, wanted, began, _logged(request)))
        chosen.release()
    return JSONResponse(bodies.SelectionReply.of(chosen, len(prompts[0])).model_dump())


# -- the pool ------------------------------------------------------------------------------------------------------


async def adapters(request: Request) -> Response:
    """Lists the adapters of the pool that the API key may use."""
    service, names = _answers(request).service, _models(request).adapters
    cards = {name: card for name, card in service.adapters.items() if name in names}
    listed = bodies.AdapterList(
        base_model=_answers(request).base_model,
        default_k=service.logo.k,
        signal=service.signals[0],
        signals=list(service.signals),
        data=[bodies.AdapterCard.of(card, service.selected.get(name, 0)) for name, card in cards.items()],
    )
    return JSONResponse(listed.model_dump())


async def models(request: Request) -> Response:
    """Lists the names that requests may give as `model`, or tells of one."""
    known, length, asked = _models(request), _answers(request).service.batching.context, request.path_params.get("name")
    roles = {AUTO: "auto", known.base: "base", **dict.fromkeys(known.adapters, "adapter")}
    about = {"object": "model", "created": request.app.state.created, "owned_by": "logo", "max_model_len": length}
    parents = {name: known.base if role == "adapter" else None for name, role in roles.items()}
    cards = [
        {"id": name, **about, "root": name if parents[name] else known.base, "parent": parents[name], "permission": []}
        | {"logo": {"role": role}}
        for name, role in roles.items()
        if asked in (None, name)
    ]
    if not cards:
        raise model_not_found(str(asked), closest(asked, roles))
    return JSONResponse({"object": "list", "data": cards} if asked is None else cards[0])


async def load(request: Request) -> Response:
    """Adds an adapter to the pool, from below the server's folder; if a check fails, nothing changes."""
    body, answers = await _parsed(request, bodies.LoadAdapter), _answers(request)
    folder = _inside(request.app.state.folder, body.lora_path)
    answers.models(None).check_new(body.lora_name, replace=body.load_inplace)
    try:
        await answers.service.add(folder, body.lora_name, replace=body.load_inplace)
    except AdapterError as error:
        if error.name != body.lora_name:  # another adapter of the pool
            raise
        raise bad_request(shown_line(str(error)), "lora_path") from error
    return PlainTextResponse(f"Success: LoRA adapter '{body.lora_name}' added successfully.")


async def unload(request: Request) -> Response:
    """Removes an adapter from the pool; requests that have selected it are still answered with it."""
    body, answers = await _parsed(request, bodies.UnloadAdapter), _answers(request)
    answers.models(None).check_there(body.lora_name)
    try:
        await answers.service.remove(body.lora_name)
    except PoolError as error:  # another request removed it meanwhile
        raise not_found(str(error), "lora_name") from error
    return PlainTextResponse(f"Success: LoRA adapter '{body.lora_name}' removed successfully.")


def _inside(root: Path, path: str) -> Path:
    """The folder that a client names, absolute or relative to `root`; ApiError unless it is one inside of `root`."""
    try:
        found = (root / path).resolve()
        is_folder = found.is_dir()
    except (OSError, RuntimeError, ValueError):  # too long a path, or links in a circle
        raise bad_request(f"lora_path: expected a path, found {shown(path)}", "lora_path") from None
    if not found.is_relative_to(root.resolve()):
        expected = "expected a folder inside the one this server was given"
        raise forbidden(f"lora_path: {expected}, found {shown(path)}", "lora_path")
    if not is_folder:
        raise not_found(f"lora_path: expected a folder, found none at {shown(path)}", "lora_path")
    return found


# -- the server itself ---------------------------------------------------------------------------------------------


async def state(request: Request) -> Response:
    """200 as long as answers can be generated (`/health`) or requests are accepted (`/ready`), else 503."""
    service = _answers(request).service
    fine = service.ready if request.url.path == "/ready" else service.batching.alive
    return PlainTextResponse("ok" if fine else "not generating or not taking requests", 200 if fine else 503)


async def versions(request: Request) -> Response:
    """The versions of LoGo, transformers and PyTorch."""
    return JSONResponse({"version": __version__, "transformers": version("transformers"), "torch": version("torch")})


async def metrics(request: Request) -> Response:
    """The metrics in Prometheus' text format."""
    return Response(generate_latest(_answers(request).metrics.registry), media_type=CONTENT_TYPE_PLAIN_0_0_4)


_ROUTES = (
    Route("/v1/completions", completions, methods=["POST"]),
    Route("/v1/chat/completions", chat_completions, methods=["POST"]),
    Route("/v1/logo/select", select, methods=["POST"]),
    Route("/v1/logo/adapters", adapters),
    Route("/v1/models", models),
    Route("/v1/models/{name:path}", models),
    Route("/health", state),
    Route("/ready", state),
    Route("/version", versions),
    Route("/metrics", metrics),
)
_CHANGES = (
    Route("/v1/load_lora_adapter", load, methods=["POST"]),
    Route("/v1/unload_lora_adapter", unload, methods=["POST"]),
)
