"""The server's app: the routes of one service, and the page."""

from __future__ import annotations

from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from dataclasses import dataclass
from importlib.metadata import version
from pathlib import Path

from fastapi import FastAPI

from logo.protocol import Engine
from logo.serving import changes, errors, front, routes
from logo.serving.answers import Answers
from logo.serving.logged import tell_pool
from logo.serving.metrics import Metrics
from logo.serving.replies import now


@dataclass(frozen=True)
class AppSettings:
    """Settings of the operator.

    Attributes:
        base_model: the name under which the base model alone answers.
        request_timeout: seconds that a request may take, waiting included; None: no limit.
        adapter_changes: folder from which requests may add adapters; None: the pool does not change.
        log_prompts: whether prompts are logged.
    """

    base_model: str
    request_timeout: float | None = 600.0
    adapter_changes: Path | None = None
    log_prompts: bool = False


def create_app(service: Engine, settings: AppSettings) -> FastAPI:
    """The app, without its guards (`logo.serving.guards.guard`). It starts and stops the service."""

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
    errors.install(app)
    app.include_router(routes.router)
    if settings.adapter_changes is not None:
        app.include_router(changes.router)

    app.router.routes.extend(front.ROUTES)
    return app
