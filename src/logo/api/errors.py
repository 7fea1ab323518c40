"""Every failure as one answer in OpenAI's format: `{"error": {"message", "type", "param", "code"}}`.

Values of a request are truncated, and internal causes are only logged. This module knows no web framework: the server
turns an `ApiError` into a response.
"""

from __future__ import annotations

import json
import math
from collections.abc import Mapping
from typing import Any

from logo.api.problems import shown
from logo.errors import AdapterError, NotFinite, PoolError, StorageError, StoreFull, UsageError
from logo.protocol import NotReady

INVALID = "invalid_request_error"
SERVER = "server_error"


class ApiError(Exception):
    """An answer that is an error.

    Args:
        status: of HTTP.
        message: one line for people.
        type: OpenAI's kind of error: `invalid_request_error`, `rate_limit_error` or `server_error`.
        param: the field that is wrong.
        code: a word for programs.
        headers: go with the answer.
    """

    def __init__(
        self,
        status: int,
        message: str,
        type: str,
        param: str | None = None,
        code: str | None = None,
        headers: Mapping[str, str] | None = None,
    ) -> None:
        super().__init__(message)
        self.status = status
        self.message = message
        self.type = type
        self.param = param
        self.code = code
        self.headers = dict(headers or {})

    @classmethod
    def of(cls, error: BaseException, request_id: str | None = None) -> ApiError:
        """The answer to any failure, whether before a response has begun or in the middle of a stream."""
        if isinstance(error, ApiError):
            return error
        if isinstance(error, (UsageError, PoolError)):
            return bad_request(shown_line(str(error)))
        if isinstance(error, AdapterError):  # one of the pool: the client only named it, or not even that
            return failed(str(error), "adapter_unusable")
        if isinstance(error, StorageError):
            missing = isinstance(error.__cause__, FileNotFoundError)
            return not_found(shown_line(str(error))) if missing else bad_request(shown_line(str(error)))
        if isinstance(error, NotFinite):
            return failed(str(error), "not_finite")
        if isinstance(error, NotReady):
            return unavailable(shown_line(str(error)), retry_after=1)
        if isinstance(error, StoreFull):  # beside what other requests hold: later there may be room
            return unavailable(shown_line(str(error)), retry_after=1)
        if out_of_memory(error):
            return unavailable("out of memory for this request; send a shorter prompt or ask for fewer tokens")
        return internal(request_id)

    def body(self) -> dict[str, Any]:
        """The JSON object of the answer."""
        return {"error": {"message": self.message, "type": self.type, "param": self.param, "code": self.code}}

    def content(self) -> bytes:
        """The same as it is sent: in ASCII, so that no text can fail to encode."""
        return json.dumps(self.body()).encode("ascii")

    def event(self) -> bytes:
        """The server-sent event with which a stream breaks off."""
        return b"data: " + self.content() + b"\n\n"


def bad_request(message: str, param: str | None = None, code: str | None = None) -> ApiError:
    """400: the request is invalid."""
    return ApiError(400, message, INVALID, param, code)


def unauthorized(message: str = "expected a valid API key as 'Authorization: Bearer KEY', found none") -> ApiError:
    """401: no key, or a wrong one."""
    return ApiError(401, message, INVALID, code="invalid_api_key", headers={"WWW-Authenticate": "Bearer"})


def forbidden(message: str) -> ApiError:
    """403: not allowed from this origin or host, or with this key."""
    return ApiError(403, message, INVALID, code="forbidden")


def not_found(message: str, param: str | None = None, code: str | None = "not_found") -> ApiError:
    """404: there is no such thing."""
    return ApiError(404, message, INVALID, param, code)


def model_not_found(model: str, hint: str = "") -> ApiError:
    """404: no adapter has this name, nor the base model. `hint`: such as `(did you mean 'x'?)`."""
    return not_found(f"The model {shown(model)} does not exist{hint}", "model", "model_not_found")


def too_large(limit: int) -> ApiError:
    """413: a body of more than `limit` bytes. The connection ends, for the rest of the body may still be coming."""
    message = f"expected a body of at most {limit} bytes, found more"
    return ApiError(413, message, INVALID, code="request_too_large", headers={"Connection": "close"})


def too_many(retry_after: float) -> ApiError:
    """429: the queue is full; the client may try again after this many seconds."""
    seconds = _seconds(retry_after)
    message = f"too many requests are waiting; try again in {seconds} s"
    return ApiError(429, message, "rate_limit_error", code="queue_full", headers={"Retry-After": str(seconds)})


def unavailable(message: str, retry_after: float | None = None, *, closing: bool = False) -> ApiError:
    """503: shutting down (`closing` also ends the connection) or out of memory."""
    headers = {} if retry_after is None else {"Retry-After": str(_seconds(retry_after))}
    if closing:
        headers["Connection"] = "close"
    return ApiError(503, message, SERVER, code="unavailable", headers=headers)


def client_left() -> ApiError:
    """499, as nginx logs it: the client has disconnected."""
    return ApiError(499, "the client has left", INVALID, code="client_left")


def timed_out(seconds: float) -> ApiError:
    """504: not answered within the server's time limit."""
    return ApiError(504, f"not answered within {seconds:g} s, the limit of this server", SERVER, code="timeout")


def failed(message: str, code: str) -> ApiError:
    """500 with a reason: the server cannot answer this request, though the request is valid."""
    return ApiError(500, shown_line(message), SERVER, code=code)


def internal(request_id: str | None = None) -> ApiError:
    """500: an internal error. The text does not name the cause; the request id finds it in the log."""
    where = f" (request id {request_id})" if request_id else ""
    return ApiError(500, f"the server failed to answer{where}", SERVER, code="internal_error")


def out_of_memory(error: BaseException) -> bool:
    """True for all exceptions by which Python and torch report it; torch is not imported."""
    if isinstance(error, MemoryError) or any(kind.__name__ == "OutOfMemoryError" for kind in type(error).__mro__):
        return True
    return isinstance(error, RuntimeError) and "DefaultCPUAllocator: can't allocate memory" in str(error)


def shown_line(text: str, limit: int = 500) -> str:
    """A message of ours as one line of bounded length; names in it came from the client."""
    line = " ".join(text.split())
    return line if len(line) <= limit else line[: limit - 1] + "…"


def _seconds(retry_after: float) -> int:
    """`Retry-After` knows whole seconds only."""
    return max(1, math.ceil(retry_after))
