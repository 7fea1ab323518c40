"""The log: one line per request, as text or JSON, with its route and its result.

No line holds a header, a body, a query string or a key, and prompts only if the operator wants that. Every record that
is written during a request has its id.
"""

from __future__ import annotations

import hashlib
import json
import logging
import sys
from collections.abc import Mapping
from contextvars import ContextVar
from datetime import datetime, timezone
from typing import Any, Literal

from logo.api.replies import Chosen
from logo.core import Prompt
from logo.errors import Unsure

# The request that is being answered; None outside of any.
request_id: ContextVar[str | None] = ContextVar("request_id", default=None)
Log = Literal["text", "json", "prompts"]  # lines of text, JSON lines, or JSON lines with the beginnings of prompts
LEVELS = {"logo": logging.INFO, "uvicorn": logging.WARNING, "asyncio": logging.WARNING}
LOGGED_TOKENS = 200  # the most of a prompt that a line holds
_IN_THE_MESSAGE = ("method", "path", "status")
_OF_THE_FIRST = ("adapters", "confidence")


class RequestIds(logging.Filter):
    """Adds the id of the current request to records."""

    def filter(self, record: logging.LogRecord) -> bool:
        record.request_id = request_id.get() or "-"
        return True


class Lines(logging.Formatter):
    """Text lines; those of requests with their fields, but of `selections` only the adapters and the confidence of the
    first."""

    def format(self, record: logging.LogRecord) -> str:
        fields = dict(getattr(record, "fields", {}))
        for name in _IN_THE_MESSAGE:
            fields.pop(name, None)
        selections = fields.pop("selections", [])
        if selections:
            fields |= {name: value for name, value in selections[0].items() if name in _OF_THE_FIRST}
        return " ".join([super().format(record), *(f"{name}={json.dumps(value)}" for name, value in fields.items())])


class JsonLines(logging.Formatter):
    """One JSON object per record: time, level, logger, request id, then the record's fields or its message."""

    def format(self, record: logging.LogRecord) -> str:
        entry: dict[str, Any] = {
            "time": datetime.fromtimestamp(record.created, timezone.utc).isoformat(timespec="milliseconds"),
            "level": record.levelname.lower(),
            "logger": record.name,
        }
        name = getattr(record, "request_id", "-")
        if name != "-":
            entry["request_id"] = name
        entry |= getattr(record, "fields", None) or {"message": record.getMessage()}
        if record.exc_info:
            entry["exception"] = self.formatException(record.exc_info)
        return json.dumps(entry, default=str)


def configure(log_json: bool, levels: Mapping[str, int] = LEVELS) -> None:
    """Sends the lines of these loggers to stderr: this package's, and in our own server those of uvicorn, which has no
    log of its own, and asyncio."""
    handler = logging.StreamHandler(sys.stderr)
    handler.addFilter(RequestIds())
    handler.setFormatter(JsonLines() if log_json else Lines("%(asctime)s %(levelname)s %(request_id)s %(message)s"))
    # Not `dictConfig`, which closes all handlers, and some of these close their stream.
    for name, level in levels.items():
        logger = logging.getLogger(name)
        logger.handlers[:] = [handler]
        logger.setLevel(level)


def selection_entry(prompt: Prompt, outcome: Chosen | Unsure, text: str | None = None) -> dict[str, Any]:
    """What a request's line says of one of its prompts, whose mixture was selected or named, or that no adapter was
    found for; `text`: that of the first `LOGGED_TOKENS` tokens that were probed, if prompts are logged."""
    chosen = None if isinstance(outcome, Unsure) else outcome
    mixture = {} if chosen is None else chosen.selection.mixture
    confidence = outcome.confidence if isinstance(outcome, Unsure) else outcome.selection.confidence
    entry: dict[str, Any] = {
        "prompt_sha256": hashlib.sha256(" ".join(map(str, prompt.ids)).encode()).hexdigest()[:16],
        "adapters": list(mixture),
        "weights": [round(weight, 4) for weight in mixture.values()],
    }
    if confidence is not None:
        entry["confidence"] = round(confidence, 4)
    if text is not None:
        entry["prompt"] = text
        entry["cut"] = len(prompt.probed) > LOGGED_TOKENS
    if chosen is not None:
        entry["named"] = bool(mixture) and not chosen.selection.scores
        entry["probe_ms"] = round(chosen.probe_ms, 1)
        entry["queue_ms"] = round(chosen.queue_ms, 1)
    return entry
