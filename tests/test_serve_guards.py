"""Guards around a real server: keys, hosts, sizes, ids, headers; streams and hang-ups pass through them."""

from __future__ import annotations

import asyncio
import socket
from collections.abc import Iterator

import httpx
import pytest
from starlette.types import Message

from guarded_app import KEYS, LIMIT, error, make
from http_server import eventually, log_of, raw, serving
from logo.errors import UsageError
from logo.serving.guards import GuardSettings, guard

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


@pytest.mark.parametrize(
    "header",
    ["", "Bearer", "Bearer key-on", "Bearer key-onee", "Bearer KEY-ONE", "Basic key-one", "key-one",
     "Bearer key-one key-two", "Bearer key-one,key-two", "Bearer ké", "Bearer " + "x" * 5000],
)  # fmt: skip
def test_no_other_does(stranger: httpx.Client, header: str) -> None:
    answer = stranger.get("/v1/models", headers=[(b"Authorization", header.encode("utf-8"))])
    assert error(answer, 401).startswith("expected a valid API key")
    assert "key-o" not in answer.text


def test_metrics_can_be_open(url: str) -> None:
    with serving(guard(make(), GuardSettings(api_keys=KEYS, open_metrics=True))) as url:
        assert httpx.get(f"{url}/metrics").status_code == 200
        assert httpx.get(f"{url}/metrics/x").status_code == 401
    with serving(guard(make(), GuardSettings())) as url:
        assert httpx.get(f"{url}/v1/models").status_code == 200  # no keys: open


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
    # uvicorn's parser refuses these, or hands them to the app: it has one of two.
    refused = (b"HTTP/1.1 400 ", b"HTTP/1.1 403 ")
    assert raw(url, b"GET /health HTTP/1.1\r\nConnection: close\r\n\r\n").startswith(refused)
    two = b"GET /health HTTP/1.1\r\nHost: localhost\r\nHost: evil.test\r\nConnection: close\r\n\r\n"
    assert raw(url, two).startswith(refused)


# Ids and headers


def test_an_id_is_made_or_taken_over_and_told(client: httpx.Client) -> None:
    made = [client.get("/v1/models") for _ in range(2)]
    assert all(a.headers["x-request-id"] == a.json()["id"] and a.json()["id"].startswith("req-") for a in made)
    assert made[0].json() != made[1].json()
    answer = client.get("/v1/models", headers={"X-Request-Id": "Mine_1.2-3"})
    assert answer.headers["x-request-id"] == answer.json()["id"] == "Mine_1.2-3"
    answer = client.get("/v1/models", headers=[("X-Request-Id", "one"), ("X-Request-Id", "two")])
    assert answer.headers["x-request-id"].startswith("req-")


@pytest.mark.parametrize("path", ["/", "/v1/models", "/nothing", "/v1/crash", "/v1/stream"])
def test_every_answer_has_the_security_headers(client: httpx.Client, path: str) -> None:
    headers = client.get(path).headers
    assert headers["x-content-type-options"] == "nosniff" and headers["referrer-policy"] == "no-referrer"
    policy = headers["content-security-policy"]
    assert policy.startswith("default-src 'none'; style-src 'self'; script-src 'self'; connect-src 'self'; img-src ")
    assert "unsafe" not in policy and "frame-ancestors 'none'" in policy


def test_cors_is_for_the_given_origins_only(client: httpx.Client, stranger: httpx.Client) -> None:
    headers = "authorization,content-type,x-stainless-lang,x-stainless-retry-count"  # as OpenAI's client asks for them
    asked = {"Access-Control-Request-Method": "POST", "Access-Control-Request-Headers": headers}
    preflight = stranger.options("/v1/echo", headers={"Origin": "https://ok.test", **asked})
    assert preflight.status_code == 200
    assert preflight.headers["access-control-allow-origin"] == "https://ok.test"
    assert preflight.headers["access-control-allow-headers"] == headers
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


@pytest.mark.parametrize("origin", ["", "ok.test", "https://ok.test/"])
def test_keys_and_origins_that_are_none_are_refused(origin: str) -> None:
    with pytest.raises(UsageError, match="--api-key"):
        GuardSettings(api_keys=("fine", "a b"))
    with pytest.raises(UsageError, match="--cors: expected"):
        GuardSettings(cors_origins=("*", "http://localhost:3000", origin))


# Streams


def test_streams_arrive_piece_by_piece(client: httpx.Client) -> None:
    with client.stream("GET", "/v1/stream", params={"count": 100_000}) as answer:
        pieces = answer.iter_raw()
        assert next(pieces).startswith(b"data: 0\n\n")  # while the server is far from done
    assert client.get("/v1/stream").text == "data: 0\n\ndata: 1\n\ndata: 2\n\n"


def test_a_client_that_hangs_up_ends_its_stream(client: httpx.Client, caplog: pytest.LogCaptureFixture) -> None:
    before = APP.hung_up
    with log_of(caplog, "stream-1") as log:
        headers = {"X-Request-Id": "stream-1"}
        with client.stream("GET", "/v1/stream", params={"count": 1_000_000}, headers=headers) as answer:
            next(answer.iter_raw())
        eventually(lambda: APP.hung_up > before)
        eventually(log)
    [record] = log()
    assert record.name == "logo.access" and record.__dict__["fields"]["disconnected"] is True


def test_a_client_that_hangs_up_in_the_middle_of_its_body_does_no_harm(
    url: str, client: httpx.Client, caplog: pytest.LogCaptureFixture
) -> None:
    host, port = url.removeprefix("http://").split(":")
    with log_of(caplog, "body-1") as log:
        for route in (b"echo", b"read"):
            with socket.create_connection((host, int(port))) as connection:
                connection.sendall(
                    b"POST /v1/" + route + b" HTTP/1.1\r\nHost: localhost\r\nAuthorization: Bearer key-one\r\n"
                    b"X-Request-Id: body-1\r\n"
                    b'Content-Type: application/json\r\nContent-Length: 100\r\n\r\n{"a":'
                )
        eventually(lambda: len(log()) == 2)
    assert {record.name for record in log()} == {"logo.access"}
    assert client.post("/v1/echo", json={"a": 1}).json() == {"a": 1}


# What is not HTTP


def test_websockets_are_turned_away() -> None:
    sent = []

    async def send(message: Message) -> None:
        sent.append(message)

    async def receive() -> Message:
        return {"type": "websocket.connect"}

    scope = {"type": "websocket", "path": "/v1/models", "headers": [], "query_string": b""}
    asyncio.run(guard(make(), GuardSettings())(scope, receive, send))
    assert sent == [{"type": "websocket.close", "code": 1008}]
