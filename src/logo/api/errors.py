"""`ApiError`: every failure as an answer in OpenAI's form, `{"error": {"message", "type", "param", "code"}}`.

Messages show values of a request shortened, and internal errors only go to the log. This module knows no web framework.
"""

from __future__ import annotations

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
        line = shown_line(str(error))
        if isinstance(error, ApiError):
            return error
        if isinstance(error, Unsure):  # its own advice names options of the command line
            return bad_request(f"{error.reason}; name an adapter or the base model as 'model'", None, "no_adapter_fits")
        if isinstance(error, StorageError) and isinstance(error.__cause__, FileNotFoundError):
            return not_found(line)
        if isinstance(error, (UsageError, PoolError, StorageError)):
            return bad_request(line)
        if isinstance(error, AdapterError):  # an adapter of the pool: the request is not to blame
            return failed(line, "adapter_unusable")
        if isinstance(error, NotFinite):
            return failed(line, "not_finite")
        if isinstance(error, (NotReady, CacheFull)):  # there may be room once other requests are done
            headers = {"Retry-After": "1"}
            if isinstance(error, NotReady):
                headers["Connection"] = "close"
            return failed(line, "unavailable", 503, headers)
        if is_out_of_memory(error):
            advice = "out of memory for this request; send a shorter prompt or ask for fewer tokens"
            return failed(advice, "unavailable", 503)
        # The log holds the cause under this id.
        where = f" (request id {request_id})" if request_id else ""
        return failed(f"the server failed to answer{where}", "internal_error")

    def body(self) -> dict[str, Any]:
        """The JSON object of the answer."""
        return {"error": {"message": self.message, "type": self.type, "param": self.param, "code": self.code}}


def bad_request(
    message: str,
    param: str | None = None,
    code: str | None = None,
    status: int = 400,
    headers: Mapping[str, str] | None = None,
) -> ApiError:
    """The client has to ask for something else; `param` is the field, `status` is below 500."""
    return ApiError(status, message, "invalid_request_error", param, code, headers or {})


def not_found(message: str, param: str | None = None, code: str = "not_found") -> ApiError:
    """404: the requested thing does not exist."""
    return bad_request(message, param, code, 404)


def model_not_found(model: str, hint: str = "", param: str = "model") -> ApiError:
    """404: no adapter has this name, nor the base model. `hint`: such as `(did you mean 'x'?)`."""
    return not_found(f"The model {shown(model)} does not exist{hint}", param, "model_not_found")


def too_long(context: int, prompt: int, answer: int, param: str, holder: str = "this model's context") -> ApiError:
    """400: the tokens of a prompt and of its answer, the most that it may have, are more than the `context` of the
    `holder`; `param` is the field that asks for too much."""
    counts = f"found {prompt} in the prompt and {answer} for the answer; send a shorter prompt or ask for less"
    return bad_request(f"{holder} holds {context} tokens: {counts}", param, "context_length_exceeded")


def forbidden(message: str, param: str | None = None) -> ApiError:
    """403: this key, host, origin or folder is not allowed."""
    return bad_request(message, param, "forbidden", 403)


def failed(message: str, code: str, status: int = 500, headers: Mapping[str, str] | None = None) -> ApiError:
    """The server cannot answer a request that is correct; `status` is 500 or above."""
    return ApiError(status, shown_line(message), "server_error", None, code, headers or {})


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
