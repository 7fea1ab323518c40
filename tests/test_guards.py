"""What requests pass before an app sees them, around a small app: keys, hosts, origins, sizes of bodies, ids."""

from __future__ import annotations

import json
import logging
import socket
from collections.abc import Iterator
from dataclasses import dataclass, replace
from typing import Any

import httpx
import pytest
from starlette.applications import Starlette
from starlette.requests import Request
from starlette.responses import JSONResponse, PlainTextResponse, Response, StreamingResponse
from starlette.routing import Route

from http_server import eventually, raw, serving
from logo.api.guards import GuardSettings
from logo.api.layers import guard

KEY, TEAM = "secret-operator", "secret-team"
LIMIT = 1_000
ECHO, KIND = "/v1/echo", {"Content-Type": "application/json"}
HEAD = f"POST {ECHO} HTTP/1.1\r\nHost: localhost\r\nAuthorization: Bearer {KEY}\r\n"


def small_app() -> Starlette:
    async def text(request: Request) -> Response:
        return PlainTextResponse("ok")

    async def echo(request: Request) -> Response:
        body = await request.body()
        return JSONResponse({"size": len(body), "adapters": request.state.adapters})

    async def stream(request: Request) -> Response:
        return StreamingResponse(iter([b"data: 0\n\n", b"data: [DONE]\n\n"]), media_type="text/event-stream")

    paths = ("/", "/page/page.js", "/health", "/ready", "/metrics", "/v1/models")
    routes = [Route(path, text) for path in paths]
    return Starlette(routes=[*routes, Route(ECHO, echo, methods=["POST"]), Route("/v1/stream", stream)])


@dataclass(frozen=True)
class Guarded:
    """The app behind its guards, and the key that is sent; empty: none."""

    url: str
    key: str = KEY

    def ask(self, path: str, body: bytes | Iterator[bytes] | None = None, **headers: str) -> httpx.Response:
        own = {"Authorization": f"Bearer {self.key}"} if self.key else {}
        method = "GET" if body is None else "POST"
        return httpx.request(method, self.url + path, content=body, headers={**own, **headers})


@pytest.fixture(scope="module")
def server() -> Iterator[Guarded]:
    settings = GuardSettings(
        api_keys=(KEY,),
        max_body_bytes=LIMIT,
        allow_hosts=("logo.test",),
        cors_origins=("https://ok.test",),
        key_adapters={TEAM: ("team/*",)},
    )
    with serving(guard(small_app(), settings)) as url:
        yield Guarded(url)


def refused(answer: httpx.Response, status: int) -> str:
    """The message of an error in OpenAI's form."""
    assert answer.status_code == status, answer.text
    error = answer.json()["error"]
    assert {"message", "type", "param", "code"} <= set(error) and KEY not in answer.text
    return str(error["message"])


def test_every_path_but_open_ones_needs_a_key(server: Guarded) -> None:
    stranger = replace(server, key="")
    for path in ("/", "/page/page.js", "/health", "/ready"):
        assert stranger.ask(path).status_code == 200
    for path in ("/v1/models", "/metrics", "/nothing", "/v1//", "/page"):
        answer = stranger.ask(path)
        assert refused(answer, 401).endswith("found none") and answer.headers["www-authenticate"] == "Bearer"
    for dots in (b"/page/../v1/models", b"/page/%2e%2e/v1/models", b"/page/..%2fv1/models", b"//", b"/."):
        answered = raw(server.url, b"GET " + dots + b" HTTP/1.1\r\nHost: localhost\r\nConnection: close\r\n\r\n")
        assert answered.startswith(b"HTTP/1.1 401 "), dots


@pytest.mark.parametrize(
    "header",
    ["", "Bearer", f"Bearer {KEY[:-1]}", f"Bearer {KEY}x", f"Bearer {KEY.upper()}", f"Basic {KEY}", KEY,
     f"Bearer {KEY} {KEY}", f"Bearer {KEY},{KEY}", "Bearer ké", "Bearer " + "x" * 5000],
    ids=range(11),
)  # fmt: skip
def test_no_other_key_does(header: str, server: Guarded) -> None:
    answer = httpx.get(f"{server.url}/v1/models", headers=[(b"Authorization", header.encode("utf-8"))])
    assert refused(answer, 401).startswith("expected a valid API key") and KEY[:-1] not in answer.text


def test_a_key_that_is_bound_to_adapters_is_told_to_routes_and_kept_from_the_whole_pool(server: Guarded) -> None:
    team = replace(server, key=TEAM)
    assert team.ask(ECHO, b"{}", **KIND).json()["adapters"] == ["team/*"]
    assert server.ask(ECHO, b"{}", **KIND).json()["adapters"] is None
    for path in ("/metrics", "/v1/load_lora_adapter", "/v1/unload_lora_adapter"):
        assert refused(team.ask(path), 403).startswith("this API key is bound to some adapters")


def test_only_names_of_this_server_pass(server: Guarded) -> None:
    """Also with two names, or none, which uvicorn's parser refuses itself or hands over."""
    for host in ("127.0.0.1", "localhost:8000", "LOCALHOST", "[::1]:80", "logo.test", "logo.test.:1"):
        assert server.ask("/health", Host=host).status_code == 200
    for host in ("evil.test", "127.0.0.1.evil.test", "localhost.evil.test:8000", "[::2]", "a@localhost", "x" * 999):
        answer = server.ask("/", Host=host)
        assert refused(answer, 403).startswith("Host: expected a name of this server") and len(answer.text) < 400
    assert raw(server.url, b"GET /health HTTP/1.0\r\n\r\n").startswith(b"HTTP/1.1 403 ")
    two = b"GET /health HTTP/1.1\r\nHost: localhost\r\nHost: evil.test\r\nConnection: close\r\n\r\n"
    assert raw(server.url, two).startswith((b"HTTP/1.1 400 ", b"HTTP/1.1 403 "))


def test_pages_of_other_origins_may_read_and_change_nothing(server: Guarded) -> None:
    fine = (server.url, "https://ok.test", "https://logo.test")  # its own page, that of a proxy's name among them
    for origin in (*fine, "https://evil.test", "http://localhost:1", "null", "http://["):
        answer = server.ask(ECHO, b"{}", Origin=origin, **KIND)
        assert answer.status_code == (200 if origin in fine else 403), origin
        cors = answer.headers.get("access-control-allow-origin")
        assert cors == ("https://ok.test" if origin == "https://ok.test" else None)
    names = "authorization,content-type,x-stainless-lang"  # as OpenAI's client asks for them
    asked = {"Access-Control-Request-Method": "POST", "Access-Control-Request-Headers": names}
    preflight = httpx.options(server.url + ECHO, headers={"Origin": "https://ok.test", **asked})
    assert preflight.headers["access-control-allow-origin"] == "https://ok.test"
    assert preflight.headers["access-control-allow-headers"] == names
    evil = httpx.options(server.url + ECHO, headers={"Origin": "https://evil.test", **asked})
    assert evil.status_code == 400 and "access-control-allow-origin" not in evil.headers
    stranger = replace(server, key="")
    for client, path in ((server, "/v1/models"), (stranger, "/v1/models"), (server, "/nothing")):  # a page can read why
        assert client.ask(path, Origin="https://ok.test").headers["access-control-allow-origin"] == "https://ok.test"


def test_every_answer_has_an_id_and_the_security_headers(server: Guarded) -> None:
    def name(**headers: str) -> str:
        return server.ask("/v1/models", **headers).headers["x-request-id"]

    first, second = name(), name()
    assert first != second and first.startswith("req-") and name(**{"X-Request-Id": "Mine_1.2-3"}) == "Mine_1.2-3"
    for given in ("with space", "x" * 129, "a\tb"):
        assert name(**{"X-Request-Id": given}).startswith("req-")
    for path in ("/", "/v1/models", "/nothing", "/v1/stream"):
        headers = server.ask(path).headers
        assert headers["x-content-type-options"] == "nosniff" and headers["referrer-policy"] == "no-referrer"
        assert "unsafe" not in (policy := headers["content-security-policy"]) and "default-src 'none'" in policy


def test_bodies_that_are_too_large_are_refused_and_the_answer_is_read(server: Guarded) -> None:
    assert server.ask(ECHO, b"x" * LIMIT).json()["size"] == LIMIT
    for size in (LIMIT + 1, 10_000_000):
        assert refused(server.ask(ECHO, b"x" * size), 413).startswith("expected a body of at most 1000 bytes")
        refused(server.ask(ECHO, (b"x" * 500 for _ in range(size // 500 + 1))), 413)
    forever = f"{HEAD}Transfer-Encoding: chunked\r\n\r\n{LIMIT + 1:x}\r\n".encode() + b"x" * (LIMIT + 1) + b"\r\n"
    answered = raw(server.url, forever)  # the answer is there though the body has no end
    assert answered.startswith(b"HTTP/1.1 413 ") and b"connection: close" in answered.lower()
    for length in ("-1", "x", "1, 2", "9" * 5000):
        answered = raw(server.url, f"{HEAD}Connection: close\r\nContent-Length: {length}\r\n\r\n".encode())
        assert answered.split(b" ")[1] in (b"400", b"413"), length


def test_a_body_is_read_only_from_clients_that_may_send_it(server: Guarded) -> None:
    """The answer to a stranger does not wait for the body."""
    stranger = HEAD.replace(KEY, "another") + "Connection: close\r\nContent-Length: 400000000\r\n\r\n{"
    assert raw(server.url, stranger.encode()).startswith(b"HTTP/1.1 401 ")


def test_a_client_that_hangs_up_in_its_body_does_no_harm(server: Guarded, caplog: pytest.LogCaptureFixture) -> None:
    def unanswered() -> list[dict[str, Any]]:  # the line of an earlier request may come late: it has a status
        lines = [record.__dict__["fields"] for record in caplog.records if record.name == "logo.access"]
        return [line for line in lines if line["status"] == 0]

    with caplog.at_level(logging.INFO, "logo.access"):
        host, port = server.url.removeprefix("http://").split(":")
        with socket.create_connection((host, int(port))) as connection:
            connection.sendall(f'{HEAD}Content-Length: 100\r\n\r\n{{"a":'.encode())
        eventually(unanswered)
    assert [line["disconnected"] for line in unanswered()] == [True]
    assert json.loads(server.ask(ECHO, b"{}").text)["size"] == 2
