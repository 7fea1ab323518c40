"""The checks before every route: id, log, host, CORS, key, size. Pure ASGI, so streams stay streams.

`guard` puts the layers around an app, outermost first:

    RequestId -> AccessLog -> SecurityHeaders -> Failures -> Hosts -> CORS -> ApiKeys -> BodyLimit -> app

An error of any layer has OpenAI's format, the request's id, the security headers and a line in the log.
"""

from __future__ import annotations

import hashlib
import hmac
import ipaddress
import logging
import re
import uuid
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field
from typing import ClassVar

from starlette.datastructures import Headers, MutableHeaders
from starlette.middleware.cors import CORSMiddleware
from starlette.requests import ClientDisconnect
from starlette.types import ASGIApp, Message, Receive, Scope, Send

from logo.api.asgi import BodyLimit
from logo.api.errors import forbidden, unauthorized
from logo.api.problems import shown
from logo.errors import UsageError
from logo.protocol import Patterns
from logo.serving.errors import api_error, response
from logo.serving.logs import AccessLog, request_id

log = logging.getLogger("logo.serving")

OPEN_PATHS = ("/", "/health", "/ready", "/version")
"""What needs no key, besides the page's files: what a browser loads before it can ask for one, and probes."""

PAGE = "/page/"

CONTENT_SECURITY_POLICY = (
    "default-src 'none'; style-src 'self'; script-src 'self'; connect-src 'self'; img-src 'self' data:; "
    "base-uri 'none'; form-action 'none'; frame-ancestors 'none'"
)

_SANE_ID = re.compile(r"[A-Za-z0-9._-]{1,128}")
_ORIGIN = re.compile(r"[a-z][a-z0-9+.-]*://[^/\s]+")  # without a path, or no browser's would ever equal it


@dataclass(frozen=True)
class GuardSettings:
    """Settings of the guards.

    Attributes:
        host: the address that the server is bound to. On loopback, requests for other host names are refused (`Hosts`).
        api_keys: keys for the whole API. Without any, here or below, it is open.
        key_adapters: keys for some adapters only: key -> names or patterns.
        max_body_bytes: largest body of a request.
        allow_hosts: further host names for a server on loopback (behind a proxy, for example). On any other address, if
            given, they are the only names besides loopback's.
        cors_origins: origins whose web pages may use the API; `*` means all.
        open_metrics: `/metrics` needs no key.

    Raises:
        UsageError: an empty key or one that no header can hold; an invalid origin.
    """

    host: str = "127.0.0.1"
    api_keys: tuple[str, ...] = field(default=(), repr=False)
    max_body_bytes: int = 1_000_000
    allow_hosts: tuple[str, ...] = ()
    cors_origins: tuple[str, ...] = ()
    open_metrics: bool = False
    key_adapters: Mapping[str, Patterns] = field(default_factory=dict, repr=False)

    def __post_init__(self) -> None:
        for option, keys in (("--api-key", self.api_keys), ("--key-adapters", self.key_adapters)):
            if not all(key and key.isascii() and key.isprintable() and " " not in key for key in keys):
                raise UsageError(f"{option}: expected keys of printable ASCII characters without spaces")
        for origin in self.cors_origins:
            if origin != "*" and not _ORIGIN.fullmatch(origin):
                raise UsageError(
                    f"--cors: expected '*' or an origin such as https://example.org, found {shown(origin)}"
                )


def guard(app: ASGIApp, settings: GuardSettings) -> ASGIApp:
    """The app behind all guards, for uvicorn. Websockets, which no route has, are turned away."""
    app = BodyLimit(app, settings.max_body_bytes)
    if settings.api_keys or settings.key_adapters:
        opened = (*OPEN_PATHS, *(("/metrics",) if settings.open_metrics else ()))
        app = ApiKeys(app, settings.api_keys, opened, settings.key_adapters)
    if settings.cors_origins:
        app = CORSMiddleware(
            app,
            settings.cors_origins,
            allow_methods=["GET", "POST"],
            allow_headers=["Authorization", "Content-Type", "X-Request-Id"],
            expose_headers=["X-Request-Id", "Retry-After"],
        )
    if is_loopback(settings.host) or settings.allow_hosts:
        app = Hosts(app, (settings.host, *settings.allow_hosts))
    return RequestId(AccessLog(SecurityHeaders(Failures(app))))


def is_loopback(host: str) -> bool:
    """True if a server bound to this name or address is reached from its own machine only."""
    try:
        return ipaddress.ip_address(host).is_loopback
    except ValueError:
        return host.lower() == "localhost"


class RequestId:
    """Gives every request an id: the client's own `X-Request-Id` if it is valid, else a new one.

    The id is in the response, in `request.state.request_id` and, for the log, in a context variable.
    """

    def __init__(self, app: ASGIApp) -> None:
        self.app = app

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] == "lifespan":
            return await self.app(scope, receive, send)
        if scope["type"] != "http":
            return await send({"type": "websocket.close", "code": 1008})
        given = Headers(scope=scope).getlist("x-request-id")
        name = given[0] if len(given) == 1 and _SANE_ID.fullmatch(given[0]) else f"req-{uuid.uuid4().hex}"
        scope.setdefault("state", {})["request_id"] = name
        token = request_id.set(name)

        async def named(message: Message) -> None:
            if message["type"] == "http.response.start":
                MutableHeaders(scope=message)["X-Request-Id"] = name
            await send(message)

        try:
            await self.app(scope, receive, named)
        finally:
            request_id.reset(token)


class SecurityHeaders:
    """Headers that keep browsers from guessing types, leaking addresses and running foreign code."""

    HEADERS: ClassVar = {
        "Content-Security-Policy": CONTENT_SECURITY_POLICY,
        "X-Content-Type-Options": "nosniff",
        "Referrer-Policy": "no-referrer",
    }

    def __init__(self, app: ASGIApp) -> None:
        self.app = app

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        async def secured(message: Message) -> None:
            if message["type"] == "http.response.start":
                MutableHeaders(scope=message).update(self.HEADERS)
            await send(message)

        await self.app(scope, receive, secured)


class Failures:
    """Handles all remaining exceptions: logs each once with its traceback, and answers it if no answer has begun.

    A response that fails after it has begun is left incomplete: the server closes the connection, so the client
    notices.
    """

    def __init__(self, app: ASGIApp) -> None:
        self.app = app

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] != "http":  # what breaks while the server starts is for the server
            return await self.app(scope, receive, send)
        begun = False

        async def watched(message: Message) -> None:
            nonlocal begun
            begun = True
            await send(message)

        try:
            await self.app(scope, receive, watched)
        except ClientDisconnect:
            pass
        except Exception as error:
            log.error("a request failed", exc_info=error)
            if not begun:
                await response(api_error(error, request_id.get()))(scope, receive, send)


class Hosts:
    """Answers only to host names that are known to mean this server: a guard against DNS rebinding.

    A web page can make its own name point to 127.0.0.1 and would then be of the same origin as a server there; but
    the browser still sends the page's name as `Host`. Others get 403 (not 421, after which clients try again).
    """

    LOOPBACK = ("127.0.0.1", "localhost", "::1")

    def __init__(self, app: ASGIApp, names: Iterable[str]) -> None:
        self.app = app
        self.names = {_host(name) for name in (*self.LOOPBACK, *names)}

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] == "http":
            hosts = Headers(scope=scope).getlist("host")
            if len(hosts) != 1 or _host(hosts[0]) not in self.names:
                found = shown(hosts[0]) if hosts else "none"
                answer = forbidden(f"Host: expected a name of this server, found {found}; see --allow-host")
                return await response(answer)(scope, receive, send)
        await self.app(scope, receive, send)


class ApiKeys:
    """Lets a request pass if it names one of the keys, in `Authorization: Bearer KEY`, or asks for an open path.

    Args:
        app: what is guarded.
        keys: any of them will do.
        open_paths: need none; nor do the page's files.
        bound: further keys, that may use some adapters only: key -> names or patterns, which routes find in
            `request.state.adapters`. What concerns the pool as a whole (`WHOLE`) is not for them.
    """

    WHOLE = ("/metrics", "/v1/load_lora_adapter", "/v1/unload_lora_adapter")

    def __init__(
        self,
        app: ASGIApp,
        keys: Iterable[str],
        open_paths: Iterable[str] = OPEN_PATHS,
        bound: Mapping[str, Patterns] | None = None,
    ) -> None:
        self.app = app
        # A key that stands in both is bound: whoever lists adapters for it means them.
        every = {**dict.fromkeys(keys, None), **(bound or {})}
        self._keys = [(_digest(key.encode("utf-8")), patterns) for key, patterns in every.items()]
        self._open = frozenset(open_paths)

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] != "http" or self._is_open(scope["path"]):
            return await self.app(scope, receive, send)
        given = [value for name, value in scope["headers"] if name == b"authorization"]
        if len(given) != 1:
            return await response(unauthorized())(scope, receive, send)
        scheme, _, key = given[0].strip().partition(b" ")
        known, patterns = self._bound_to(key.strip())
        if scheme.lower() != b"bearer" or not known:
            answer = unauthorized("expected a valid API key as 'Authorization: Bearer KEY', found another")
            return await response(answer)(scope, receive, send)
        if patterns is not None and scope["path"] in self.WHOLE:
            answer = forbidden("this API key is bound to some adapters, and this concerns the whole pool")
            return await response(answer)(scope, receive, send)
        scope.setdefault("state", {})["adapters"] = patterns
        await self.app(scope, receive, send)

    def _is_open(self, path: str) -> bool:
        return path in self._open or (path.startswith(PAGE) and ".." not in path.split("/"))

    def _bound_to(self, key: bytes) -> tuple[bool, Patterns | None]:
        """Whether a key is known, and what it is bound to; takes the same time however much of it is right."""
        digest = _digest(key)
        found = [(True, patterns) for known, patterns in self._keys if hmac.compare_digest(digest, known)]
        return found[0] if found else (False, None)


def _digest(key: bytes) -> bytes:
    """Of equal length for all keys, so that comparing tells nothing of their lengths either."""
    return hashlib.sha256(key).digest()


def _host(header: str) -> str:
    """A host name without port, brackets and case."""
    name = header.strip().lower()
    if name.startswith("["):
        return name[1:].partition("]")[0]
    return name if name.count(":") > 1 else name.partition(":")[0].removesuffix(".")
