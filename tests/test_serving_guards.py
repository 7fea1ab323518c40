"""Guards around a real server: keys, hosts, sizes, ids, headers; streams and hang-ups pass through them."""

from __future__ import annotations

import asyncio
import gzip
import json
import logging
import socket
from collections.abc import AsyncIterator, Iterator
from typing import Any

import httpx
import pytest
from fastapi import FastAPI, Request
from starlette.responses import HTMLResponse, Response, StreamingResponse

from http_server import eventually, raw, serving
from logo.errors import UsageError
from logo.serving.errors import install
from logo.serving.guards import GuardSettings, guard, is_loopback

KEYS = ("key-one", "key-two")
LIMIT = 10_000
JSON = {"Content-Type": "application/json"}


class App(FastAPI):
    """Counts what is told from outside only with difficulty."""

    hung_up = 0
    bytes_read = 0


def make() -> App:
    app = App()
    install(app)

    @app.get("/")
    @app.get("/page/app.js")
    async def page() -> Response:
        return HTMLResponse("<p>page</p>")

    @app.get("/health")
    @app.get("/metrics")
    @app.get("/v1/models")
    @app.get("/page/../v1/models")
    async def fine(request: Request) -> dict[str, str]:
        return {"id": request.state.request_id}

    @app.post("/v1/echo")
    async def echo(request: Request, body: dict[str, Any]) -> dict[str, Any]:
        request.state.model = "logo\nFAKE LINE"
        request.state.prompt_tokens, request.state.completion_tokens = 3, 4
        return body

    @app.post("/v1/read")
    async def read(request: Request) -> int:
        async for piece in request.stream():
            app.bytes_read += len(piece)
        return app.bytes_read

    @app.post("/v1/ignore")
    async def ignore() -> str:
        return "fine"

    @app.get("/v1/stream")
    async def stream(count: int = 3) -> StreamingResponse:
        async def pieces() -> AsyncIterator[bytes]:
            try:
                for i in range(count):
                    yield b"data: %d\n\n" % i
                    await asyncio.sleep(0.001)
            except asyncio.CancelledError:
                app.hung_up += 1
                raise

        return StreamingResponse(pieces(), media_type="text/event-stream")

    @app.get("/v1/crash")
    async def crash() -> None:
        raise RuntimeError("secret")

    return app


APP = make()


@pytest.fixture(scope="module")
def url() -> Iterator[str]:
    settings = GuardSettings(
        api_keys=KEYS, max_body_bytes=LIMIT, allow_hosts=("logo.test",), cors_origins=("https://ok.test",)
    )
    with serving(guard(APP, settings)) as url:
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


# Keys


@pytest.mark.parametrize("path", ["/", "/page/app.js", "/health"])
def test_open_paths_need_no_key(stranger: httpx.Client, path: str) -> None:
    assert stranger.get(path).status_code == 200


@pytest.mark.parametrize("path", ["/v1/models", "/metrics", "/openapi.json", "/nothing", "/v1//", "/page"])
def test_all_others_need_one_whether_they_exist_or_not(stranger: httpx.Client, path: str) -> None:
    answer = stranger.get(path)
    assert error(answer, 401) == "expected a valid API key as 'Authorization: Bearer KEY', found none"
    assert answer.headers["www-authenticate"] == "Bearer" and answer.json()["error"]["code"] == "invalid_api_key"


def test_dots_do_not_lead_out_of_the_page(url: str) -> None:
    for path in (b"/page/../v1/models", b"/page/%2e%2e/v1/models", b"/page/..%2fv1/models", b"//", b"/."):
        answer = raw(url, b"GET " + path + b" HTTP/1.1\r\nHost: localhost\r\nConnection: close\r\n\r\n")
        assert answer.startswith(b"HTTP/1.1 401 "), path


@pytest.mark.parametrize("key", [*KEYS, f" {KEYS[0]}"])
def test_each_key_opens(stranger: httpx.Client, key: str) -> None:
    assert stranger.get("/v1/models", headers={"Authorization": f"bearer {key}"}).status_code == 200


@pytest.mark.parametrize(
    "header",
    ["", "Bearer", "Bearer key-on", "Bearer key-onee", "Bearer KEY-ONE", "Basic key-one", "key-one",
     "Bearer key-one key-two", "Bearer key-one,key-two", "Bearer ké", "Bearer " + "x" * 5000],
)  # fmt: skip
def test_no_other_does(stranger: httpx.Client, header: str) -> None:
    answer = stranger.get("/v1/models", headers=[(b"Authorization", header.encode("utf-8"))])
    assert error(answer, 401).startswith("expected a valid API key")
    assert "key-o" not in answer.text


def test_two_keys_at_once_are_none(stranger: httpx.Client) -> None:
    header = ("Authorization", f"Bearer {KEYS[0]}")
    assert error(stranger.get("/v1/models", headers=[header, header]), 401)


def test_metrics_can_be_open(url: str) -> None:
    with serving(guard(make(), GuardSettings(api_keys=KEYS, open_metrics=True))) as url:
        assert httpx.get(f"{url}/metrics").status_code == 200
        assert httpx.get(f"{url}/metrics/x").status_code == 401
    with serving(guard(make(), GuardSettings())) as url:
        assert httpx.get(f"{url}/v1/models").status_code == 200  # no keys: open


@pytest.mark.parametrize("key", ["", " ", "a b", "a\nb", "kéy"])
def test_keys_that_no_header_can_hold_are_refused(key: str) -> None:
    with pytest.raises(UsageError, match="--api-key"):
        GuardSettings(api_keys=("fine", key))


def test_settings_do_not_show_their_keys() -> None:
    assert "key-one" not in repr(GuardSettings(api_keys=KEYS))


# Hosts


@pytest.mark.parametrize("host", ["127.0.0.1", "localhost:8000", "LOCALHOST", "[::1]:80", "logo.test", "logo.test.:1"])
def test_names_of_this_server_pass(client: httpx.Client, host: str) -> None:
    assert client.get("/health", headers={"Host": host}).status_code == 200


@pytest.mark.parametrize(
    "host",
    ["evil.test", "127.0.0.1.evil.test", "localhost.evil.test:8000", "0.0.0.0", "[::2]", "a@localhost", "x" * 999],
)
def test_other_names_do_not(client: httpx.Client, host: str) -> None:
    answer = client.get("/", headers={"Host": host})
    assert error(answer, 403).startswith("Host: expected a name of this server, found '")
    assert len(answer.text) < 400


def test_a_request_without_a_host_name_does_not(url: str) -> None:
    assert raw(url, b"GET /health HTTP/1.0\r\n\r\n").startswith(b"HTTP/1.1 403 ")
    assert raw(url, b"GET /health HTTP/1.1\r\nConnection: close\r\n\r\n").startswith(b"HTTP/1.1 400 ")
    two = b"GET /health HTTP/1.1\r\nHost: localhost\r\nHost: evil.test\r\nConnection: close\r\n\r\n"
    assert raw(url, two).startswith(b"HTTP/1.1 400 ")


def test_servers_for_other_machines_take_all_names_unless_told() -> None:
    with serving(guard(make(), GuardSettings(host="0.0.0.0"))) as url:
        assert httpx.get(f"{url}/health", headers={"Host": "any.test"}).status_code == 200
    with serving(guard(make(), GuardSettings(host="0.0.0.0", allow_hosts=("mine.test",)))) as url:
        assert httpx.get(f"{url}/health", headers={"Host": "mine.test"}).status_code == 200
        assert httpx.get(f"{url}/health", headers={"Host": "any.test"}).status_code == 403


def test_what_is_loopback() -> None:
    assert all(is_loopback(host) for host in ("127.0.0.1", "127.8.9.1", "::1", "localhost", "Localhost"))
    assert not any(is_loopback(host) for host in ("0.0.0.0", "::", "10.0.0.1", "example.test", ""))


# Sizes


@pytest.mark.parametrize("route", ["/v1/echo", "/v1/read", "/v1/ignore", "/nothing"])
def test_an_announced_length_above_the_limit_is_refused_unread(client: httpx.Client, route: str) -> None:
    before = APP.bytes_read
    for _ in range(5):
        answer = client.post(route, content=b'"' + b"x" * 10_000_000 + b'"', headers=JSON)
        assert error(answer, 413) == f"expected a body of at most {LIMIT} bytes, found more"
    assert APP.bytes_read == before


def test_the_limit_itself_is_allowed(client: httpx.Client) -> None:
    body = json.dumps({"x": "y" * (LIMIT - 9)}).encode()
    assert len(body) == LIMIT
    assert client.post("/v1/echo", content=body, headers=JSON).status_code == 200
    assert error(client.post("/v1/echo", content=body + b" ", headers=JSON), 413)


@pytest.mark.parametrize("route", ["/v1/echo", "/v1/read"])
def test_a_chunked_body_is_refused_as_soon_as_it_is_too_long(client: httpx.Client, route: str) -> None:
    def pieces() -> Iterator[bytes]:
        for _ in range(2000):
            yield b"x" * 5000

    before = APP.bytes_read
    for _ in range(5):
        assert error(client.post(route, content=pieces(), headers=JSON), 413)
    assert APP.bytes_read - before <= 5 * LIMIT


def test_an_endless_chunked_body_ends_with_the_answer(url: str) -> None:
    """A client that never stops sending is cut off: the answer is there though the body has no end."""
    head = (
        f"POST /v1/echo HTTP/1.1\r\nHost: localhost\r\nAuthorization: Bearer {KEYS[0]}\r\n"
        "Content-Type: application/json\r\nTransfer-Encoding: chunked\r\n\r\n"
    ).encode()
    answer = raw(url, head + b"2710\r\n" + b"x" * 10_000 + b"\r\n2\r\nyy\r\n")
    assert answer.startswith(b"HTTP/1.1 413 ") and b"connection: close" in answer.lower()


def test_a_short_chunked_body_is_fine(client: httpx.Client) -> None:
    answer = client.post("/v1/echo", content=iter([b'{"a"', b": 1", b"}"]), headers=JSON)
    assert answer.json() == {"a": 1}


def test_lengths_that_are_none_are_refused(url: str) -> None:
    for length in (b"-1", b"x", b"1, 2", b"9" * 5000):
        head = b"POST /v1/ignore HTTP/1.1\r\nHost: localhost\r\nAuthorization: Bearer key-one\r\nConnection: close\r\n"
        status = raw(url, head + b"Content-Length: " + length + b"\r\n\r\n").split(b" ")[1]
        assert status in (b"400", b"413"), length


def test_a_compressed_body_is_not_unpacked(client: httpx.Client) -> None:
    bomb = gzip.compress(b'{"a": "' + b"x" * 1_000_000 + b'"}')
    assert len(bomb) < LIMIT
    assert error(client.post("/v1/echo", content=bomb, headers=JSON | {"Content-Encoding": "gzip"}), 400)


# Ids and headers


def test_an_id_is_made_or_taken_over_and_told(client: httpx.Client) -> None:
    made = [client.get("/v1/models") for _ in range(2)]
    assert all(a.headers["x-request-id"] == a.json()["id"] and a.json()["id"].startswith("req-") for a in made)
    assert made[0].json() != made[1].json()
    answer = client.get("/v1/models", headers={"X-Request-Id": "Mine_1.2-3"})
    assert answer.headers["x-request-id"] == answer.json()["id"] == "Mine_1.2-3"


@pytest.mark.parametrize("name", ["", "a b", "a\tb", "é", "x" * 129, "a;b", "<b>"])
def test_ids_that_are_not_sane_are_replaced(client: httpx.Client, name: str) -> None:
    answer = client.get("/v1/models", headers=[(b"X-Request-Id", name.encode())])
    assert answer.headers["x-request-id"].startswith("req-")


@pytest.mark.parametrize("path", ["/", "/v1/models", "/nothing", "/v1/crash", "/v1/stream"])
def test_every_answer_has_the_security_headers(client: httpx.Client, path: str) -> None:
    headers = client.get(path).headers
    assert headers["x-content-type-options"] == "nosniff" and headers["referrer-policy"] == "no-referrer"
    policy = headers["content-security-policy"]
    assert policy.startswith("default-src 'none'; style-src 'self'; script-src 'self'; connect-src 'self'; img-src ")
    assert "unsafe" not in policy and "frame-ancestors 'none'" in policy


def test_cors_is_for_the_given_origins_only(client: httpx.Client, stranger: httpx.Client) -> None:
    asked = {"Access-Control-Request-Method": "POST", "Access-Control-Request-Headers": "authorization, content-type"}
    preflight = stranger.options("/v1/echo", headers={"Origin": "https://ok.test", **asked})
    assert preflight.status_code == 200
    assert preflight.headers["access-control-allow-origin"] == "https://ok.test"
    assert "Authorization" in preflight.headers["access-control-allow-headers"]
    refused = stranger.options("/v1/echo", headers={"Origin": "https://evil.test", **asked})
    assert refused.status_code == 400 and "access-control-allow-origin" not in refused.headers
    # A page can read why it was refused.
    for client_, path in ((client, "/v1/models"), (stranger, "/v1/models"), (client, "/nothing")):
        headers = client_.get(path, headers={"Origin": "https://ok.test"}).headers
        assert headers["access-control-allow-origin"] == "https://ok.test"
        assert "X-Request-Id" in headers["access-control-expose-headers"]
    assert (
        "access-control-allow-origin" not in client.get("/v1/models", headers={"Origin": "https://evil.test"}).headers
    )


def test_cors_is_off_unless_asked_for() -> None:
    with serving(guard(make(), GuardSettings())) as url:
        answer = httpx.get(f"{url}/v1/models", headers={"Origin": "https://ok.test"})
    assert answer.status_code == 200 and not [name for name in answer.headers if name.startswith("access-control")]


# Streams


def test_streams_arrive_piece_by_piece(client: httpx.Client) -> None:
    with client.stream("GET", "/v1/stream", params={"count": 100_000}) as answer:
        pieces = answer.iter_raw()
        assert next(pieces).startswith(b"data: 0\n\n")  # while the server is far from done
    assert client.get("/v1/stream").text == "data: 0\n\ndata: 1\n\ndata: 2\n\n"


def test_a_client_that_hangs_up_ends_its_stream(client: httpx.Client, caplog: pytest.LogCaptureFixture) -> None:
    before = APP.hung_up
    with caplog.at_level(logging.INFO):
        with client.stream("GET", "/v1/stream", params={"count": 1_000_000}) as answer:
            next(answer.iter_raw())
        eventually(lambda: APP.hung_up == before + 1)
        eventually(lambda: [r for r in caplog.records if r.name == "logo.access"])
    [record] = [r for r in caplog.records if r.name == "logo.access"]
    assert record.__dict__["fields"]["disconnected"] is True
    assert not [r for r in caplog.records if r.levelno >= logging.WARNING]


def test_a_client_that_hangs_up_in_the_middle_of_its_body_does_no_harm(
    url: str, client: httpx.Client, caplog: pytest.LogCaptureFixture
) -> None:
    host, port = url.removeprefix("http://").split(":")
    with caplog.at_level(logging.INFO):
        for route in (b"echo", b"read"):
            with socket.create_connection((host, int(port))) as connection:
                connection.sendall(
                    b"POST /v1/" + route + b" HTTP/1.1\r\nHost: localhost\r\nAuthorization: Bearer key-one\r\n"
                    b'Content-Type: application/json\r\nContent-Length: 100\r\n\r\n{"a":'
                )
        eventually(lambda: len([r for r in caplog.records if r.name == "logo.access"]) == 2)
    assert not [r for r in caplog.records if r.levelno >= logging.WARNING]
    assert client.post("/v1/echo", json={"a": 1}).json() == {"a": 1}
