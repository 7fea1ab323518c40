"""`Front`: a middleware that gives vLLM's server our page and the checks of hosts, origins and keys of our own server.

`logo serve --engine vllm` starts vLLM with `--middleware logo.backends.vllm.Router --middleware
logo.backends.vllm.front.Front`. vLLM passes no arguments to a middleware, so `Front` reads its settings from the
environment.
"""

from __future__ import annotations

import json
import os
from collections.abc import Mapping
from dataclasses import asdict, dataclass
from typing import Any

from starlette.applications import Starlette
from starlette.datastructures import MutableHeaders
from starlette.types import ASGIApp, Message, Receive, Scope, Send

from logo.serve.guards import HEADERS, PAGE, PAGE_ROUTES, Access, GuardSettings

FRONT, KEY = "LOGO_FRONT", "VLLM_API_KEY"
"""Environment: `FrontSettings` as JSON, and the key that vLLM itself asks for."""


@dataclass(frozen=True)
class FrontSettings:
    """The settings of `Front`.

    Attributes:
        host: the server's address. On loopback, requests for other host names are refused.
        allow_hosts: further host names.
        open_metrics: whether `/metrics` needs no key.
        cors_origins: web pages of these origins may use the API.
    """

    host: str = ""
    allow_hosts: tuple[str, ...] = ()
    open_metrics: bool = True
    cors_origins: tuple[str, ...] = ()

    def environment(self) -> dict[str, str]:
        """The environment variables that hold these settings."""
        return {FRONT: json.dumps(asdict(self))}

    @classmethod
    def of(cls, environment: Mapping[str, str]) -> FrontSettings:
        """Reads the settings from the environment."""
        stored: Any = json.loads(environment.get(FRONT) or "{}")
        several = {name: tuple(value) for name, value in stored.items() if isinstance(value, list)}
        return cls(**{**stored, **several})


class Front:
    """Answers `GET /` with the page, and checks host, origin and key of other requests before it passes them on.

    vLLM checks `VLLM_API_KEY` only under `/v1` and a few other paths. Here it is checked everywhere but at the paths
    that our own server leaves open.

    Args:
        app: vLLM's app with its middleware.
    """

    def __init__(self, app: ASGIApp) -> None:
        settings, key = FrontSettings.of(os.environ), os.environ.get(KEY)
        self.app, self._page = app, Starlette(routes=PAGE_ROUTES)
        self._inside = Access(
            self._chosen,
            GuardSettings(
                settings.host,
                (key,) if key else (),
                allow_hosts=settings.allow_hosts,
                cors_origins=settings.cors_origins,
                open_metrics=settings.open_metrics,
            ),
        )

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        # A browser's preflight request has no key.
        await (self.app if scope.get("method") == "OPTIONS" else self._inside)(scope, receive, send)

    async def _chosen(self, scope: Scope, receive: Receive, send: Send) -> None:
        path = scope["path"].removeprefix(scope.get("root_path", "")) if scope["type"] == "http" else ""

        async def secured(message: Message) -> None:
            if message["type"] == "http.response.start":
                MutableHeaders(scope=message).update(HEADERS)
            await send(message)

        if scope.get("method") in ("GET", "HEAD") and (path == "/" or path.startswith(PAGE)):
            await self._page(scope, receive, secured)
        else:
            await self.app(scope, receive, send)
