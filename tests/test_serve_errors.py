"""Every failure over real HTTP: the right status, OpenAI's shape, and nothing of the server's inside."""

from __future__ import annotations

import difflib
import json
import logging
from collections.abc import AsyncIterator, Iterator
from typing import Any

import httpx
import pytest
from fastapi import FastAPI
from starlette.exceptions import HTTPException
from starlette.responses import StreamingResponse

from http_server import eventually, log_of, serving
from logo.api import errors
from logo.api.names import Models
from logo.errors import AdapterError, DataError, LoGoError, ModelError, NotFinite, PoolError, StorageError, UsageError
from logo.serving.bodies import CompletionRequest
from logo.serving.error_handlers import install
from logo.serving.guards import GuardSettings, guard

JSON = {"Content-Type": "application/json"}


class OutOfMemoryError(RuntimeError):
    """As torch calls its own."""


def missing() -> StorageError:
    error = StorageError("adapters/x: no such folder")
    error.__cause__ = FileNotFoundError("adapters/x")
    return error


FAILURES: dict[str, BaseException] = {
    "usage": UsageError("k: expected 1 or more"),
    "pool": PoolError("no adapter 'x'\n(did you mean 'y'?)"),
    "adapter": AdapterError("x", "rank " + "9" * 5000),
    "storage": StorageError("adapters/x: not readable"),
    "missing": missing(),
    "model": ModelError("/srv/secret/model is broken"),
    "overflow": NotFinite("the model's output is not finite"),
    "data": DataError("/srv/secret/data is broken"),
    "crash": KeyError("secret"),
    "oom": OutOfMemoryError("CUDA out of memory: secret"),
    "memory": MemoryError(),
    "cpu": RuntimeError("[enforce fail at alloc_cpu.cpp] . DefaultCPUAllocator: can't allocate memory: 9 bytes"),
    "teapot": HTTPException(418, "short and stout", {"X-Tea": "yes"}),
    "busy": errors.too_many(2.4),
    "loading": errors.unavailable("loading", retry_after=0.2),
    "late": errors.timed_out(1.5),
    "unknown": errors.model_not_found("gpt\n" + "4" * 500, " (did you mean 'logo'?)"),
}


def make() -> FastAPI:
    app = FastAPI()
    install(app)

    @app.post("/completions")
    async def completions(request: CompletionRequest) -> str:
        return "fine"

    @app.get("/fail/{name}")
    async def fail(name: str) -> None:
        raise FAILURES[name]

    @app.get("/stream")
    async def stream() -> StreamingResponse:
        async def pieces() -> AsyncIterator[bytes]:
            yield b"data: 1\n\n"
            raise RuntimeError("secret")

        return StreamingResponse(pieces(), media_type="text/event-stream")

    @app.get("/number")
    async def number(n: int) -> int:
        return n

    return app


@pytest.fixture(scope="module")
def client() -> Iterator[httpx.Client]:
    with serving(guard(make(), GuardSettings())) as url, httpx.Client(base_url=url) as client:
        yield client


def failures(caplog: pytest.LogCaptureFixture) -> list[logging.LogRecord]:
    return [record for record in caplog.records if record.levelno >= logging.ERROR]


def problem(answer: httpx.Response, status: int) -> dict[str, Any]:
    assert answer.status_code == status, answer.text
    assert answer.headers["content-type"] == "application/json"
    assert answer.headers["x-request-id"]
    body = answer.json()
    assert body.keys() == {"error"} and body["error"].keys() == {"message", "type", "param", "code"}
    assert "secret" not in answer.text and "Traceback" not in answer.text
    assert "\n" not in body["error"]["message"] and len(body["error"]["message"]) < 600
    return body["error"]  # type: ignore[no-any-return]


INVALID = "invalid_request_error"


@pytest.mark.parametrize(
    ("name", "status", "kind", "code", "message"),
    [
        ("usage", 400, INVALID, None, "k: expected 1 or more"),
        ("pool", 400, INVALID, None, "no adapter 'x' (did you mean 'y'?)"),
        ("adapter", 500, "server_error", "adapter_unusable", "adapter 'x': rank 9999"),
        ("storage", 400, INVALID, None, "adapters/x: not readable"),
        ("missing", 404, INVALID, "not_found", "adapters/x: no such folder"),
        ("model", 500, "server_error", "internal_error", "the server failed to answer (request id req-"),
        ("data", 500, "server_error", "internal_error", "the server failed to answer (request id req-"),
        ("overflow", 500, "server_error", "not_finite", "the model's output is not finite"),
        ("crash", 500, "server_error", "internal_error", "the server failed to answer (request id req-"),
        ("oom", 503, "server_error", "unavailable", "out of memory for this request"),
        ("memory", 503, "server_error", "unavailable", "out of memory for this request"),
        ("cpu", 503, "server_error", "unavailable", "out of memory for this request"),
        ("teapot", 418, INVALID, None, "short and stout"),
        ("busy", 429, "rate_limit_error", "queue_full", "too many requests are waiting; try again in 3 s"),
        ("loading", 503, "server_error", "unavailable", "loading"),
        ("late", 504, "server_error", "timeout", "not answered within 1.5 s"),
        ("unknown", 404, INVALID, "model_not_found", "The model 'gpt\\n4444"),
    ],
)
def test_each_failure_has_its_status(
    client: httpx.Client,
    caplog: pytest.LogCaptureFixture,
    name: str,
    status: int,
    kind: str,
    code: str | None,
    message: str,
) -> None:
    error = problem(client.get(f"/fail/{name}"), status)
    assert (error["type"], error["code"]) == (kind, code)
    assert error["message"].startswith(message)
    if not isinstance(FAILURES[name], errors.ApiError | HTTPException | LoGoError | MemoryError):
        # What nobody foresaw is logged after its answer is sent: waited for, so that no later test finds it.
        eventually(lambda: failures(caplog))


def test_unknown_routes_and_methods(client: httpx.Client) -> None:
    assert problem(client.get("/v2/things"), 404)["message"] == "no route '/v2/things'"
    assert "no route '/%00%0Axx" not in problem(client.get("/%00%0a" + "x" * 5000), 404)["message"]
    answer = client.get("/completions")
    assert problem(answer, 405)["message"] == "'/completions' does not take GET"
    assert answer.headers["allow"] == "POST"


@pytest.mark.parametrize(
    ("body", "message"),
    [
        (b"", "body: Field required"),
        (b"{", "the body is not JSON: Expecting property name enclosed in double quotes at character 1"),
        *((body, "body: Input should be a valid dictionary") for body in (b"[]", b"3", b'"x"')),
        (b"null", "body: "),
        *((body, "the body is not JSON that can be read: ") for body in (b"\xfd\xfe\xff", b'{"model": "\xe9"}')),
        *((body, "the body is not JSON that can be read: ") for body in (b"[" * 100_000, b'{"a":' * 100_000)),
        (b'{"model": "m", "prompt": "\\ud800"}', "prompt: expected Unicode text, found half a surrogate pair"),
        (b'{"model": "\\ud800", "prompt": 1}', "model: expected Unicode text, found half a surrogate pair"),
        (b'{"model": "m", "prompt": "x", "temperature": NaN}', "temperature: Input should be a finite number"),
        (b'{"model": "m", "prompt": "x", "n": 1' + b"0" * 4000 + b"}", "n: "),
        (b'{"model": "m", "prompt": "x", "n": 1' + b"0" * 5000 + b"}", "the body is not JSON that can be read: "),
        (b'{"model": "m"}', "prompt: Field required"),
    ],
    ids=lambda v: v[:40].decode("latin-1") if isinstance(v, bytes) else "",
)
def test_bodies_that_are_no_request(client: httpx.Client, body: bytes, message: str) -> None:
    error = problem(client.post("/completions", content=body, headers=JSON), 400)
    assert error["message"].startswith(message) and error["type"] == INVALID
    found = message.partition(": ")[0]
    assert error["param"] == (None if " " in found or found == "body" else found)


@pytest.mark.parametrize("kind", ["text/plain", "application/x-www-form-urlencoded", "multipart/form-data", None])
def test_content_that_is_not_called_json_is_refused(client: httpx.Client, kind: str | None) -> None:
    """So a page elsewhere cannot post here without asking: browsers send only these types unasked."""
    headers = {"Content-Type": kind} if kind else {}
    content = json.dumps({"model": "m", "prompt": "x"}).encode()
    error = problem(client.post("/completions", content=content, headers=headers), 400)
    assert error["message"].startswith("expected a JSON object and 'Content-Type: application/json'")


def test_a_byte_order_mark_and_a_charset_are_fine(client: httpx.Client) -> None:
    content = b"\xef\xbb\xbf" + json.dumps({"model": "m", "prompt": "ü"}).encode()
    answer = client.post("/completions", content=content, headers={"Content-Type": "application/json; charset=utf-8"})
    assert answer.json() == "fine"


def test_a_crash_is_in_the_log_once_and_with_its_request(
    client: httpx.Client, caplog: pytest.LogCaptureFixture
) -> None:
    with log_of(caplog, "mine-1") as log:
        answer = client.get("/fail/crash", headers={"X-Request-Id": "mine-1"})
        assert problem(answer, 500)["message"] == "the server failed to answer (request id mine-1)"
        eventually(lambda: len(log()) == 2)
    [record] = [record for record in log() if record.name != "logo.access"]
    assert record.exc_info is not None and isinstance(record.exc_info[1], KeyError)


def test_a_stream_that_crashes_is_cut_so_that_the_client_notices(
    client: httpx.Client, caplog: pytest.LogCaptureFixture
) -> None:
    with log_of(caplog, "cut-1") as log:
        with (
            pytest.raises(httpx.RemoteProtocolError),
            client.stream("GET", "/stream", headers={"X-Request-Id": "cut-1"}) as answer,
        ):
            assert answer.status_code == 200
            for piece in answer.iter_bytes():
                assert b"secret" not in piece
        eventually(lambda: [r for r in failures(caplog) if r.exc_info and isinstance(r.exc_info[1], RuntimeError)])
        eventually(lambda: [r for r in log() if r.name == "logo.access"])
    [line] = [r for r in log() if r.name == "logo.access"]
    assert line.__dict__["fields"]["incomplete"] is True
    assert client.get("/number?n=1").json() == 1


@pytest.mark.parametrize(
    ("name", "known", "hint"),
    [
        ("adapter-17x", [f"adapter-{i}" for i in range(20_000)], "adapter-17"),
        ("frenh", [*(f"f{i}" for i in range(19_000)), "french"], "french"),
        ("x" * 4_000_000, ["french", "x" * 100], None),
    ],
    ids=["many names", "many names that begin alike", "a long name"],
)
def test_what_resembles_an_unknown_name_is_found_with_bounded_work(
    name: str, known: list[str], hint: str | None, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Servers look for it between the requests of others."""
    compared: list[str] = []
    ordinary = difflib.get_close_matches

    def counted(word: str, possibilities: list[str], **options: Any) -> list[str]:
        compared.extend(possibilities)
        return ordinary(word, possibilities, **options)

    monkeypatch.setattr(difflib, "get_close_matches", counted)
    with pytest.raises(errors.ApiError) as caught:
        Models("base", known, ["norm"]).mixture_request(name, None)
    assert caught.value.status == 404 and len(caught.value.message) < 300
    assert ("did you mean" in caught.value.message) == (hint is not None)
    assert hint is None or hint in caught.value.message
    assert len(compared) <= 100 and all(len(one) <= 200 for one in compared)
