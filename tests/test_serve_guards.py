"""Guards around a real server: keys, hosts, origins, sizes, ids, headers, errors and the log; streams pass through."""

from __future__ import annotations

import asyncio
import io
import json
import logging
import socket
from collections.abc import AsyncIterator, Iterator
from contextlib import contextmanager, redirect_stderr
from typing import Any

import httpx
import pytest
from starlette.applications import Starlette
from starlette.requests import Request
from starlette.responses import JSONResponse, PlainTextResponse, Response, StreamingResponse
from starlette.routing import Route
from starlette.types import Message

from http_server import eventually, log_of, raw, serving
from logo.errors import AdapterError, DataError, NotFinite, PoolError, StorageError, UsageError
from logo.serve import logs
from logo.serve.errors import ApiError, failed
from logo.serve.guards import GuardSettings, guard, response

KEYS, LIMIT = ("key-one", "key-two"), 10_000
JSON = {"Content-Type": "application/json"}
hung_up: list[str] = []


async def _fine(request: Request) -> Response:
    return JSONResponse({"id": request.headers.get("x-request-id", "")})


async def _echo(request: Request) -> Response:
    request.state.logged.update(model="logo\nFAKE LINE", prompt_tokens=3, selections=[{"adapters": ["a"]}])
    return JSONResponse(await request.json())


async def _crash(request: Request) -> Response:
    raise RuntimeError("secret")


async def _stream(request: Request) -> Response:
    async def pieces() -> AsyncIterator[bytes]:
        try:
            for i in range(int(request.query_params.get("count", 3))):
                yield b"data: %d\n\n" % i
                await asyncio.sleep(0.001)
        except asyncio.CancelledError:
            hung_up.append("stream")
            raise
        if "crash" in request.query_params:
            raise RuntimeError("secret")

    return StreamingResponse(pieces(), media_type="text/event-stream")


async def _page(request: Request) -> Response:
    return PlainTextResponse("page")


async def _refused(request: Request, error: Exception) -> Response:
    return response(error)


def make() -> Starlette:
    fine = [Route(path, _fine) for path in ("/health", "/metrics", "/v1/models", "/page/../v1/models")]
    pages = [Route(path, _page) for path in ("/", "/page/app.js")]
    more = [Route("/v1/echo", _echo, methods=["POST"]), Route("/v1/crash", _crash), Route("/v1/stream", _stream)]
    return Starlette(routes=[*fine, *pages, *more], exception_handlers={ApiError: _refused})


@pytest.fixture(scope="module")
def url() -> Iterator[str]:
    origins = ("https://ok.test",)
    settings = GuardSettings(api_keys=KEYS, max_body_bytes=LIMIT, allow_hosts=("logo.test",), cors_origins=origins)
    with serving(guard(make(), settings)) as url:
        yield url


@pytest.fixture
def client(url: str) -> Iterator[httpx.Client]:
    with httpx.Client(base_url=url, headers={"Authorization": f"Bearer {KEYS[0]}"}) as client:
        yield client


@pytest.fixture
def stranger(url: str) -> Iterator[httpx.Client]:
    with httpx.Client(base_url=url) as client:
        yield client


def error(answer: httpx.Response, status: int) -> str:
    assert answer.status_code == status, answer.text
    body = answer.json()["error"]
    assert body.keys() == {"message", "type", "param", "code"}
    assert answer.headers["x-request-id"] and answer.headers["x-content-type-options"] == "nosniff"
    return str(body["message"])


def test_every_path_but_open_ones_needs_a_key(stranger: httpx.Client, url: str) -> None:
    for path in ("/", "/page/app.js", "/health"):
        assert stranger.get(path).status_code == 200
    for path in ("/v1/models", "/metrics", "/nothing", "/v1//", "/page"):
        answer = stranger.get(path)
        assert error(answer, 401).endswith("found none") and answer.headers["www-authenticate"] == "Bearer"
    for dots in (b"/page/../v1/models", b"/page/%2e%2e/v1/models", b"/page/..%2fv1/models", b"//", b"/."):
        answered = raw(url, b"GET " + dots + b" HTTP/1.1\r\nHost: localhost\r\nConnection: close\r\n\r\n")
        assert answered.startswith(b"HTTP/1.1 401 "), dots


@pytest.mark.parametrize(
    "header",
    ["", "Bearer", "Bearer key-on", "Bearer key-onee", "Bearer KEY-ONE", "Basic key-one", "key-one",
     "Bearer key-one key-two", "Bearer key-one,key-two", "Bearer ké", "Bearer " + "x" * 5000],
)  # fmt: skip
def test_no_other_key_does(stranger: httpx.Client, header: str) -> None:
    answer = stranger.get("/v1/models", headers=[(b"Authorization", header.encode("utf-8"))])
    assert error(answer, 401).startswith("expected a valid API key") and "key-o" not in answer.text


def test_only_names_of_this_server_pass(client: httpx.Client, url: str) -> None:
    """Also with two names, or none, which uvicorn's parser refuses itself or hands over."""
    for host in ("127.0.0.1", "localhost:8000", "LOCALHOST", "[::1]:80", "logo.test", "logo.test.:1"):
        assert client.get("/health", headers={"Host": host}).status_code == 200
    for host in ("evil.test", "127.0.0.1.evil.test", "localhost.evil.test:8000", "[::2]", "a@localhost", "x" * 999):
        answer = client.get("/", headers={"Host": host})
        assert error(answer, 403).startswith("Host: expected a name of this server") and len(answer.text) < 400
    assert raw(url, b"GET /health HTTP/1.0\r\n\r\n").startswith(b"HTTP/1.1 403 ")
    two = b"GET /health HTTP/1.1\r\nHost: localhost\r\nHost: evil.test\r\nConnection: close\r\n\r\n"
    assert raw(url, two).startswith((b"HTTP/1.1 400 ", b"HTTP/1.1 403 "))


def test_pages_of_other_origins_may_read_and_change_nothing(client: httpx.Client, stranger: httpx.Client) -> None:
    own = str(client.base_url).rstrip("/")
    for origin, status in (
        (own, 200),
        ("https://ok.test", 200),
        ("https://logo.test", 200),  # a proxy's name
        ("https://evil.test", 403),
        ("http://localhost:1", 403),
        ("null", 403),
        ("http://[", 403),
    ):
        assert client.post("/v1/echo", json={}, headers={"Origin": origin}).status_code == status, origin
    names = "authorization,content-type,x-stainless-lang"  # as OpenAI's client asks for them
    asked = {"Access-Control-Request-Method": "POST", "Access-Control-Request-Headers": names}
    preflight = stranger.options("/v1/echo", headers={"Origin": "https://ok.test", **asked})
    assert preflight.headers["access-control-allow-origin"] == "https://ok.test"
    assert preflight.headers["access-control-allow-headers"] == names
    refused = stranger.options("/v1/echo", headers={"Origin": "https://evil.test", **asked})
    assert refused.status_code == 400 and "access-control-allow-origin" not in refused.headers
    for one, path in ((client, "/v1/models"), (stranger, "/v1/models"), (client, "/nothing")):  # a page can read why
        headers = one.get(path, headers={"Origin": "https://ok.test"}).headers
        assert headers["access-control-allow-origin"] == "https://ok.test"


@pytest.mark.parametrize("origin", ["", "ok.test", "https://ok.test/"])
def test_keys_and_origins_that_are_none_are_refused(origin: str) -> None:
    with pytest.raises(UsageError, match="--api-key"):
        GuardSettings(api_keys=("fine", "a b"))
    with pytest.raises(UsageError, match="--cors: expected"):
        GuardSettings(cors_origins=("*", "http://localhost:3000", origin))


def test_every_answer_has_an_id_and_the_security_headers(client: httpx.Client) -> None:
    made = [client.get("/v1/models").headers["x-request-id"] for _ in range(2)]
    assert made[0] != made[1] and made[0].startswith("req-")
    assert client.get("/v1/models", headers={"X-Request-Id": "Mine_1.2-3"}).headers["x-request-id"] == "Mine_1.2-3"
    for name in ("with space", "x" * 129, "a\tb"):
        assert client.get("/v1/models", headers={"X-Request-Id": name}).headers["x-request-id"].startswith("req-")
    for path in ("/", "/v1/models", "/nothing", "/v1/crash", "/v1/stream"):
        headers = client.get(path).headers
        assert headers["x-content-type-options"] == "nosniff" and headers["referrer-policy"] == "no-referrer"
        assert "unsafe" not in (policy := headers["content-security-policy"]) and "default-src 'none'" in policy


def test_bodies_that_are_too_large_are_refused_and_the_answer_is_read(client: httpx.Client, url: str) -> None:
    fits = json.dumps({"x": "y" * (LIMIT - 9)}).encode()
    assert len(fits) == LIMIT and client.post("/v1/echo", content=fits).status_code == 200
    for size in (LIMIT + 1, 10_000_000):
        assert error(client.post("/v1/echo", content=b"x" * size), 413).startswith("expected a body of at most")

        def pieces(size: int = size) -> Iterator[bytes]:
            yield from (b"x" * 5000 for _ in range(size // 5000 + 1))

        assert error(client.post("/v1/echo", content=pieces()), 413)
    head = "POST /v1/echo HTTP/1.1\r\nHost: localhost\r\nAuthorization: Bearer key-one\r\n"
    endless = f"{head}Transfer-Encoding: chunked\r\n\r\n2711\r\n".encode() + b"x" * 10_001 + b"\r\n"
    answer = raw(url, endless)  # the answer is there though the body has no end
    assert answer.startswith(b"HTTP/1.1 413 ") and b"connection: close" in answer.lower()
    for length in ("-1", "x", "1, 2", "9" * 5000):
        answer = raw(url, f"{head}Connection: close\r\nContent-Length: {length}\r\n\r\n".encode())
        assert answer.split(b" ")[1] in (b"400", b"413"), length


def test_streams_arrive_piece_by_piece_and_end_when_the_client_hangs_up(
    client: httpx.Client, caplog: pytest.LogCaptureFixture
) -> None:
    assert client.get("/v1/stream").text == "data: 0\n\ndata: 1\n\ndata: 2\n\n"
    before = len(hung_up)
    with log_of(caplog, "stream-1") as log:
        headers = {"X-Request-Id": "stream-1"}
        with client.stream("GET", "/v1/stream", params={"count": 1_000_000}, headers=headers) as answer:
            assert next(answer.iter_raw()).startswith(b"data: 0\n\n")  # while the server is far from done
        eventually(lambda: len(hung_up) > before)
        eventually(log)
    [record] = log()
    assert record.name == "logo.access" and record.__dict__["fields"]["disconnected"] is True


def test_a_client_that_hangs_up_in_its_body_does_no_harm(
    url: str, client: httpx.Client, caplog: pytest.LogCaptureFixture
) -> None:
    host, port = url.removeprefix("http://").split(":")
    with log_of(caplog, "body-1") as log:
        with socket.create_connection((host, int(port))) as connection:
            connection.sendall(
                b"POST /v1/echo HTTP/1.1\r\nHost: localhost\r\nAuthorization: Bearer key-one\r\n"
                b'X-Request-Id: body-1\r\nContent-Length: 100\r\n\r\n{"a":'
            )
        eventually(log)
    assert {record.name for record in log()} == {"logo.access"}
    assert client.post("/v1/echo", json={"a": 1}).json() == {"a": 1}


def test_a_crash_is_answered_and_logged_once(client: httpx.Client, caplog: pytest.LogCaptureFixture) -> None:
    """A stream that crashes is cut, so that the client notices."""
    with log_of(caplog, "mine-1") as log:
        answer = client.get("/v1/crash", headers={"X-Request-Id": "mine-1"})
        assert "secret" not in answer.text and answer.status_code == 500
        with pytest.raises(httpx.RemoteProtocolError):
            client.get("/v1/stream", params={"crash": 1}, headers={"X-Request-Id": "mine-1"})
        eventually(lambda: len(log()) == 4)
    crashes = [record for record in log() if record.name != "logo.access"]
    assert all(record.exc_info and isinstance(record.exc_info[1], RuntimeError) for record in crashes)
    assert [r.__dict__["fields"].get("incomplete") for r in log() if r.name == "logo.access"] == [None, True]


@contextmanager
def logged(log_json: bool) -> Iterator[io.StringIO]:
    """What is written to stderr inside the block."""
    names = ("logo", "uvicorn", "uvicorn.error", "uvicorn.access", "asyncio")
    kept = [(logger := logging.getLogger(name), logger.handlers[:], logger.level) for name in names]
    with redirect_stderr(io.StringIO()) as written:
        try:
            logs.configure(log_json)
            yield written
        finally:
            for logger, handlers, number in kept:
                logger.handlers[:] = handlers
                logger.setLevel(number)


@pytest.mark.parametrize("log_json", [True, False])
def test_each_request_is_a_line_that_holds_no_secret(log_json: bool) -> None:
    with logged(log_json) as written, serving(guard(make(), GuardSettings(api_keys=KEYS))) as url:
        headers = {"Authorization": f"Bearer {KEYS[0]}", "X-Request-Id": "r1", "Cookie": "biscuit"}
        httpx.post(f"{url}/v1/echo?query=hidden", json={"prompt": "private"}, headers=headers)
        httpx.get(f"{url}/v1/models", headers={"Authorization": "Bearer wrong-key"})
        httpx.get(f"{url}/v1/%0aFAKE%20LINE", headers=headers)
        httpx.get(f"{url}/health")
    lines = written.getvalue().splitlines()
    assert len(lines) == 3
    for secret in (*KEYS, "wrong-key", "hidden", "query", "private", "biscuit", "Bearer"):
        assert secret not in written.getvalue()
    if log_json:
        entries: list[dict[str, Any]] = [json.loads(line) for line in lines]
        assert [(one["path"], one["status"]) for one in entries] == [
            ("/v1/echo", 200),
            ("/v1/models", 401),
            ("/v1/\\nFAKE LINE", 404),
        ]
        first = entries[0]
        assert (first["request_id"], first["model"], first["prompt_tokens"]) == ("r1", "logo\nFAKE LINE", 3)
        assert first["ms"] >= 0 and first["selections"] and first["time"].endswith("+00:00")
    else:
        assert " INFO r1 POST /v1/echo 200 ms=" in lines[0]
        assert lines[0].endswith(' model="logo\\nFAKE LINE" prompt_tokens=3')


def missing() -> StorageError:
    found = StorageError("adapters/x: no such folder")
    found.__cause__ = FileNotFoundError("adapters/x")
    return found


class OutOfMemoryError(RuntimeError):
    """As torch calls its own."""


@pytest.mark.parametrize(
    ("cause", "status", "said"),
    [
        (UsageError("k: expected 1 or more"), 400, "k: expected 1 or more"),
        (PoolError("no adapter 'x'\n(did you mean 'y'?)"), 400, "no adapter 'x' (did you mean 'y'?)"),
        (AdapterError("x", "rank " + "9" * 5000), 500, "adapter 'x': rank 99"),
        (StorageError("adapters/x: not readable"), 400, "adapters/x: not readable"),
        (missing(), 404, "adapters/x: no such folder"),
        (NotFinite("the model's output is not finite"), 500, "the model's output is not finite"),
        (DataError("/srv/secret/data is broken"), 500, "the server failed to answer (request id r1)"),
        (KeyError("secret"), 500, "the server failed to answer (request id r1)"),
        (OutOfMemoryError("CUDA out of memory: secret"), 503, "out of memory for this request"),
        (MemoryError(), 503, "out of memory for this request"),
        (failed("too long", "timeout", 504), 504, "too long"),
    ],
)
def test_every_failure_has_an_answer(cause: Exception, status: int, said: str) -> None:
    found = ApiError.of(cause, "r1")
    assert found.status == status and found.message.startswith(said)
    assert len(found.message) <= 500 and "secret" not in found.content().decode() and "\n" not in found.message


def test_websockets_are_turned_away() -> None:
    sent: list[Message] = []

    async def send(message: Message) -> None:
        sent.append(message)

    async def receive() -> Message:
        return {"type": "websocket.connect"}

    scope = {"type": "websocket", "path": "/v1/models", "headers": [], "query_string": b""}
    asyncio.run(guard(make(), GuardSettings())(scope, receive, send))
    assert sent == [{"type": "websocket.close", "code": 1008}]
