"""The contract of servers (`server_contract.py`) on our own one, and its guards: keys, hosts, origins, sizes, ids."""

from __future__ import annotations

import contextlib
import json
import re
import shutil
import socket
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path

import httpx
import pytest
from transformers import AutoTokenizer

from http_server import eventually, raw
from local_server import LocalServer
from logo import LoGo
from logo.demo import adapters_dir
from make_adapters import edit_config
from server_contract import *  # noqa: F403
from server_contract import KEY, Server, completion, refused, write_changes, write_keys
from serving import endless

pytestmark = pytest.mark.slow

LIMIT = 1_000_000  # bytes of a body
SELECT, KIND = "/v1/logo/select", {"Content-Type": "application/json"}
HEAD = f"POST {SELECT} HTTP/1.1\r\nHost: localhost\r\nContent-Type: application/json\r\nAuthorization: Bearer {KEY}\r\n"


@contextlib.contextmanager
def started(changes: Path, *options: str, key: str = "") -> Iterator[Server]:
    with LocalServer(options, {"LOGO_API_KEY": key} if key else {}) as running:

        def start(*options: str, key: str = "") -> contextlib.AbstractContextManager[Server]:
            return started(changes, *options, key=key)

        yield Server(running.url, "demo", "local", frozenset(), changes, lambda: running.said, start, key)


@pytest.fixture(scope="module")
def server(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Server]:
    folder = tmp_path_factory.mktemp("server")
    (folder / "changes").mkdir()
    changes, keys = write_changes(folder / "changes"), write_keys(folder)
    options = ["--key-adapters", str(keys), "--allow-adapter-changes", str(changes), "--log", "json"]
    options += ["--allow-host", "logo.test", "--cors", "https://ok.test"]
    with started(changes, "--base-model", "demo", *options, key=KEY) as running:
        yield running


@pytest.fixture(scope="module")
def library() -> LoGo:
    return LoGo.from_pretrained("demo")


# -- guards ------------------------------------------------------------------------------------------------------------


def test_every_path_but_open_ones_needs_a_key(server: Server) -> None:
    stranger = replace(server, key="")
    for path in ("/", "/page/page.js", "/health"):
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
def test_no_other_key_does(header: str, server: Server) -> None:
    answer = httpx.get(f"{server.url}/v1/models", headers=[(b"Authorization", header.encode("utf-8"))])
    assert refused(answer, 401).startswith("expected a valid API key") and KEY[:-1] not in answer.text


def test_only_names_of_this_server_pass(server: Server) -> None:
    """Also with two names, or none, which uvicorn's parser refuses itself or hands over."""
    for host in ("127.0.0.1", "localhost:8000", "LOCALHOST", "[::1]:80", "logo.test", "logo.test.:1"):
        assert server.ask("/health", Host=host).status_code == 200
    for host in ("evil.test", "127.0.0.1.evil.test", "localhost.evil.test:8000", "[::2]", "a@localhost", "x" * 999):
        answer = server.ask("/", Host=host)
        assert refused(answer, 403).startswith("Host: expected a name of this server") and len(answer.text) < 400
    assert raw(server.url, b"GET /health HTTP/1.0\r\n\r\n").startswith(b"HTTP/1.1 403 ")
    two = b"GET /health HTTP/1.1\r\nHost: localhost\r\nHost: evil.test\r\nConnection: close\r\n\r\n"
    assert raw(server.url, two).startswith((b"HTTP/1.1 400 ", b"HTTP/1.1 403 "))


def test_pages_of_other_origins_may_read_and_change_nothing(server: Server) -> None:
    fine = (server.url, "https://ok.test", "https://logo.test")  # its own page, that of a proxy's name among them
    for origin in (*fine, "https://evil.test", "http://localhost:1", "null", "http://["):
        answer = server.ask(SELECT, {"prompt": "x"}, Origin=origin)
        assert answer.status_code == (200 if origin in fine else 403), origin
        cors = answer.headers.get("access-control-allow-origin")
        assert cors == ("https://ok.test" if origin == "https://ok.test" else None)
    for kind in ("text/plain", "application/x-www-form-urlencoded"):  # what browsers send without asking first
        refused(server.ask(SELECT, b'{"prompt": "x"}', **{"Content-Type": kind}), 400)
    names = "authorization,content-type,x-stainless-lang"  # as OpenAI's client asks for them
    asked = {"Access-Control-Request-Method": "POST", "Access-Control-Request-Headers": names}
    preflight = httpx.options(server.url + SELECT, headers={"Origin": "https://ok.test", **asked})
    assert preflight.headers["access-control-allow-origin"] == "https://ok.test"
    assert preflight.headers["access-control-allow-headers"] == names
    evil = httpx.options(server.url + SELECT, headers={"Origin": "https://evil.test", **asked})
    assert evil.status_code == 400 and "access-control-allow-origin" not in evil.headers
    stranger = replace(server, key="")
    for one, path in ((server, "/v1/models"), (stranger, "/v1/models"), (server, "/nothing")):  # a page can read why
        assert one.ask(path, Origin="https://ok.test").headers["access-control-allow-origin"] == "https://ok.test"


def test_every_answer_has_an_id_and_the_security_headers(server: Server) -> None:
    def name(**headers: str) -> str:
        return server.ask("/v1/models", **headers).headers["x-request-id"]

    first, second = name(), name()
    assert first != second and first.startswith("req-") and name(**{"X-Request-Id": "Mine_1.2-3"}) == "Mine_1.2-3"
    for given in ("with space", "x" * 129, "a\tb"):
        assert name(**{"X-Request-Id": given}).startswith("req-")
    stream = {"model": "logo", "prompt": "x", "max_tokens": 2, "stream": True}
    for path, body in (("/", None), ("/v1/models", None), ("/nothing", None), ("/v1/completions", stream)):
        headers = server.ask(path, body).headers
        assert headers["x-content-type-options"] == "nosniff" and headers["referrer-policy"] == "no-referrer"
        assert "unsafe" not in (policy := headers["content-security-policy"]) and "default-src 'none'" in policy


def test_bodies_that_are_too_large_are_refused_and_the_answer_is_read(server: Server) -> None:
    fits = json.dumps({"prompt": "x", "user": ""}).encode()
    fits = fits.replace(b'""', b'"' + b"y" * (LIMIT - len(fits)) + b'"')
    assert len(fits) == LIMIT and server.ask(SELECT, fits, **KIND).status_code == 200
    for size in (LIMIT + 1, 10_000_000):
        assert refused(server.ask(SELECT, b"x" * size, **KIND), 413).startswith("expected a body of at most")
        pieces = (b"x" * 5000 for _ in range(size // 5000 + 1))
        answer = httpx.post(server.url + SELECT, content=pieces, headers={**KIND, "Authorization": f"Bearer {KEY}"})
        refused(answer, 413)
    forever = f"{HEAD}Transfer-Encoding: chunked\r\n\r\n{LIMIT + 1:x}\r\n".encode() + b"x" * (LIMIT + 1) + b"\r\n"
    answered = raw(server.url, forever)  # the answer is there though the body has no end
    assert answered.startswith(b"HTTP/1.1 413 ") and b"connection: close" in answered.lower()
    for length in ("-1", "x", "1, 2", "9" * 5000):
        answered = raw(server.url, f"{HEAD}Connection: close\r\nContent-Length: {length}\r\n\r\n".encode())
        assert answered.split(b" ")[1] in (b"400", b"413"), length


def test_a_client_that_hangs_up_in_its_body_does_no_harm(server: Server) -> None:
    host, port = server.url.removeprefix("http://").split(":")
    with socket.create_connection((host, int(port))) as connection:
        connection.sendall(f'{HEAD}X-Request-Id: body-1\r\nContent-Length: 100\r\n\r\n{{"a":'.encode())
    eventually(lambda: '"body-1"' in server.said())
    [line] = [json.loads(one) for one in server.said().splitlines() if '"body-1"' in one]
    assert line["logger"] == "logo.access" and line["disconnected"] is True
    assert server.ask(SELECT, {"prompt": "x"}).status_code == 200


def test_checkpoints_and_adapters_are_taken_as_by_the_library(tmp_path: Path) -> None:
    """Stop texts of the checkpoint, a token that the model lacks, and adapters whose invocation a prompt lacks."""
    model = endless(tmp_path / "model")
    tokens = AutoTokenizer.from_pretrained(model)
    tokens.add_tokens(["<extra>"])
    tokens.save_pretrained(model)
    (model / "generation_config.json").write_text(json.dumps({"stop_strings": ["1"]}))
    for name in ("add_numbers", "antonym"):
        shutil.copytree(adapters_dir() / name, tmp_path / "pool" / name)
        invocation = tokens("?", add_special_tokens=False)["input_ids"]
        edit_config(tmp_path / "pool" / name, alora_invocation_tokens=invocation)
    library = LoGo.from_pretrained(str(model), tmp_path / "pool", device="cpu")
    with started(tmp_path, "--base-model", str(model), "--adapters", str(tmp_path / "pool")) as running:
        found = completion(running, prompt="What is 7 plus 5?")
        expected = library.generate("What is 7 plus 5?", max_new_tokens=8)
        assert found["choices"][0]["text"] == expected.text and expected.text.endswith("1")
        for body in ({"prompt": "Hi <extra>"}, {"messages": [{"role": "user", "content": "Hi <extra>"}]}):
            assert "the token '<extra>'" in refused(running.ask(SELECT, body), 400)
        silent = completion(running, prompt="the opposite of hot is", model="antonym", max_tokens=2)
        base = completion(running, prompt="the opposite of hot is", model="model", max_tokens=2)
        assert silent["choices"][0]["text"] == base["choices"][0]["text"]
        assert "a prompt lacks the invocation tokens of 'antonym'" in running.said()
        assert re.search(r'POST /v1/completions 200 .*adapters=\["add_numbers".*confidence=[01]', running.said())
