"""The layers around our server's app, in pure ASGI so that streams are not buffered: `Observed -> CORS -> Admission`.

An error of any layer has OpenAI's form, the request's id, the security headers and a line in the log.
"""

from __future__ import annotations

import logging
import re
import time
import uuid
from collections.abc import Mapping
from types import MappingProxyType
from typing import Any

from starlette.datastructures import Headers, MutableHeaders
from starlette.middleware.cors import CORSMiddleware
from starlette.requests import ClientDisconnect
from starlette.types import ASGIApp, Message, Receive, Scope, Send

from logo.api.errors import plain
from logo.api.guards import Admission, GuardSettings, response
from logo.api.logs import request_id

_log = logging.getLogger("logo.serve")
_access_log = logging.getLogger("logo.access")

# Machines request these every few seconds; successes are logged at level debug.
_PROBES = ("/health", "/ready", "/metrics")
# They keep browsers from guessing types, leaking addresses and running foreign scripts.
_HEADERS = {
    "Content-Security-Policy": (
        "default-src 'none'; style-src 'self'; script-src 'self'; connect-src 'self'; img-src 'self' data:; "
        "base-uri 'none'; form-action 'none'; frame-ancestors 'none'"
    ),
    "X-Content-Type-Options": "nosniff",
    "Referrer-Policy": "no-referrer",
}
_SANE_ID = re.compile(r"[A-Za-z0-9._-]{1,128}")


def guard(app: ASGIApp, settings: GuardSettings) -> ASGIApp:
    """The app with all layers, for uvicorn."""
    app = Admission(app, settings)
    if settings.cors_origins:
        app = CORSMiddleware(
            app,
            allow_origins=settings.cors_origins,
            allow_methods=["GET", "POST"],
            allow_headers=["*"],  # OpenAI's client for browsers sends a dozen headers of its own
            expose_headers=["X-Request-Id", "Retry-After"],
        )
    return Observed(app, _HEADERS)


class Observed:
    """Gives every answer these `headers`, and every request an id (the client's `X-Request-Id` if that is valid), a
    line in the log, whose fields routes set in `request.state.logged`, and an answer if nothing else has given one. A
    client that hung up is marked `disconnected`, an answer that broke off otherwise `incomplete`: its connection is
    closed, so that it is noticed."""

    def __init__(self, app: ASGIApp, headers: Mapping[str, str] = MappingProxyType({})) -> None:
        self.app = app
        self._headers = headers

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] == "lifespan":
            return await self.app(scope, receive, send)
        if scope["type"] != "http":
            return await send({"type": "websocket.close", "code": 1008})
        exchange = _Exchange(scope, receive, send, self._headers)
        token = request_id.set(exchange.name)
        try:
            await self.app(scope, exchange.receive, exchange.send)
        except ClientDisconnect:
            exchange.client_left = True
        except Exception as error:
            _log.error("a request failed", exc_info=error)
            if not exchange.status:
                await response(error)(scope, receive, exchange.send)
        finally:
            exchange.log()
            request_id.reset(token)


class _Exchange:
    """One request and its answer, as they pass."""

    def __init__(self, scope: Scope, receive: Receive, send: Send, headers: Mapping[str, str]) -> None:
        names = Headers(scope=scope).getlist("x-request-id")
        is_usable = len(names) == 1 and _SANE_ID.fullmatch(names[0])
        self.name = names[0] if is_usable else f"req-{uuid.uuid4().hex}"
        self.status = 0  # of the answer; 0: it has not begun
        self.client_left = False
        self._ended = False
        self._headers = headers
        self._scope = scope
        self._receive = receive
        self._send = send
        self._began = time.perf_counter()
        self._logged: dict[str, Any] = {}
        scope.setdefault("state", {})["logged"] = self._logged

    async def receive(self) -> Message:
        """Notes that the client leaves before its answer has ended."""
        message = await self._receive()
        if message["type"] == "http.disconnect" and not self._ended:
            self.client_left = True
        return message

    async def send(self, message: Message) -> None:
        """Adds the headers of every answer, and notes its status and end."""
        if message["type"] == "http.response.start":
            self.status = message["status"]
            MutableHeaders(scope=message).update({**self._headers, "X-Request-Id": self.name})
        self._ended = message["type"] == "http.response.body" and not message.get("more_body", False)
        await self._send(message)

    def log(self) -> None:
        """Writes the request's line."""
        path = plain(self._scope["path"])
        fields: dict[str, Any] = {
            "method": plain(self._scope["method"]),
            "path": path,
            "status": self.status,
            "ms": round(1e3 * (time.perf_counter() - self._began), 1),
            **self._logged,
        }
        if self.client_left:
            fields["disconnected"] = True
        elif not self._ended:
            fields["incomplete"] = True
        level = logging.DEBUG if path in _PROBES and self.status < 400 else logging.INFO
        _access_log.log(level, "%s %s %s", fields["method"], path, self.status, extra={"fields": fields})
