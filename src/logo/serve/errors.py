"""`ApiError`: every failure as an answer in OpenAI's form, `{"error": {"message", "type", "param", "code"}}`.

Messages show values of a request shortened, and internal errors only go to the log. This module knows no web framework.
"""

from __future__ import annotations

import json
import math
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

from logo.errors import (
    AdapterError,
    CacheFull,
    LoGoError,
    NotFinite,
    PoolError,
    StorageError,
    Unsure,
    UsageError,
    is_out_of_memory,
)

INVALID = "invalid_request_error"
SERVER = "server_error"


class NotReady(LoGoError, RuntimeError):
    """No requests are accepted: the server is shutting down, or cannot generate any more."""


@dataclass(eq=False)
class ApiError(Exception):
    """An error answer: the HTTP status, one line for people, OpenAI's type, the wrong field, a word for programs."""

    status: int
    message: str
    type: str
    param: str | None = None
    code: str | None = None
    headers: Mapping[str, str] = field(default_factory=dict)

    def __str__(self) -> str:
        return self.message

    @classmethod
    def of(cls, error: BaseException, request_id: str | None = None) -> ApiError:
        """The answer to any exception, before a response has begun or in the middle of a stream."""
        if isinstance(error, ApiError):
            return error
        if isinstance(error, Unsure):  # its own advice names options of the command line
            advice = "name an adapter or the base model as 'model'"
            return bad_request(f"{error.reason}; {advice}", code="no_adapter_fits")
        if isinstance(error, (UsageError, PoolError)):
            return bad_request(shown_line(str(error)))
        if isinstance(error, AdapterError):  # an adapter of the pool: the request is not to blame
            return failed(str(error), "adapter_unusable")
        if isinstance(error, StorageError):
            missing = isinstance(error.__cause__, FileNotFoundError)
            return not_found(shown_line(str(error))) if missing else bad_request(shown_line(str(error)))
        if isinstance(error, NotFinite):
            return failed(str(error), "not_finite")
        if isinstance(error, (NotReady, CacheFull)):  # there may be room once other requests are done
            return unavailable(shown_line(str(error)), retry_after=1, closing=isinstance(error, NotReady))
        if is_out_of_memory(error):
            return unavailable("out of memory for this request; send a shorter prompt or ask for fewer tokens")
        return internal(request_id)

    def body(self) -> dict[str, Any]:
        """The JSON object of the answer."""
        return {"error": {"message": self.message, "type": self.type, "param": self.param, "code": self.code}}

    def content(self) -> bytes:
        """The same as bytes, in ASCII, so that any text can be encoded."""
        return json.dumps(self.body()).encode("ascii")

    def event(self) -> bytes:
        """The server-sent event that ends a failed stream."""
        return b"data: " + self.content() + b"\n\n"


def bad_request(message: str, param: str | None = None, code: str | None = None) -> ApiError:
    """400: the request can never be answered as it is."""
    return ApiError(400, message, INVALID, param, code)


def unauthorized(found: str = "none") -> ApiError:
    """401: no key, or a wrong one."""
    message = f"expected a valid API key as 'Authorization: Bearer KEY', found {found}"
    return ApiError(401, message, INVALID, code="invalid_api_key", headers={"WWW-Authenticate": "Bearer"})


def forbidden(message: str, param: str | None = None) -> ApiError:
    """403: this key, host, origin or folder is not allowed."""
    return ApiError(403, message, INVALID, param, "forbidden")


def not_found(message: str, param: str | None = None, code: str | None = "not_found") -> ApiError:
    """404: the requested thing does not exist."""
    return ApiError(404, message, INVALID, param, code)


def model_not_found(model: str, hint: str = "", param: str = "model") -> ApiError:
    """404: no adapter has this name, nor the base model. `hint`: such as `(did you mean 'x'?)`."""
    return not_found(f"The model {shown(model)} does not exist{hint}", param, "model_not_found")


def too_large(limit: int) -> ApiError:
    """413: a body of more than `limit` bytes. The connection is closed, since more of the body may follow."""
    message = f"expected a body of at most {limit} bytes, found more"
    return ApiError(413, message, INVALID, code="request_too_large", headers={"Connection": "close"})


def too_many(retry_after: int) -> ApiError:
    """429: the queue is full; the client may try again after so many seconds."""
    message = f"too many requests are waiting; try again in {retry_after} s"
    return ApiError(429, message, "rate_limit_error", code="queue_full", headers={"Retry-After": str(retry_after)})


def unavailable(message: str, retry_after: float | None = None, *, closing: bool = False) -> ApiError:
    """503: the server is draining (`closing` closes the connection), busy or out of memory."""
    headers = {} if retry_after is None else {"Retry-After": str(math.ceil(retry_after))}
    headers |= {"Connection": "close"} if closing else {}
    return ApiError(503, message, SERVER, code="unavailable", headers=headers)


def client_left() -> ApiError:
    """499, as in nginx's logs: the client has closed the connection."""
    return ApiError(499, "the client has left", INVALID, code="client_left")


def timed_out(seconds: float) -> ApiError:
    """504: not answered within the server's limit."""
    return ApiError(504, f"not answered within {seconds:g} s, the limit of this server", SERVER, code="timeout")


def failed(message: str, code: str) -> ApiError:
    """500 with a reason: the server cannot answer a request that is correct."""
    return ApiError(500, shown_line(message), SERVER, code=code)


def internal(request_id: str | None = None) -> ApiError:
    """500: an internal error. The message names only the request id, under which the log holds the cause."""
    where = f" (request id {request_id})" if request_id else ""
    return ApiError(500, f"the server failed to answer{where}", SERVER, code="internal_error")


def shown_line(text: str, limit: int = 500) -> str:
    """A message as one line of bounded length, since it may hold names from the client."""
    line = " ".join(text.split())
    return line if len(line) <= limit else line[: limit - 1] + "…"


def shown(text: str, most: int = 80) -> str:
    """A text for a message, quoted: one line of at most 80 printable characters."""
    return f"'{plain(text, most)}'"


def plain(text: str, most: int = 80) -> str:
    """A text cut to so many characters, with line breaks, control characters and surrogates escaped."""
    cut = text if len(text) <= most else text[: most - 1] + "…"
    return "".join(c if c.isprintable() else c.encode("unicode_escape").decode("ascii") for c in cut)
