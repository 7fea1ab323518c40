"""Limits of our server: of its queue, of time, of memory and of the context; and how it starts and ends."""

from __future__ import annotations

import asyncio
import json
import logging
import re
import shutil
import socket
import subprocess
import threading
from collections.abc import Awaitable, Callable
from pathlib import Path
from typing import Any

import httpx
import openai
import pytest

from http_server import eventually, serving
from local_server import LocalServer
from logo import AdapterPool, LoGo
from logo.api import bodies
from logo.api.guards import GuardSettings
from logo.api.layers import guard
from logo.api.listening import listening
from logo.cli.app import run
from logo.demo import adapters_dir
from logo.serve import app as app_module
from logo.serve import reading
from logo.serve.app import create_app
from logo.serve.memory import Memory
from logo.serve.routes import AppSettings
from logo.serve.service import Service
from serving import endless
from tolerances import PATIENCE
from warm import logo

pytestmark = pytest.mark.slow

PROMPT = "What is 7 plus 5?"


@pytest.fixture(scope="module")
def engine() -> LoGo:
    return LoGo.from_pretrained("demo")


def asked(service: Service, use: Callable[[httpx.AsyncClient], Awaitable[Any]], **settings: Any) -> Any:
    """What `use` makes of the app, between its beginning and its end."""

    async def run() -> Any:
        app = create_app(service, AppSettings("demo", **settings))
        async with app.router.lifespan_context(app):
            transport = httpx.ASGITransport(app)
            async with httpx.AsyncClient(transport=transport, base_url="http://test", timeout=PATIENCE) as client:
                return await use(client)

    return asyncio.run(run())


def failures(text: str) -> dict[str, float]:
    """Code -> the number of requests that `/metrics` counts."""
    found = re.findall(r'^logo:request_failure_total{reason="(.+)"} (.+)$', text, re.M)
    return {reason: float(count) for reason, count in found}


def test_more_than_there_is_room_for_are_refused_and_counted(engine: LoGo) -> None:
    async def use(client: httpx.AsyncClient) -> None:
        body = {"model": "logo", "prompt": [PROMPT] * 2, "n": 3, "max_tokens": 2}
        found = await asyncio.gather(*(client.post("/v1/completions", json=body) for _ in range(3)))
        assert sorted(answer.status_code for answer in found) == [200, 429, 429]
        [refused, *_] = [answer for answer in found if answer.status_code == 429]
        assert refused.headers["retry-after"] == "1" and refused.json()["error"]["code"] == "queue_full"
        answer = await client.post("/v1/completions", json={**body, "n": 4})  # waiting would be of no use
        assert answer.status_code == 400 and "at most 6 at a time" in answer.json()["error"]["message"]
        text = (await client.get("/metrics")).text
        assert failures(text) == {"queue_full": 2.0, "invalid": 1.0}
        assert re.search(r'^logo:request_success_total{finished_reason="\w+"} 6.0$', text, re.M)
        assert "logo:num_requests_running 0.0" in text and "logo:kv_tokens_used 0.0" in text
        # Once per prompt of the two requests that were taken, however many answers it has.
        assert 'logo:adapter_selected_total{adapter="add_numbers"} 2.0' in text

    asked(Service(engine, Memory(concurrent=2), max_queue=4), use)


@pytest.mark.parametrize("waits", ["to be chosen for", "for its answer"])
def test_a_request_that_takes_too_long_is_ended_and_counted(
    waits: str, engine: LoGo, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    async def use(client: httpx.AsyncClient) -> None:
        body = {"model": "demo", "prompt": PROMPT, "max_tokens": 480, "n": 2}
        answer = await client.post("/v1/completions", json=body)
        assert answer.status_code == 504 and "the limit of this server" in answer.json()["error"]["message"]
        assert failures((await client.get("/metrics")).text) == {"timeout": 1.0}

    if waits == "to be chosen for":
        service = Service(engine, Memory())

        async def never(*_: Any, **__: Any) -> None:
            await asyncio.sleep(PATIENCE)

        monkeypatch.setattr(service, "select", never)
    else:
        base = str(endless(tmp_path / "demo"))
        service = Service(LoGo.from_pretrained(base, str(adapters_dir())), Memory())
    asked(service, use, request_timeout=0.3)


def test_who_does_not_read_holds_nothing_beyond_the_time_limit(engine: LoGo, monkeypatch: pytest.MonkeyPatch) -> None:
    """Its socket is full, so that no more can be sent, and it does not disconnect."""
    monkeypatch.setattr(app_module, "GRACE", 0.05)
    sent: list[Any] = []

    async def use(client: httpx.AsyncClient) -> None:
        app: Any = client._transport.app  # type: ignore[attr-defined]
        body = json.dumps({"model": "demo", "prompt": PROMPT, "max_tokens": 3, "stream": True}).encode()
        received = iter([{"type": "http.request", "body": body}])

        async def receive() -> Any:
            return next(received, None) or await asyncio.sleep(PATIENCE)

        async def send(message: Any) -> None:
            sent.append(message)
            if len(sent) > 2:
                await asyncio.sleep(PATIENCE)

        headers = [(b"content-type", b"application/json")]
        scope = {"type": "http", "method": "POST", "path": "/v1/completions", "query_string": b"", "headers": headers}
        await app(scope, receive, send)
        assert len(sent) == 3 and sent[-1]["more_body"]
        assert "logo:num_requests_running 0.0" in (await client.get("/metrics")).text

    asked(Service(engine, Memory()), use, request_timeout=5.0)  # enough for a busy machine to begin


def test_an_answer_has_as_many_tokens_as_are_left(engine: LoGo) -> None:
    """At most the usual number; a prompt that leaves no room is refused under its own name."""

    async def use(client: httpx.AsyncClient) -> None:
        async def ask(path: str, **fields: Any) -> Any:
            return (await client.post(f"/v1/{path}", json={"model": "demo", **fields})).json()

        context = (await client.get("/v1/models")).json()["data"][0]["max_model_len"]
        for length, most in ((50, 16), (context - 7, 7), (context - 1, 1)):
            assert (await ask("completions", prompt=[5] * length))["usage"]["completion_tokens"] <= most
        messages = [{"role": "user", "content": "word " * 5000}]
        for more in ({}, {"messages": messages}):  # which no completion reads
            assert (await ask("completions", prompt=[5] * context, **more))["error"]["param"] == "prompt"
        for name in ("max_tokens", "max_completion_tokens"):
            assert (await ask("completions", prompt=[5] * (context - 7), **{name: 8}))["error"]["param"] == name
        for fields, param in (({}, "messages"), ({"max_completion_tokens": 1}, "max_completion_tokens")):
            assert (await ask("chat/completions", messages=messages, **fields))["error"]["param"] == param

    asked(Service(engine, Memory()), use)


def test_variables_of_the_chat_template_reach_it(engine: LoGo, monkeypatch: pytest.MonkeyPatch) -> None:
    template = "{% for m in messages %}{{ m.content }}{% endfor %}{% if more is defined %}{{ more.text }}{% endif %}"
    monkeypatch.setattr(engine.tokenizer, "chat_template", template)

    async def use(client: httpx.AsyncClient) -> None:
        async def ask(path: str, **fields: Any) -> Any:
            body = json.dumps({"model": "logo", "messages": [{"role": "user", "content": "x"}], **fields})
            answer = await client.post(f"/v1/{path}", content=body, headers={"Content-Type": "application/json"})
            return answer.json()

        for fields, text in (({}, "x"), ({"chat_template_kwargs": {"more": {"text": " and more"}}}, "x and more")):
            count = len(engine.tokenizer(text, add_special_tokens=False)["input_ids"])
            assert (await ask("chat/completions", **fields))["usage"]["prompt_tokens"] == count
            assert (await ask("logo/select", **fields))["tokens"] == count
        for name in ("tokenize", "chat_template", "tools"):
            assert name in (await ask("chat/completions", chat_template_kwargs={name: None}))["error"]["message"]

    asked(Service(engine, Memory()), use)


def test_long_bodies_are_parsed_rendered_and_read_beside_the_event_loop(
    engine: LoGo, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Also those that are long by the number of their messages or token ids."""
    threads: list[str] = []

    def noted(function: Callable[..., Any]) -> Callable[..., Any]:
        def called(*args: Any, **options: Any) -> Any:
            threads.append(threading.current_thread().name)
            return function(*args, **options)

        return called

    async def use(client: httpx.AsyncClient) -> None:
        messages = [{"role": "user", "content": ""}] * 5_000
        for path, body in (
            ("chat/completions", {"messages": messages}),
            ("logo/select", {"messages": messages}),
            ("completions", {"prompt": [5] * 5_000}),
            ("completions", {"prompt": "word " * 5_000}),
            ("completions", {"prompt": "x", "user": "y" * 20_000}),
        ):
            threads.clear()
            await client.post(f"/v1/{path}", json={"model": "demo", **body})
            assert len(threads) >= 2 and main not in threads, path

    main = threading.current_thread().name
    for name in ("read", "chat"):
        monkeypatch.setattr(reading, name, noted(getattr(reading, name)))
    monkeypatch.setattr(bodies, "read_json", noted(bodies.read_json))
    asked(Service(engine, Memory()), use)


def test_a_client_that_leaves_while_it_sends_is_no_failure_of_the_server(
    engine: LoGo, caplog: pytest.LogCaptureFixture
) -> None:
    head = b"POST /v1/completions HTTP/1.1\r\nHost: localhost\r\nContent-Type: application/json\r\n"
    app = guard(create_app(Service(engine, Memory()), AppSettings("demo")), GuardSettings())
    with caplog.at_level(logging.INFO, "logo.access"), serving(app) as url:
        host, port = url.removeprefix("http://").split(":")
        with socket.create_connection((host, int(port))) as connection:
            connection.sendall(head + b'Content-Length: 100\r\n\r\n{"a":')
        eventually(lambda: caplog.records)
        assert caplog.records[0].__dict__["fields"]["disconnected"]
        assert failures(httpx.get(f"{url}/metrics").text) == {}
    assert not [record for record in caplog.records if record.levelno >= logging.WARNING]


def test_head_is_answered_like_get_without_a_body(engine: LoGo) -> None:
    with serving(create_app(Service(engine, Memory()), AppSettings("demo"))) as url:
        for path in ("/health", "/ready", "/metrics", "/v1/models", "/v1/models/french", "/"):
            answer = httpx.head(url + path)
            assert answer.status_code == 200 and answer.content == b"", path
            assert answer.headers["content-type"] == httpx.get(url + path).headers["content-type"]
        for path, status, said in (("/v1/completions", 405, "Method Not Allowed"), ("/nothing", 404, "Not Found")):
            answer = httpx.get(url + path)
            error = answer.json()["error"]
            assert (answer.status_code, error["message"]) == (status, f"{said}: GET '{path}'")
            assert error["code"] == said.lower().replace(" ", "_")


def test_adapters_that_can_never_have_room_are_refused_for_good_and_others_wait() -> None:
    """Those of one prompt, or of all prompts of a request together; nobody is told to try again in vain."""
    tight = LoGo.from_pretrained("demo", adapter_memory_gb=0.000001)

    async def use(client: httpx.AsyncClient) -> None:
        answer = await client.post("/v1/completions", json={"model": "antonym", "prompt": "x"})
        error = answer.json()["error"]
        assert answer.status_code == 400 and error["code"] == "adapters_too_large"
        assert error["message"].startswith("adapters 'antonym': together they need ")
        assert "--adapter-memory-gb" in error["message"] and "retry-after" not in answer.headers
        assert (await client.post("/v1/completions", json={"model": "demo", "prompt": "x"})).status_code == 200
        assert failures((await client.get("/metrics")).text) == {"adapters_too_large": 1.0}

    asked(Service(tight, Memory()), use)
    few = LoGo.from_pretrained("demo", adapter_memory_gb=0.0004)  # room for two adapters

    async def all_at_once(client: httpx.AsyncClient) -> None:
        bodies = [{"model": name, "prompt": "x", "max_tokens": 4} for name in few.names]
        answers = await asyncio.gather(*(client.post("/v1/completions", json=body) for body in bodies))
        assert {answer.status_code for answer in answers} == {200}
        three = {"model": "+".join(f"{name}:0.1" for name in few.names[:3]), "prompt": "x"}
        assert (await client.post("/v1/completions", json=three)).json()["error"]["code"] == "adapters_too_large"

    asked(Service(few, Memory(concurrent=1)), all_at_once)


def test_prompts_are_logged_where_the_operator_wants_that_and_become_examples(tmp_path: Path) -> None:
    pool = shutil.copytree(adapters_dir(), tmp_path / "pool")
    (pool / "plural" / "examples.jsonl").unlink()
    named = [f"One {word}, two of them: what is the word?" for word in ("box", "cat", "dog")]
    with LocalServer(["--base-model", "demo", "--log", "prompts"]) as running:
        for model, prompt in (("logo", PROMPT), *(("plural", prompt) for prompt in named)):
            httpx.post(f"{running.url}/v1/completions", json={"model": model, "prompt": prompt}).raise_for_status()
    lines = [json.loads(one) for one in running.said.splitlines() if "/v1/completions" in one]
    assert [one["selections"][0]["prompt"] for one in lines] == [PROMPT, *named]
    (tmp_path / "log").write_text(running.said)
    assert run(["pool", "examples", str(pool), "--from-log", str(tmp_path / "log")]) == 0
    assert AdapterPool.open(pool)["plural"].examples == tuple(named)


def test_a_signal_lets_what_was_accepted_end_and_each_request_is_a_line_of_text(tmp_path: Path) -> None:
    with LocalServer(["--base-model", "demo"], log=tmp_path / "log") as running:
        body = {"model": "a\nFAKE LINE", "prompt": PROMPT}
        httpx.post(f"{running.url}/v1/completions", json=body, headers={"X-Request-Id": "r1"})

        async def ask(client: openai.AsyncOpenAI, n: int) -> int:
            stream = await client.completions.create(
                model="logo", prompt=PROMPT, max_tokens=60, temperature=1.9, seed=n, stream=True
            )
            reasons = []
            async for chunk in stream:
                reasons += [choice.finish_reason for choice in chunk.choices]
                begun.add(n)
                if len(begun) == 24:
                    started.set()
            return sum(reason is not None for reason in reasons)

        async def traffic() -> list[int]:
            url = f"{running.url}/v1"
            async with openai.AsyncOpenAI(base_url=url, api_key="none", max_retries=0) as client:
                asking = [asyncio.create_task(ask(client, n)) for n in range(24)]
                await started.wait()
                running.end()
                stopping = (openai.InternalServerError, openai.APIConnectionError)
                with pytest.raises(stopping, match=r"shutting down|Connection"):
                    while True:  # until the signal has been heard
                        await ask(client, 0)
                return await asyncio.gather(*asking)

        begun: set[int] = set()
        started = asyncio.Event()
        assert asyncio.run(traffic()) == [1] * 24
    assert running.exit_code == 0
    [line] = [one for one in (tmp_path / "log").read_text().splitlines() if " r1 " in one]
    assert re.fullmatch(r'\S+ \S+ INFO r1 POST /v1/completions 404 ms=[\d.]+ model="a\\+nFAKE LINE"', line)


def test_what_cannot_be_served_is_one_line_before_anything_is_loaded(tmp_path: Path) -> None:
    """A port that is taken, and adapters that nobody could ask for."""
    shutil.copytree(adapters_dir() / "antonym", tmp_path / "logo")
    with listening("127.0.0.1", 0) as taken:  # as of a server that still loads its model
        port = str(taken.getsockname()[1])
        for options, said in (
            (["--port", port], f"cannot listen on 127.0.0.1:{port}"),
            (["--port", "0", "--served-model-name", "antonym"], "nobody could ask for"),
            (["--port", "0", "--adapters", str(tmp_path)], "nobody could ask for"),
        ):
            command = [*logo(), "serve", "--base-model", "demo", *options]
            found = subprocess.run(command, capture_output=True, text=True, timeout=PATIENCE)
            assert found.returncode == 2 and found.stderr.count("\n") == 1 and said in found.stderr, found.stderr
