"""The server's app: routes over one service, and the page."""

from __future__ import annotations

from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

from fastapi import FastAPI
from starlette.types import ASGIApp, Receive, Scope, Send

from logo import __version__
from logo.serving import changes, error_handlers, front, routes
from logo.serving.answers import Answers
from logo.serving.metrics import Metrics
from logo.serving.openai import now

if TYPE_CHECKING:
    from logo.serving.service import Service


@dataclass(frozen=True)
class AppSettings:
    """The settings of a server's app.

    Attributes:
        base_model: the name under which the base model alone answers.
        request_timeout: the most seconds for a request, including its waiting; None: no limit.
        adapter_changes: a folder from which adapters may be added while it runs; None: the pool cannot be changed.
        log_prompts: whether prompts are logged.
    """

    base_model: str
    request_timeout: float | None = 600.0
    adapter_changes: Path | None = None
    log_prompts: bool = False


class HeadAsGet:
    """Answers HEAD wherever GET is answered, as HTTP requires and probes expect; the server leaves out the body."""

    def __init__(self, app: ASGIApp) -> None:
        self.app = app

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        # A copy, since uvicorn looks at its own scope to see whether a body belongs to the answer.
        await self.app({**scope, "method": "GET"} if scope.get("method") == "HEAD" else scope, receive, send)


def create_app(service: Service, settings: AppSettings) -> FastAPI:
    """The app, which starts and ends the service; `logo.serving.guards.guard` is to be put around it."""

    @asynccontextmanager
    async def lifespan(app: FastAPI) -> AsyncIterator[None]:
        await service.start()
        try:
            yield
        finally:
            await service.close()

    app = FastAPI(title="LoGo", version=__version__, lifespan=lifespan, docs_url=None, redoc_url=None)
    app.state.settings = settings
    app.state.created = now()
    timeout, log_prompts = settings.request_timeout, settings.log_prompts
    app.state.answers = Answers(service, Metrics(service), settings.base_model, timeout, log_prompts)
    app.add_middleware(HeadAsGet)
    error_handlers.install(app)
    app.include_router(routes.router)
    if settings.adapter_changes is not None:
        app.include_router(changes.router)

    app.router.routes.extend(front.ROUTES)
    return app
