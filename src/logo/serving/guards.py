"""The layers around an app (id, log, host, CORS, key, size), in pure ASGI so that streams are not buffered.

`guard` adds them, outermost first:

    RequestId -> AccessLog -> SecurityHeaders -> Failures -> Hosts -> CORS -> ApiKeys -> BodyLimit -> app

An error of any layer has OpenAI's form, the request's id, the security headers and a line in the log.
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
from logo.api.validation import shown
from logo.errors import UsageError
from logo.protocol import Patterns
from logo.serving.error_handlers import api_error, response
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
_ORIGIN = re.compile(r"[a-z][a-z0-9+.-]*://[^/\s]+")  # without a path, as browsers send it


@dataclass(frozen=True)
class GuardSettings:
    """The settings of the layers.

    Attributes:
        host: the server's address. On loopback, requests for other host names are refused (`Hosts`).
        api_keys: keys of the API. Without keys, here or below, the API is open.
        key_adapters: keys that may only use some adapters: key -> names or patterns.
        max_body_bytes: the most bytes of a body.
        allow_hosts: further host names of a server on loopback, such as those of a proxy. On any other address they
            are, if given, the only names besides loopback's.
        cors_origins: web pages of these origins may use the API; `*` means all.
        open_metrics: whether `/metrics` needs no key.

    Raises:
        UsageError: an empty key or one that no header can hold, or an invalid origin.
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
    """The app with all layers, for uvicorn. Websockets are refused, since no route has them."""
    app = BodyLimit(app, settings.max_body_bytes)
    if settings.api_keys or settings.key_adapters:
        opened = (*OPEN_PATHS, *(("/metrics",) if settings.open_metrics else ()))
        app = ApiKeys(app, settings.api_keys, opened, settings.key_adapters)
    if settings.cors_origins:
        app = CORSMiddleware(
            app,
            settings.cors_origins,
            allow_methods=["GET", "POST"],
            allow_headers=["*"],  # OpenAI's client for browsers sends a dozen of its own
            expose_headers=["X-Request-Id", "Retry-After"],
        )
    if is_loopback(settings.host) or settings.allow_hosts:
        app = Hosts(app, (settings.host, *settings.allow_hosts))
    return RequestId(AccessLog(SecurityHeaders(Failures(app))))


def is_loopback(host: str) -> bool:
    """Whether a server at this address can only be reached from its own machine."""
    try:
        return ipaddress.ip_address(host).is_loopback
    except ValueError:
        return host.lower() == "localhost"


class RequestId:
    """Gives every request an id: the client's `X-Request-Id` if it is valid, else a new one.

    The id is in the response, in `request.state.request_id`, and in a context variable for the log.
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
    """Adds headers that keep browsers from guessing types, leaking addresses and running foreign scripts."""

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
    """Logs an exception that nothing else has handled, once with its traceback, and answers if no answer has begun.

    An answer that has begun stays incomplete: the server closes the connection, so that the client notices.
    """

    def __init__(self, app: ASGIApp) -> None:
        self.app = app

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] != "http":  # an error at the start is the server's
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
    """Refuses host names that are not this server's, against DNS rebinding.

    A web page can make its own name point to 127.0.0.1, and then has the same origin as a server there, but the browser
    sends the page's name as `Host`. Such requests get 403 (not 421, after which clients try again).
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
    """Requires one of the keys in `Authorization: Bearer KEY`, but for open paths.

    Args:
        app: the app behind it.
        keys: valid keys.
        open_paths: paths that need no key, like the page's files.
        bound: further keys, which may only use some adapters: key -> names or patterns, which routes find in
            `request.state.adapters`. They may not use the routes in `WHOLE`.
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
        # A key in both is bound.
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
            answer = forbidden("this API key is bound to some adapters and may not use a route of the whole pool")
            return await response(answer)(scope, receive, send)
        scope.setdefault("state", {})["adapters"] = patterns
        await self.app(scope, receive, send)

    def _is_open(self, path: str) -> bool:
        return path in self._open or (path.startswith(PAGE) and ".." not in path.split("/"))

    def _bound_to(self, key: bytes) -> tuple[bool, Patterns | None]:
        """Whether a key is valid, and its bound adapters; the time does not depend on how much of it is right."""
        digest = _digest(key)
        found = [(True, patterns) for known, patterns in self._keys if hmac.compare_digest(digest, known)]
        return found[0] if found else (False, None)


def _digest(key: bytes) -> bytes:
    """A digest of equal length for all keys, so that comparing does not reveal their lengths."""
    return hashlib.sha256(key).digest()


def _host(header: str) -> str:
    """A host name without port, brackets and case."""
    name = header.strip().lower()
    if name.startswith("["):
        return name[1:].partition("]")[0]
    return name if name.count(":") > 1 else name.partition(":")[0].removesuffix(".")
