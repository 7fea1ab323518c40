"""Bodies that are too large: refused as soon as it can be known, with an answer that the client gets to read."""

from __future__ import annotations

import json
from collections.abc import Iterator

import httpx
import pytest

from guarded_app import KEYS, LIMIT, error, make
from http_server import raw, serving
from logo.serving.guards import GuardSettings, guard

JSON = {"Content-Type": "application/json"}
APP = make()


@pytest.fixture(scope="module")
def url() -> Iterator[str]:
    with serving(guard(APP, GuardSettings(api_keys=KEYS, max_body_bytes=LIMIT))) as url:
        yield url


@pytest.fixture
def client(url: str) -> Iterator[httpx.Client]:
    with httpx.Client(base_url=url, headers={"Authorization": f"Bearer {KEYS[0]}"}) as client:
        yield client


def head(*lines: str) -> bytes:
    """The beginning of a request by hand."""
    first = (
        "POST /v1/echo HTTP/1.1",
        "Host: localhost",
        f"Authorization: Bearer {KEYS[0]}",
        "Content-Type: application/json",
    )
    return "".join(f"{line}\r\n" for line in (*first, *lines, "")).encode()


@pytest.mark.parametrize("route", ["/v1/echo", "/v1/read", "/v1/ignore", "/nothing"])
def test_an_announced_length_above_the_limit_is_refused_unread(client: httpx.Client, route: str) -> None:
    before = APP.bytes_read
    for _ in range(20):
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
    for _ in range(10):
        assert error(client.post(route, content=pieces(), headers=JSON), 413)
    assert APP.bytes_read - before <= 10 * LIMIT


@pytest.mark.slow
def test_an_endless_chunked_body_ends_with_the_answer(url: str) -> None:
    """A client that never stops sending is cut off: the answer is there though the body has no end."""
    answer = raw(url, head("Transfer-Encoding: chunked") + b"2710\r\n" + b"x" * 10_000 + b"\r\n2\r\nyy\r\n")
    assert answer.startswith(b"HTTP/1.1 413 ") and b"connection: close" in answer.lower()


def test_lengths_that_are_none_are_refused(url: str) -> None:
    for length in ("-1", "x", "1, 2", "9" * 5000):
        status = raw(url, head("Connection: close", f"Content-Length: {length}")).split(b" ")[1]
        assert status in (b"400", b"413"), length
