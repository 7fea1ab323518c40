"""The log: one line per request, as text or JSON, with its route and its result.

No line holds a header, a body, a query string or a key, and prompts only if the operator wants that. Every record that
is written during a request has its id.
"""

from __future__ import annotations

import json
import logging
import sys
import time
import traceback
from contextvars import ContextVar
from datetime import datetime, timezone
from typing import Any

from starlette.types import ASGIApp, Message, Receive, Scope, Send

from logo.api.validation import plain

request_id: ContextVar[str | None] = ContextVar("request_id", default=None)
"""The request that is being answered; None outside of any."""

access = logging.getLogger("logo.access")

# Fields of `request.state` that are logged.
_STATE = ("model", "prompt_tokens", "completion_tokens", "selections")

# Fields for programs, which text lines leave out.
_JSON_ONLY = ("selections",)

# Routes that machines request every few seconds; successes are logged at level debug.
_PROBES = ("/health", "/ready", "/metrics")


class AccessLog:
    """Writes a line when a request has been answered or its client has left.

    Routes may set `request.state.model`, `.prompt_tokens`, `.completion_tokens` and `.selections` (`logged.entry` of
    each prompt) at any time before the answer ends.
    A client that hung up before the answer was complete is marked `disconnected`, an answer that broke off otherwise
    by `incomplete`.
    """

    def __init__(self, app: ASGIApp) -> None:
        self.app = app

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] != "http":
            return await self.app(scope, receive, send)
        started = time.perf_counter()
        status, ended, gone = 0, False, False

        async def watched(message: Message) -> None:
            nonlocal status, ended
            if message["type"] == "http.response.start":
                status = message["status"]
            elif message["type"] == "http.response.body":
                ended = not message.get("more_body", False)
            await send(message)

        async def heard() -> Message:
            nonlocal gone
            message = await receive()
            gone = gone or (message["type"] == "http.disconnect" and not ended)
            return message

        try:
            await self.app(scope, heard, watched)
        finally:
            state = scope.get("state", {})
            fields: dict[str, Any] = {
                "method": plain(scope["method"]),
                "path": plain(scope["path"]),
                "status": status,
                "ms": round(1000 * (time.perf_counter() - started), 1),
            }
            fields |= {name: _safe(state[name]) for name in _STATE if state.get(name) is not None}
            if gone or not ended:
                fields["disconnected" if gone else "incomplete"] = True
            level = logging.DEBUG if scope["path"] in _PROBES and status < 400 else logging.INFO
            access.log(level, "%s", _Line(fields), extra={"fields": fields})


class RequestIds(logging.Filter):
    """Adds the id of the current request to records."""

    def filter(self, record: logging.LogRecord) -> bool:
        record.request_id = request_id.get() or "-"
        return True


class JsonLines(logging.Formatter):
    """One JSON object per record: time, level, logger, request id, then the record's fields or its message."""

    def format(self, record: logging.LogRecord) -> str:
        entry: dict[str, Any] = {
            "time": datetime.fromtimestamp(record.created, timezone.utc).isoformat(timespec="milliseconds"),
            "level": record.levelname.lower(),
            "logger": record.name,
        }
        if (name := getattr(record, "request_id", "-")) != "-":
            entry["request_id"] = name
        fields = getattr(record, "fields", None)
        entry |= fields if fields is not None else {"message": record.getMessage()}
        if record.exc_info:
            entry["exception"] = "".join(traceback.format_exception(*record.exc_info))
        return json.dumps(entry, default=str)


def configure(log_json: bool) -> None:
    """Sets up the loggers of this package, uvicorn and asyncio, to stderr.

    Give uvicorn `log_config=None, access_log=False`.

    Args:
        log_json: one JSON object per line.
    """
    handler = logging.StreamHandler(sys.stderr)
    handler.addFilter(RequestIds())
    text = logging.Formatter("%(asctime)s %(levelname)s %(request_id)s %(message)s")
    handler.setFormatter(JsonLines() if log_json else text)
    # Not `dictConfig`, which closes all handlers, and some of these close their stream.
    for name, own, number in (
        ("logo", [handler], logging.INFO),
        ("uvicorn", [handler], logging.WARNING),
        ("uvicorn.error", [], logging.WARNING),
        ("uvicorn.access", [], logging.CRITICAL),
        ("asyncio", [handler], logging.WARNING),
    ):
        logger = logging.getLogger(name)
        logger.handlers[:] = own
        logger.setLevel(number)


def _safe(value: Any) -> Any:
    return plain(value) if isinstance(value, str) else value


class _Line:
    """A request as text, which is only formatted if a handler needs it."""

    def __init__(self, fields: dict[str, Any]) -> None:
        self.fields = fields

    def __str__(self) -> str:
        rest = dict(self.fields)
        first = f"{rest.pop('method')} {rest.pop('path')} {rest.pop('status')} {rest.pop('ms')} ms"
        shown = (f"{name}={json.dumps(value)}" for name, value in rest.items() if name not in _JSON_ONLY)
        return " ".join([first, *shown])
