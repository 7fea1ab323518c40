"""The server's app: routes over one service, and the page."""

from __future__ import annotations

from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from dataclasses import dataclass
from importlib.metadata import version
from pathlib import Path

from fastapi import FastAPI

from logo.protocol import Engine
from logo.serving import changes, error_handlers, front, routes
from logo.serving.answers import Answers
from logo.serving.logged import tell_pool
from logo.serving.metrics import Metrics
from logo.serving.openai import now


@dataclass(frozen=True)
class AppSettings:
    """What the person who starts a server decides.

    Attributes:
        base_model: the name under which the base model alone answers.
        request_timeout: seconds that a request may take, its waiting included; None: as long as it takes.
        adapter_changes: a folder from which adapters may be added under way; None: the pool stays as it is.
        log_prompts: the log says what was asked, too.
    """

    base_model: str
    request_timeout: float | None = 600.0
    adapter_changes: Path | None = None
    log_prompts: bool = False


def create_app(service: Engine, settings: AppSettings) -> FastAPI:
    """The app; `logo.serving.guards.guard` goes around it. The service begins and ends with it."""

    @asynccontextmanager
    async def lifespan(app: FastAPI) -> AsyncIterator[None]:
        await service.start()
        tell_pool(service.adapters)
        try:
            yield
        finally:
            await service.close()

    app = FastAPI(title="LoGo", version=version("lora-on-the-go"), lifespan=lifespan, docs_url=None, redoc_url=None)
    app.state.settings = settings
    app.state.created = now()
    timeout, log_prompts = settings.request_timeout, settings.log_prompts
    app.state.answers = Answers(service, Metrics(service), settings.base_model, timeout, log_prompts)
    error_handlers.install(app)
    app.include_router(routes.router)
    if settings.adapter_changes is not None:
        app.include_router(changes.router)

    app.router.routes.extend(front.ROUTES)
    return app
