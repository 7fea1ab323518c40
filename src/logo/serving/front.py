"""`Front`: a middleware that gives vLLM's server our page and the checks of hosts and keys that our own server makes.

`logo serve --engine vllm` starts vLLM with `--middleware logo.backends.vllm.Router --middleware
logo.serving.front.Front`. vLLM passes no arguments to a middleware, so `Front` reads its settings from the environment.
"""

from __future__ import annotations

import json
import os
from collections.abc import Mapping
from dataclasses import asdict, dataclass
from pathlib import Path

from starlette.applications import Starlette
from starlette.requests import Request
from starlette.responses import FileResponse, Response
from starlette.routing import Mount, Route
from starlette.staticfiles import StaticFiles
from starlette.types import ASGIApp, Receive, Scope, Send

from logo.serving.guards import OPEN_PATHS, PAGE, ApiKeys, Hosts, SecurityHeaders, is_loopback

FOLDER = Path(__file__).parent / "page"

FRONT, KEY = "LOGO_FRONT", "VLLM_API_KEY"
"""Environment: `FrontSettings` as JSON, and the key that vLLM itself asks for."""


async def _page(request: Request) -> Response:
    return FileResponse(FOLDER / "index.html")


ROUTES = (Route("/", _page), Mount(PAGE.rstrip("/"), StaticFiles(directory=FOLDER), name="page"))
"""Of the page, for any app."""


@dataclass(frozen=True)
class FrontSettings:
    """The settings of `Front`.

    Attributes:
        host: the server's address. On loopback, requests for other host names are refused.
        allow_hosts: further host names.
        open_metrics: whether `/metrics` needs no key.
    """

    host: str = ""
    allow_hosts: tuple[str, ...] = ()
    open_metrics: bool = True

    def environment(self) -> dict[str, str]:
        """The environment variables that hold these settings."""
        return {FRONT: json.dumps(asdict(self))}

    @classmethod
    def of(cls, environment: Mapping[str, str]) -> FrontSettings:
        """Reads the settings from the environment."""
        stored = json.loads(environment.get(FRONT) or "{}")
        return cls(**{**stored, "allow_hosts": tuple(stored.get("allow_hosts", ()))})


class Front:
    """Answers `GET /` with the page, and checks host and key of other requests before it passes them on.

    vLLM checks `VLLM_API_KEY` only under `/v1` and a few other paths. Here it is checked everywhere but at the paths
    that our own server leaves open.

    Args:
        app: vLLM's app with its middleware.
    """

    def __init__(self, app: ASGIApp) -> None:
        settings, key = FrontSettings.of(os.environ), os.environ.get(KEY)
        opened = (*OPEN_PATHS, *(("/metrics",) if settings.open_metrics else ()))
        self.app = app
        self._page: ASGIApp = SecurityHeaders(Starlette(routes=ROUTES))
        self._keyed: ASGIApp = ApiKeys(app, [key], opened) if key else app
        guarded = is_loopback(settings.host) or settings.allow_hosts
        self._inside = Hosts(self._chosen, (settings.host, *settings.allow_hosts)) if guarded else self._chosen

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        await self._inside(scope, receive, send)

    async def _chosen(self, scope: Scope, receive: Receive, send: Send) -> None:
        method = scope.get("method")
        path = scope["path"].removeprefix(scope.get("root_path", "")) if scope["type"] == "http" else ""
        if method in ("GET", "HEAD") and (path == "/" or path.startswith(PAGE)):
            await self._page(scope, receive, send)
        elif method == "OPTIONS":  # a browser's preflight request has no key
            await self.app(scope, receive, send)
        else:
            await self._keyed(scope, receive, send)
