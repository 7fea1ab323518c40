"""The app on a service that answers from a script."""

from __future__ import annotations

import asyncio
import json
from collections.abc import AsyncGenerator, Awaitable, Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import httpx

from http_server import serving
from logo.core import Prompt, Selection
from logo.models import load_base
from logo.protocol import (
    Delta,
    Figures,
    MixtureRequest,
    Overloaded,
    Sampling,
)
from logo.serving.app import AppSettings, create_app


@dataclass
class Choice:
    selection: Selection
    released: list[str]
    queue_ms: float = 1.0
    probe_ms: float = 2.0

    def release(self) -> None:
        self.released.extend(self.selection.adapters)


class Scripted:
    """Answers every prompt with its own ids turned round, under the first adapter."""

    vocabulary, context, k, signal, probe_text, unsure_below = 64, 100, 1, "norm", None, 0.15
    alive = ready = True

    def __init__(self) -> None:
        self.draining = False
        self.signals = ("norm",)
        self.selected: dict[str, int] = {}
        self.adapters: dict[str, Any] = {"a": None, "b": None}
        self.cards: dict[str, Any] = {}
        self.tokenizer = load_base("demo")[1]
        self.vocabulary = len(self.tokenizer)
        self.released: list[str] = []
        self.went: list[str] = []
        self.pool = self.batching = self

    @property
    def figures(self) -> Figures:
        return Figures(0, 0, 0, 8, 2, 10, 20, {"gate": 3, "base": 4})

    async def start(self) -> None:
        self.went.append("start")

    async def close(self) -> None:
        self.went.append("close")

    @contextmanager
    def admitted(self, count: int = 1) -> Iterator[None]:
        yield

    def usable(self, patterns: Any) -> Mapping[str, Any]:
        return self.adapters

    async def choose(self, prompt: Prompt | Sequence[int], wanted: MixtureRequest) -> Choice:
        forced = wanted.adapters
        return Choice(Selection.forced({"a": 1.0} if forced is None else dict(forced)), self.released)

    async def generate(
        self, ids: Sequence[int], chosen: Any, sampling: Sampling, deadline: float | None = None
    ) -> AsyncGenerator[Delta, None]:
        answer = tuple(reversed(ids))[: sampling.max_tokens]
        for i, token in enumerate(answer):
            yield Delta((token,), "length" if i == len(answer) - 1 else None)

    async def add(self, folder: Path, name: str, *, replace: bool = False) -> None:
        self.adapters[name] = None

    async def remove(self, name: str) -> None:
        del self.adapters[name]


def asked(use: Callable[[httpx.AsyncClient, Scripted], Awaitable[Any]], **settings: Any) -> Any:
    """What `use` makes of the app, between its beginning and its end."""
    made = Scripted()
    engine: Any = made

    async def run() -> Any:
        app = create_app(engine, AppSettings("base", **settings))
        async with app.router.lifespan_context(app):
            transport = httpx.ASGITransport(app)
            async with httpx.AsyncClient(transport=transport, base_url="http://test") as client:
                found = await use(client, made)
        assert made.went == ["start", "close"]
        return found

    return asyncio.run(run())


def test_answers_whole_and_streamed() -> None:
    async def use(client: httpx.AsyncClient, engine: Scripted) -> None:
        prompt = engine.tokenizer.encode("one two")
        body = {"model": "logo", "prompt": prompt, "max_tokens": 3}
        whole = (await client.post("/v1/completions", json=body)).json()
        text = engine.tokenizer.decode(prompt[::-1][:3], skip_special_tokens=True)
        assert whole["choices"][0]["text"] == text and whole["choices"][0]["finish_reason"] == "length"
        lines = (await client.post("/v1/completions", json={**body, "model": "b", "stream": True})).text.split("\n\n")
        events = [json.loads(line.removeprefix("data: ")) for line in lines if line.startswith("data: {")]
        assert "".join(choice["text"] for event in events for choice in event["choices"]) == text
        assert engine.released == ["a", "b"]

    asked(use)


def test_one_model_is_told() -> None:
    async def use(client: httpx.AsyncClient, engine: Scripted) -> None:
        engine.adapters["team/a"] = None
        listed = (await client.get("/v1/models")).json()["data"]
        assert [card["id"] for card in listed] == ["logo", "base", "a", "b", "team/a"]
        for card in listed:
            assert (await client.get(f"/v1/models/{card['id']}")).json() == card
        assert (await client.get("/v1/models/", follow_redirects=True)).json()["data"] == listed
        answer = await client.get("/v1/models/team/b")
        assert answer.status_code == 404 and answer.json()["error"]["code"] == "model_not_found"
        assert "team/a" in answer.json()["error"]["message"]

    asked(use)


def test_requests_that_found_no_place_are_counted() -> None:
    async def use(client: httpx.AsyncClient, engine: Scripted) -> None:
        def full(count: int = 1) -> Any:
            raise Overloaded

        engine.admitted = full  # type: ignore[method-assign]
        answer = await client.post("/v1/completions", json={"model": "logo", "prompt": ["x", "y"], "n": 2})
        assert answer.status_code == 429 and answer.headers["retry-after"] == "1"
        assert 'logo:request_failure_total{reason="queue_full"} 4.0' in (await client.get("/metrics")).text

    asked(use)


def test_head_is_answered_like_get_without_a_body() -> None:
    with serving(create_app(Scripted(), AppSettings("base"))) as url:
        for path in ("/health", "/ready", "/version", "/metrics", "/v1/models", "/", "/page/page.js"):
            answer = httpx.head(url + path)
            assert answer.status_code == 200 and answer.content == b"", path
            assert answer.headers["content-type"] == httpx.get(url + path).headers["content-type"]
        assert httpx.head(url + "/v1/completions").status_code == 405
        assert httpx.head(url + "/nothing").status_code == 404


def test_the_pool_and_the_figures_are_told(tmp_path: Path) -> None:
    async def use(client: httpx.AsyncClient, engine: Scripted) -> None:
        listed = (await client.get("/v1/models")).json()["data"]
        assert [card["id"] for card in listed] == ["logo", "base", "a", "b"]
        (tmp_path / "c").mkdir()
        loading = await client.post("/v1/load_lora_adapter", json={"lora_name": "c", "lora_path": "c"})
        assert loading.status_code == 200 and "c" in engine.adapters
        lines = (await client.get("/metrics")).text.splitlines()
        assert {"logo:kv_tokens 8.0", "logo:adapters_stacked 2.0", "logo:adapter_bytes 10.0"} <= set(lines)
        assert (await client.get("/health")).status_code == (await client.get("/ready")).status_code == 200

    asked(use, adapter_changes=tmp_path)


def test_without_a_limit_an_answer_has_as_many_tokens_as_are_left() -> None:
    """At most the usual number; a prompt that leaves no room is refused under its own name."""

    async def use(client: httpx.AsyncClient, engine: Scripted) -> None:
        async def ask(length: int, **fields: Any) -> Any:
            body = {"model": "base", "prompt": [5] * length, **fields}
            return (await client.post("/v1/completions", json=body)).json()

        for length, left in ((50, 16), (84, 16), (93, 7), (99, 1)):
            assert (await ask(length))["usage"]["completion_tokens"] == left
        assert (await ask(100))["error"]["param"] == "prompt"
        assert (await ask(93, max_tokens=8))["error"]["param"] == "max_tokens"
        messages = [{"role": "user", "content": "word " * 200}]
        for fields, param in (({}, "messages"), ({"max_completion_tokens": 1}, "max_completion_tokens")):
            found = await client.post("/v1/chat/completions", json={"model": "base", "messages": messages, **fields})
            assert found.json()["error"]["param"] == param

    asked(use)


def test_variables_of_the_chat_template_reach_it() -> None:
    async def use(client: httpx.AsyncClient, engine: Scripted) -> None:
        engine.tokenizer.chat_template = (
            "{% for m in messages %}{{ m.content }}{% endfor %}{% if more is defined %}{{ more.text }}{% endif %}"
            "{% if add_generation_prompt %}:{% endif %}"
        )
        messages = [{"role": "user", "content": "x"}]
        text = {"more": {"text": " and many more words"}}

        async def ask(path: str, **fields: Any) -> Any:
            body = json.dumps({"model": "logo", "messages": messages, **fields})
            headers = {"Content-Type": "application/json"}
            return (await client.post(f"/v1/{path}", content=body, headers=headers)).json()

        read = partial(engine.tokenizer, add_special_tokens=False)
        short, long = read("x:")["input_ids"], read("x and many more words:")["input_ids"]
        for asked, ids in (({}, short), ({"chat_template_kwargs": {}}, short), ({"chat_template_kwargs": text}, long)):
            assert (await ask("chat/completions", **asked))["usage"]["prompt_tokens"] == len(ids)
            assert (await ask("logo/select", **asked))["tokens"] == len(ids)
        for name in ("tokenize", "add_generation_prompt", "chat_template", "conversation", "return_dict", "tools"):
            error = (await ask("chat/completions", chat_template_kwargs={name: None}))["error"]
            assert error["param"] == "chat_template_kwargs" and name in error["message"]
        for odd in ({"messages": []}, {"conversations": []}, {"more": {"text": "\ud800"}}):
            error = (await ask("chat/completions", chat_template_kwargs=odd))["error"]
            assert error["message"].startswith("messages: the model's chat template refuses them"), odd
        assert (await ask("chat/completions", chat_template_kwargs=[]))["error"]["param"] == "chat_template_kwargs"

    asked(use)


def test_tokens_behind_a_stop_text_are_not_part_of_the_answer() -> None:
    """Also if an engine hands over several at once, as it does when the server is busy."""

    async def use(client: httpx.AsyncClient, engine: Scripted) -> None:
        prompt = [engine.tokenizer.convert_tokens_to_ids(letter) for letter in "dcba"]

        async def at_once(ids: Any, chosen: Any, sampling: Any, deadline: Any = None) -> AsyncGenerator[Delta, None]:
            tokens = tuple(reversed(ids))
            yield Delta(tokens, "length")

        for generate in (engine.generate, at_once):
            engine.generate = generate  # type: ignore[method-assign]
            body = {"model": "logo", "prompt": prompt, "stop": "b", "return_token_ids": True}
            found = (await client.post("/v1/completions", json=body)).json()
            [choice] = found["choices"]
            assert choice["token_ids"] == prompt[-2:][::-1] and choice["finish_reason"] == "stop"
            assert found["usage"]["completion_tokens"] == 2

    asked(use)
