"""`Admission`: what each request of every server of ours passes before a route sees it.

    host and origin -> key -> length of the body -> the app, which parses it

All of it is decided from the headers, but for the length of a body that does not announce it: that is counted while it
comes in. An app therefore gets whole bodies within the limit, and only from clients that may send them.
"""

from __future__ import annotations

import asyncio
import hashlib
import hmac
import ipaddress
import json
import re
from collections.abc import Collection, Mapping
from contextlib import suppress
from dataclasses import dataclass, field
from http import HTTPStatus

from starlette.datastructures import Headers
from starlette.exceptions import HTTPException
from starlette.requests import ClientDisconnect
from starlette.responses import Response
from starlette.types import ASGIApp, Message, Receive, Scope, Send

from logo.api.errors import ApiError, bad_request, forbidden, shown
from logo.api.logs import request_id
from logo.api.names import Patterns
from logo.errors import UsageError

PAGE_FILES = "/page/"  # where the page's files are
# Need no key, as the page's files: what a browser loads before it can ask for one.
_OPEN = ("/", "/health", "/ready")
# What a key that is bound to some adapters may not use.
_WHOLE_POOL = ("/metrics", "/v1/load_lora_adapter", "/v1/unload_lora_adapter")
_READING = ("GET", "HEAD", "OPTIONS")  # methods that change nothing and whose bodies mean nothing
_LOOPBACK = ("127.0.0.1", "localhost", "::1")
_KEY = re.compile(r"[!-~]+")
_ORIGIN = re.compile(r"[a-z][a-z0-9+.-]*://[^/\s]+")  # without a path, as browsers send it


@dataclass(frozen=True)
class GuardSettings:
    """Who may send what to a server; UsageError: an empty key or one that no header can hold, or an invalid origin.

    Attributes:
        host: the server's address. On loopback, requests for other host names are refused, against DNS rebinding: a web
            page can make its own name point to 127.0.0.1, but the browser sends that name as `Host`.
        api_keys: without keys, here or in `key_adapters`, the API is open.
        max_body_bytes: the most bytes of a request's body.
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
        _check_keys("--api-key or LOGO_API_KEY", self.api_keys)
        _check_keys("--key-adapters", self.key_adapters)
        for origin in self.cors_origins:
            if origin != "*" and not _ORIGIN.fullmatch(origin):
                expected = "expected '*' or an origin such as https://example.org"
                raise UsageError(f"--cors: {expected}, found {shown(origin)}")


def _check_keys(option: str, keys: Collection[str]) -> None:
    for key in keys:
        if not _KEY.fullmatch(key):
            fault = "one with other characters" if key.strip() else "a blank one"
            expected = f"expected keys of printable ASCII characters without spaces, found {fault}"
            raise UsageError(f"{option}: {expected}; give another one, or none at all for an open server")


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
    content = json.dumps(answer.body()).encode("ascii")  # in which any text can be encoded
    return Response(content, answer.status, answer.headers, "application/json")


class Admission:
    """The layer that refuses requests for other hosts, changes that a web page of another origin asks for, requests
    without a key, and bodies above the limit, before the app gets anything.

    Routes find the adapters to which the key is bound in `request.state.adapters` (None: all). The paths `opened` need
    no key. A client that leaves while it sends its body gets no answer.
    """

    QUIET = 1.0  # seconds without data after which a client that sends too much gets its answer
    THROWN_AWAY = 64 * 2**20  # the most bytes that are read from it until then

    def __init__(self, app: ASGIApp, settings: GuardSettings, opened: Collection[str] = _OPEN) -> None:
        self.app = app
        self._opened = opened
        self._limit = settings.max_body_bytes
        self._hosts: set[str] | None = None  # None: any
        if is_loopback(settings.host) or settings.allow_hosts:
            self._hosts = {_host(name) for name in (*_LOOPBACK, settings.host, *settings.allow_hosts)}
        self._proxies = {_host(name) for name in settings.allow_hosts}
        self._origins = frozenset(settings.cors_origins)
        unbound: dict[str, Patterns | None] = dict.fromkeys(settings.api_keys)
        # Digests, which are of equal length, so that comparing does not reveal the lengths of keys. A key in both is
        # bound.
        self._keys = [
            (hashlib.sha256(key.encode()).digest(), patterns)
            for key, patterns in (unbound | dict(settings.key_adapters)).items()
        ]

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] != "http":
            return await self.app(scope, receive, send)
        try:
            scope.setdefault("state", {})["adapters"] = self.checked(scope)
            if scope["method"] not in _READING:
                receive = _again(await self._body(scope, receive), receive)
        except ApiError as error:
            return await response(error)(scope, receive, send)
        except ClientDisconnect:
            return None
        await self.app(scope, receive, send)

    def checked(self, scope: Scope) -> Patterns | None:
        """The adapters to which the key of a request is bound (None: all), by its headers alone; ApiError: it is
        refused."""
        headers = Headers(scope=scope)
        path = scope["path"].removeprefix(scope.get("root_path", ""))
        hosts = headers.getlist("host")
        if self._hosts is not None and (len(hosts) != 1 or _host(hosts[0]) not in self._hosts):
            named = shown(hosts[0]) if hosts else "none"  # not 421, after which clients try again
            raise forbidden(f"Host: expected a name of this server, found {named}; see --allow-host")
        if scope["method"] not in _READING:
            for origin in headers.getlist("origin"):
                if not self._may_change(origin, hosts):
                    raise forbidden(f"Origin: expected this server's page, found {shown(origin)}; see --cors")
        is_open = path in self._opened or (path.startswith(PAGE_FILES) and ".." not in path.split("/"))
        if is_open or not self._keys:
            return None
        patterns = self._adapters_of(headers.getlist("authorization"))
        if patterns is not None and path in _WHOLE_POOL:
            raise forbidden("this API key is bound to some adapters and may not use a route of the whole pool")
        return patterns

    def _may_change(self, origin: str, hosts: list[str]) -> bool:
        """Whether a page of this origin may change something: this server's own (also behind a proxy), or one of
        `--cors`."""
        if self._origins & {origin, "*"}:
            return True
        address = origin.partition("://")[2].lower()
        return bool(address) and (address in hosts or _host(address) in self._proxies)

    def _adapters_of(self, authorizations: list[str]) -> Patterns | None:
        """The adapters to which the key in the headers `Authorization` is bound; ApiError: it is no key of ours."""
        authorization = authorizations[0] if len(authorizations) == 1 else ""
        scheme, _, key = authorization.strip().partition(" ")
        digest = hashlib.sha256(key.strip().encode("latin-1")).digest()
        # All are compared, so that the time does not depend on how much of a key is right.
        matching = [patterns for own_digest, patterns in self._keys if hmac.compare_digest(digest, own_digest)]
        if scheme.lower() != "bearer" or not matching:
            named = "another" if len(authorizations) == 1 else "none"
            expected = f"expected a valid API key as 'Authorization: Bearer KEY', found {named}"
            raise bad_request(expected, None, "invalid_api_key", 401, {"WWW-Authenticate": "Bearer"})
        return matching[0]

    async def _body(self, scope: Scope, receive: Receive) -> bytes:
        """The whole body of a request; ApiError: it is too large; ClientDisconnect: it does not come to its end."""
        announced = Headers(scope=scope).get("content-length", "")
        if announced.isdecimal() and int(announced[:18]) > self._limit:
            raise await self._too_large(receive)
        body = bytearray()
        more_comes = True
        while more_comes:
            message = await receive()
            if message["type"] == "http.disconnect":
                raise ClientDisconnect
            body += message.get("body", b"")
            more_comes = message.get("more_body", False)
            if len(body) > self._limit:
                body.clear()
                raise await self._too_large(receive if more_comes else None)
        return bytes(body)

    async def _too_large(self, receive: Receive | None) -> ApiError:
        """The error of a body above the limit. What the client still sends is read first, within limits: to close the
        connection under it would reset it, and lose the answer."""
        thrown_away = 0
        with suppress(asyncio.TimeoutError):  # not the built-in TimeoutError before Python 3.11
            while receive is not None and thrown_away < self.THROWN_AWAY:
                message = await asyncio.wait_for(receive(), self.QUIET)
                thrown_away += max(1, len(message.get("body", b"")))
                if not message.get("more_body", False):
                    break
        expected = f"expected a body of at most {self._limit} bytes, found more"
        return bad_request(expected, None, "request_too_large", 413, {"Connection": "close"})


def _again(body: bytes, receive: Receive) -> Receive:
    """A `receive` that gives a body that was read, and then what still comes: that the client has left."""
    messages: list[Message] = [{"type": "http.request", "body": body, "more_body": False}]

    async def received() -> Message:
        return messages.pop() if messages else await receive()

    return received


def _host(header: str) -> str:
    """A host name without port, brackets and case."""
    name = header.strip().lower()
    if name.startswith("["):
        return name[1:].partition("]")[0]
    return name if name.count(":") > 1 else name.partition(":")[0].removesuffix(".")
