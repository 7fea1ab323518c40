"""The routes of a server that need no generation: selections, the pool, and the state of the server."""

from __future__ import annotations

import asyncio
import time
from collections import Counter
from collections.abc import Callable, Coroutine
from dataclasses import dataclass
from pathlib import Path
from typing import Any, TypeVar

from prometheus_client import CONTENT_TYPE_PLAIN_0_0_4, generate_latest
from starlette.exceptions import HTTPException
from starlette.requests import Request
from starlette.responses import JSONResponse, PlainTextResponse, Response
from starlette.routing import Route

from logo.api import bodies
from logo.api.errors import ApiError, bad_request, forbidden, model_not_found, not_found, shown, shown_line
from logo.api.guards import response
from logo.api.names import AUTO, Models
from logo.api.replies import Role, adapter_list, labels, model_card
from logo.errors import AdapterError, LoGoError, closest
from logo.serve.choosing import Choosing
from logo.serve.entrance import Entrance
from logo.serve.metrics import Metrics
from logo.serve.reading import PromptReader, beside_the_loop
from logo.serve.selecting import Selecting

REQUEST_TIMEOUT = 600.0  # seconds
_Route = Callable[[Request], Coroutine[Any, Any, Response]]
_B = TypeVar("_B", bound=bodies.Body)


@dataclass(frozen=True)
class AppSettings:
    """The settings of a server's app."""

    base_model: str  # the name under which the base model alone answers
    request_timeout: float = REQUEST_TIMEOUT  # the most seconds for a request
    adapter_changes: Path | None = None  # from which adapters may be added; None: the pool cannot be changed
    log_prompts: bool = False
    shadow: Path | None = None  # where selections beside answers are written that requests have named adapters for


class PoolRoutes:
    """The routes. What they find in `request.state` is from `logo.api.guards` and `logo.api.layers`."""

    def __init__(self, selecting: Selecting, entrance: Entrance, reader: PromptReader, settings: AppSettings) -> None:
        self.selecting = selecting
        self.entrance = entrance
        self.reader = reader
        self.settings = settings
        self.metrics = Metrics(selecting)
        self.choosing = Choosing(selecting, self.metrics, settings.request_timeout, settings.log_prompts)
        self._created = int(time.time())

    @property
    def routes(self) -> list[Route]:
        """For the app."""
        routes = [
            Route("/v1/logo/select", posted(bodies.SelectRequest, self.select), methods=["POST"]),
            Route("/classify", posted(bodies.ClassifyRequest, self.classify), methods=["POST"]),
            Route("/v1/logo/adapters", self.adapters),
            Route("/v1/models", self.models),
            Route("/v1/models/{name:path}", self.models),
            Route("/health", self.state),
            Route("/ready", self.state),
            Route("/metrics", self.scraped),
        ]
        if self.settings.adapter_changes is not None:
            routes += [
                Route("/v1/load_lora_adapter", posted(bodies.LoadAdapter, self.load), methods=["POST"]),
                Route("/v1/unload_lora_adapter", posted(bodies.UnloadAdapter, self.unload), methods=["POST"]),
            ]
        return routes

    @property
    def errors(self) -> dict[Any, Any]:
        """What answers which exception."""
        return dict.fromkeys((ApiError, HTTPException, LoGoError, MemoryError, Exception), self.failed)

    def models_of(self, request: Request) -> Models:
        """The models that the request's API key may use."""
        patterns = getattr(request.state, "adapters", None)
        return Models(self.settings.base_model, self.selecting.usable(patterns), self.selecting.signals, patterns)

    async def select(self, request: Request, body: bodies.SelectRequest) -> Response:
        """Selects the adapters that would answer a prompt, with their weights, the scores of all (none for a named
        mixture) and the number of the prompt's tokens."""
        began = time.perf_counter()
        mixture_request = self.models_of(request).mixture_request(body.model, body.logo)
        with self.entrance.admitted():
            prompts = await self.reader.prompts(body, len(await request.body()))
            self.reader.most_tokens(body, prompts)  # raises where no answer would fit
            [chosen] = await self.choosing.choose(prompts, mixture_request, began, logged_of(request))
        return JSONResponse(chosen.reply_with_scores(len(prompts[0])))

    async def classify(self, request: Request, body: bodies.ClassifyRequest) -> Response:
        """The probability of each adapter that it was made for a text, and that none was, as a text classifier answers;
        the label of the latter is the base model's name."""
        began = time.perf_counter()
        models = self.models_of(request)
        mixture_request = models.mixture_request(AUTO, bodies.LogoOptions(when_unsure="mix"))
        with self.entrance.admitted():
            prompts = await self.reader.prompts(body, len(await request.body()))
            self.reader.check_length(prompts)
            [chosen] = await self.choosing.choose(prompts, mixture_request, began, logged_of(request))
        return JSONResponse(labels(chosen.selection, models.base))

    async def adapters(self, request: Request) -> Response:
        """Lists the adapters of the pool that the API key may use."""
        selecting = self.selecting
        models = self.models_of(request)
        all_cards = selecting.adapters  # a change of the pool replaces it
        cards = [all_cards[name] for name in models.adapters if name in all_cards]
        settings = selecting.logo.settings
        k = selecting.logo.k
        selected: Counter[str] | None = selecting.selected
        if models.patterns is not None:  # the key is told nothing of other adapters, nor how often others had its own
            k = min(k, len(cards))
            selected = None
        return JSONResponse(adapter_list(models.base, k, selecting.signals, settings, cards, selected))

    async def models(self, request: Request) -> Response:
        """Lists the names that requests may give as `model`, or tells of one."""
        models = self.models_of(request)
        roles: dict[str, Role] = {AUTO: "auto", models.base: "base"}
        roles |= dict.fromkeys(models.adapters, "adapter")
        about = {
            "object": "model",
            "created": self._created,
            "owned_by": "logo",
            "max_model_len": self.reader.context,
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
        self.models_of(request).check_new(body.lora_name, replace=body.load_inplace)
        try:
            await self.selecting.add(folder, body.lora_name, replace=body.load_inplace)
        except AdapterError as error:
            raise bad_request(shown_line(str(error)), "lora_path") from error
        return PlainTextResponse(f"Success: LoRA adapter '{body.lora_name}' added successfully.")

    async def unload(self, request: Request, body: bodies.UnloadAdapter) -> Response:
        """Removes an adapter from the pool; requests that have selected it are still answered with it."""
        self.models_of(request).check_there(body.lora_name)
        await self.selecting.remove(body.lora_name)
        return PlainTextResponse(f"Success: LoRA adapter '{body.lora_name}' removed successfully.")

    # -- the server ---------------------------------------------------------------------------------------------------

    async def failed(self, request: Request, error: Exception) -> Response:
        """The answer to any exception. One that is unexpected is raised again, so that it is logged."""
        if isinstance(error, HTTPException):
            error.detail += f": {request.method} {shown(request.scope['path'])}"
        else:
            self.metrics.failure.labels(ApiError.of(error).code or "invalid").inc()
        return response(error)

    async def state(self, request: Request) -> Response:
        """200 as long as answers can be generated (`/health`) or requests are accepted (`/ready`), else 503."""
        is_fine = self.entrance.ready if request.url.path == "/ready" else self.entrance.alive
        if is_fine:
            return PlainTextResponse("ok")
        return PlainTextResponse("not generating or not taking requests", 503)

    async def scraped(self, request: Request) -> Response:
        """The metrics in Prometheus' text format."""
        return Response(generate_latest(self.metrics.registry), media_type=CONTENT_TYPE_PLAIN_0_0_4)


def posted(kind: type[_B], answer: Callable[[Request, _B], Coroutine[Any, Any, Response]]) -> _Route:
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


def logged_of(request: Request) -> dict[str, Any]:
    """The fields of the request's line in the log, to which routes add."""
    fields: dict[str, Any] = getattr(request.state, "logged", {})
    return fields


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
