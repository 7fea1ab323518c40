"""Turns every exception of the app into an answer in OpenAI's form; see `logo.api.errors`.

`install` handles `ApiError`, the errors of `logo.errors`, and those of FastAPI and Starlette.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from fastapi import FastAPI, Request
from fastapi.exceptions import RequestValidationError
from starlette.exceptions import HTTPException
from starlette.responses import Response

from logo.api.errors import INVALID, SERVER, ApiError, bad_request, shown_line
from logo.api.validation import shown, validation_message
from logo.errors import LoGoError


def api_error(error: BaseException, request_id: str | None = None) -> ApiError:
    """The answer to any exception: `ApiError.of`, and those of FastAPI and Starlette."""
    if isinstance(error, RequestValidationError):
        message, param = validation_message(error.errors())
        return bad_request(message, param)
    if isinstance(error, HTTPException):
        return _of_starlette(error)
    return ApiError.of(error, request_id)


def response(error: ApiError) -> Response:
    """The HTTP response of an error."""
    return Response(error.content(), error.status, error.headers, "application/json")


def _of_starlette(error: HTTPException) -> ApiError:
    status, headers = error.status_code, error.headers
    if status == 400 and error.__cause__ is not None:  # FastAPI could not read the body
        cause = error.__cause__
        unreadable = f"the body is not JSON that can be read: {type(cause).__name__}"
        return cause if isinstance(cause, ApiError) else bad_request(unreadable)
    kind = SERVER if status >= 500 else INVALID
    code = {404: "not_found", 405: "method_not_allowed"}.get(status)
    return ApiError(status, shown_line(str(error.detail)), kind, code=code, headers=headers or {})


async def _answer(request: Request, error: Exception) -> Response:
    state: Mapping[str, Any] = request.scope.get("state", {})
    answer = api_error(error, state.get("request_id"))
    if type(error) is HTTPException and error.status_code in (404, 405):
        method, path = request.method, shown(request.scope["path"])
        answer.message = f"no route {path}" if error.status_code == 404 else f"{path} does not take {method}"
    return response(answer)


def install(app: FastAPI) -> None:
    """Installs the handlers in an app.

    An unexpected exception is answered with 500 and raised again, as Starlette does, so that `logo.serving.guards` or
    uvicorn logs it.
    """
    for kind in (ApiError, HTTPException, RequestValidationError, LoGoError, MemoryError, Exception):
        app.add_exception_handler(kind, _answer)
