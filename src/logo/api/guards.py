"""The layers around an app, in pure ASGI so that streams are not buffered: `Observed -> CORS -> Access -> BodyLimit`.

An error of any layer has OpenAI's form, the request's id, the security headers and a line in the log.
"""

from __future__ import annotations

import asyncio
import hashlib
import hmac
import ipaddress
import logging
import re
import time
import uuid
from collections.abc import Collection, Mapping
from contextlib import suppress
from dataclasses import dataclass, field
from http import HTTPStatus
from typing import Any

from starlette.datastructures import Headers, MutableHeaders
from starlette.exceptions import HTTPException
from starlette.middleware.cors import CORSMiddleware
from starlette.requests import ClientDisconnect
from starlette.responses import Response
from starlette.types import ASGIApp, Message, Receive, Scope, Send

from logo.errors import UsageError
from logo.api.errors import ApiError, bad_request, forbidden, plain, shown
from logo.api.logs import request_id
from logo.api.names import Patterns

_log, _access = logging.getLogger("logo.serve"), logging.getLogger("logo.access")

PAGE = "/page/"  # where the page's files are
# Need no key, as the page's files: what a browser loads before it can ask for one.
_OPEN = ("/", "/health", "/ready")
# What a key that is bound to some adapters may not use.
_WHOLE_POOL = ("/metrics", "/v1/load_lora_adapter", "/v1/unload_lora_adapter")
# Machines request these every few seconds; successes are logged at level debug.
_PROBES = ("/health", "/ready", "/metrics")
_LOOPBACK = ("127.0.0.1", "localhost", "::1")
# They keep browsers from guessing types, leaking addresses and running foreign scripts.
_HEADERS = {
    "Content-Security-Policy": (
        "default-src 'none'; style-src 'self'; script-src 'self'; connect-src 'self'; img-src 'self' data:; "
        "base-uri 'none'; form-action 'none'; frame-ancestors 'none'"
    ),
    "X-Content-Type-Options": "nosniff",
    "Referrer-Policy": "no-referrer",
}
_KEY = re.compile(r"[!-~]+")
_SANE_ID = re.compile(r"[A-Za-z0-9._-]{1,128}")
_ORIGIN = re.compile(r"[a-z][a-z0-9+.-]*://[^/\s]+")  # without a path, as browsers send it


@dataclass(frozen=True)
class GuardSettings:
    """The settings of the layers; UsageError: an empty key or one that no header can hold, or an invalid origin.

    Attributes:
        host: the server's address. On loopback, requests for other host names are refused, against DNS rebinding: a web
            page can make its own name point to 127.0.0.1, but the browser sends that name as `Host`.
        api_keys: without keys, here or in `key_adapters`, the API is open.
        allow_hosts: further host names of a server on loopback, such as those of a proxy. On any other address they
            are, if given, the only names besides loopback's.
        cors_origins: web pages of these origins may use the API; `*` means all. Pages elsewhere may change nothing.
        key_adapters: keys that may only use some adapters: key -> names or patterns.
    """

    host: str = "127.0.0.1"
    api_keys: tuple[str, ...] = field(default=(), repr=False)
    max_body_bytes: int = 1_000_000
    allow_hosts: tuple[str, ...] = ()
    cors_origins: tuple[str, ...] = ()
    key_adapters: Mapping[str, Patterns] = field(default_factory=dict, repr=False)

    def __post_init__(self) -> None:
        for option, keys in (("--api-key or LOGO_API_KEY", self.api_keys), ("--key-adapters", self.key_adapters)):
            if bad := [key for key in keys if not _KEY.fullmatch(key)]:
                found = "one with other characters" if bad[0].strip() else "a blank one"
                said = f"expected keys of printable ASCII characters without spaces, found {found}"
                raise UsageError(f"{option}: {said}; give another one, or none at all for an open server")
        for origin in self.cors_origins:
            if origin != "*" and not _ORIGIN.fullmatch(origin):
                found = shown(origin)
                raise UsageError(f"--cors: expected '*' or an origin such as https://example.org, found {found}")


def guard(app: ASGIApp, settings: GuardSettings) -> ASGIApp:
    """The app with all layers, for uvicorn."""
    app = Access(BodyLimit(app, settings.max_body_bytes), settings)
    if settings.cors_origins:
        told = ["X-Request-Id", "Retry-After"]  # OpenAI's client for browsers sends a dozen headers of its own
        app = CORSMiddleware(app, settings.cors_origins, ["GET", "POST"], ["*"], expose_headers=told)
    return Observed(app)


def is_loopback(host: str) -> bool:
    """Whether a server at this address can only be reached from its own machine."""
    with suppress(ValueError):
        return ipaddress.ip_address(host).is_loopback
    return host.lower() == "localhost"


def response(error: BaseException) -> Response:
    """The HTTP response to any exception, those of Starlette among them."""
    if isinstance(error, HTTPException):
        code = HTTPStatus(error.status_code).name.lower()
        error = bad_request(error.detail, None, code, error.status_code, error.headers)
    answer = ApiError.of(error, request_id.get())
    return Response(answer.content(), answer.status, answer.headers, "application/json")


class Observed:
    """Gives every request an id (the client's `X-Request-Id` if that is valid), a line in the log, whose fields routes
    set in `request.state.logged`, and an answer if nothing else has given one. A client that hung up is marked
    `disconnected`, an answer that broke off otherwise `incomplete`: its connection is closed, so that it is noticed."""

    def __init__(self, app: ASGIApp) -> None:
        self.app = app

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] == "lifespan":
            return await self.app(scope, receive, send)
        if scope["type"] != "http":
            return await send({"type": "websocket.close", "code": 1008})
        started, status, ended, gone = time.perf_counter(), 0, False, False
        given = Headers(scope=scope).getlist("x-request-id")
        name = given[0] if len(given) == 1 and _SANE_ID.fullmatch(given[0]) else f"req-{uuid.uuid4().hex}"
        logged = scope.setdefault("state", {})["logged"] = dict[str, Any]()
        token = request_id.set(name)

        async def watched(message: Message) -> None:
            nonlocal status, ended
            if message["type"] == "http.response.start":
                status = message["status"]
                MutableHeaders(scope=message).update({**_HEADERS, "X-Request-Id": name})
            ended = message["type"] == "http.response.body" and not message.get("more_body", False)
            await send(message)

        async def heard() -> Message:
            nonlocal gone
            message = await receive()
            gone = gone or (message["type"] == "http.disconnect" and not ended)
            return message

        try:
            await self.app(scope, heard, watched)
        except ClientDisconnect:
            gone = True
        except Exception as error:
            _log.error("a request failed", exc_info=error)
            if not status:
                await response(error)(scope, receive, watched)
        finally:
            took, path = round(1e3 * (time.perf_counter() - started), 1), plain(scope["path"])
            fields = {"method": plain(scope["method"]), "path": path, "status": status, "ms": took, **logged}
            if gone or not ended:
                fields["disconnected" if gone else "incomplete"] = True
            level = logging.DEBUG if path in _PROBES and status < 400 else logging.INFO
            _access.log(level, "%s %s %s", fields["method"], path, status, extra={"fields": fields})
            request_id.reset(token)


class Access:
    """Refuses requests for other hosts, changes that a web page of another origin asks for, and requests without a key.
    Routes find the adapters to which the key is bound in `request.state.adapters` (None: all); the paths `opened` need
    no key."""

    def __init__(self, app: ASGIApp, settings: GuardSettings, opened: Collection[str] = _OPEN) -> None:
        self.app, self._open = app, opened
        guarded = is_loopback(settings.host) or settings.allow_hosts
        self._hosts = {_host(name) for name in (*_LOOPBACK, settings.host, *settings.allow_hosts)} if guarded else None
        self._allowed = {_host(name) for name in settings.allow_hosts}
        self._origins = frozenset(settings.cors_origins)
        # A key in both is bound.
        every = {**dict.fromkeys(settings.api_keys, None), **settings.key_adapters}
        # Digests, which are of equal length, so that comparing does not reveal the lengths of keys.
        self._keys = [(hashlib.sha256(key.encode()).digest(), patterns) for key, patterns in every.items()]

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] == "http":
            try:
                scope.setdefault("state", {})["adapters"] = self.checked(scope)
            except ApiError as error:
                return await response(error)(scope, receive, send)
        await self.app(scope, receive, send)

    def checked(self, scope: Scope) -> Patterns | None:
        """The adapters to which the key of a request is bound; ApiError: it is refused."""
        headers, path = Headers(scope=scope), scope["path"].removeprefix(scope.get("root_path", ""))
        hosts, origins = headers.getlist("host"), headers.getlist("origin")
        if self._hosts is not None and (len(hosts) != 1 or _host(hosts[0]) not in self._hosts):
            found = shown(hosts[0]) if hosts else "none"  # not 421, after which clients try again
            raise forbidden(f"Host: expected a name of this server, found {found}; see --allow-host")
        if scope["method"] not in ("GET", "HEAD", "OPTIONS") and not all(self._own(one, hosts) for one in origins):
            raise forbidden(f"Origin: expected this server's page, found {shown(origins[0])}; see --cors")
        opened = path in self._open or (path.startswith(PAGE) and ".." not in path.split("/"))
        if opened or not self._keys:
            return None
        given = headers.getlist("authorization")
        scheme, _, key = (given[0] if len(given) == 1 else "").strip().partition(" ")
        digest = hashlib.sha256(key.strip().encode("latin-1")).digest()
        # All are compared, so that the time does not depend on how much of a key is right.
        known = [patterns for one, patterns in self._keys if hmac.compare_digest(digest, one)]
        if scheme.lower() != "bearer" or not known:
            found = "another" if len(given) == 1 else "none"
            said = f"expected a valid API key as 'Authorization: Bearer KEY', found {found}"
            raise bad_request(said, None, "invalid_api_key", 401, {"WWW-Authenticate": "Bearer"})
        if known[0] is not None and path in _WHOLE_POOL:
            raise forbidden("this API key is bound to some adapters and may not use a route of the whole pool")
        return known[0]

    def _own(self, origin: str, hosts: list[str]) -> bool:
        """Whether a page of this origin may change something: this server's own (also behind a proxy), or one of
        `--cors`."""
        at = origin.partition("://")[2].lower()
        return (bool(at) and (at in hosts or _host(at) in self._allowed)) or bool({origin, "*"} & self._origins)


class BodyLimit:
    """Answers 413 to bodies above a limit, as an `ApiError` that the app gets while it reads. What the client still
    sends is read first, within limits: to close the connection under it would reset it, and lose the answer."""

    QUIET, THROWN_AWAY = 1.0, 64 * 2**20  # seconds without data, bytes

    def __init__(self, app: ASGIApp, limit: int) -> None:
        self.app, self.limit = app, limit

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        announced = Headers(scope=scope).get("content-length", "") if scope["type"] == "http" else ""
        seen = self.limit + 1 if announced.isdecimal() and int(announced[:18]) > self.limit else 0

        async def counted() -> Message:
            nonlocal seen
            message: Message = await receive() if seen <= self.limit else {"more_body": True}
            seen += len(message.get("body", b""))
            if seen > self.limit:
                thrown_away = 0
                with suppress(asyncio.TimeoutError):  # not the built-in TimeoutError before Python 3.11
                    while message.get("more_body", False) and thrown_away < self.THROWN_AWAY:
                        message = await asyncio.wait_for(receive(), self.QUIET)
                        thrown_away += max(1, len(message.get("body", b"")))
                said = f"expected a body of at most {self.limit} bytes, found more"
                raise bad_request(said, None, "request_too_large", 413, {"Connection": "close"})
            return message

        await self.app(scope, counted, send)


def _host(header: str) -> str:
    """A host name without port, brackets and case."""
    name = header.strip().lower()
    if name.startswith("["):
        return name[1:].partition("]")[0]
    return name if name.count(":") > 1 else name.partition(":")[0].removesuffix(".")
