"""Answers of vLLM's app on their way out: changed, and ended where their numbers overflow. The app is made up."""

from __future__ import annotations

import asyncio
import json
from dataclasses import dataclass, field
from functools import partial
from typing import Any

import pytest

from logo.api.asgi import Message, Receive, Scope, Send
from logo.api.errors import ApiError, failed, unavailable
from logo.backends.vllm.overflows import notice, watched
from logo.backends.vllm.rewriting import Rewriting, run
from logo.backends.vllm.several import Run, merged_stream
from logo.errors import UsageError

SCOPE: Scope = {"type": "http"}
ERROR = failed("not finite", "not_finite")


@dataclass
class Client:
    """What a client is sent."""

    messages: list[Message] = field(default_factory=list)

    async def receive(self) -> Message:
        await asyncio.Event().wait()  # it stays
        raise AssertionError

    async def send(self, message: Message) -> None:
        self.messages.append(message)

    @property
    def status(self) -> int:
        [start] = [message for message in self.messages if message["type"] == "http.response.start"]
        return int(start["status"])

    @property
    def body(self) -> bytes:
        assert not self.messages[-1].get("more_body")
        assert all(message.get("more_body") for message in self.messages[1:-1])
        return b"".join(message["body"] for message in self.messages[1:])


@dataclass
class Engine:
    """An app that streams token after token, or gives them at the end; until its client leaves."""

    tokens: int
    streams: bool
    spoilt: asyncio.Event = field(default_factory=asyncio.Event)
    spoils_at: int | None = None
    listens: bool = True
    given: int = 0
    ended: str = ""

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        kind = b"text/event-stream" if self.streams else b"application/json"
        leaving = asyncio.ensure_future(receive())
        try:
            if self.streams:
                await send({"type": "http.response.start", "status": 200, "headers": [(b"content-type", kind)]})
            while self.given < self.tokens:
                self.given += 1
                if self.given == self.spoils_at:
                    self.spoilt.set()
                if self.streams:
                    event = b'data: {"token": %d}\n\n' % self.given
                    await send({"type": "http.response.body", "body": event, "more_body": True})
                await asyncio.sleep(0)
                if self.listens and leaving.done():
                    assert (await leaving)["type"] == "http.disconnect"
                    self.ended = "left"
                    break
        except asyncio.CancelledError:
            self.ended = "cancelled"
            raise
        finally:
            leaving.cancel()
        if not self.streams:
            await send({"type": "http.response.start", "status": 200, "headers": [(b"content-type", kind)]})
        body = b"data: [DONE]\n\n" if self.streams else b"null" if self.ended else b'{"tokens": %d}' % self.given
        await send({"type": "http.response.body", "body": body})


async def answered(engine: Engine, error: ApiError = ERROR) -> tuple[Client, int]:
    """What a client is sent, and how often it was looked whether the answer is one."""
    client, checks = Client(), 0

    async def check() -> ApiError | None:
        nonlocal checks
        checks += 1
        return error if engine.spoilt.is_set() else None

    def change(found: dict[str, Any], first: bool) -> None:
        found["first"] = first

    await run(engine, SCOPE, client.receive, Rewriting(client.send, change, check, engine.spoilt), engine.spoilt)
    return client, checks


def test_an_answer_comes_as_it_is() -> None:
    client, checks = asyncio.run(answered(Engine(2, streams=False)))
    assert (client.status, client.body, checks) == (200, b'{"tokens":2,"first":true}', 1)
    client, checks = asyncio.run(answered(Engine(2, streams=True)))
    assert (client.status, checks) == (200, 1)
    assert client.body == (b'data: {"token":1,"first":true}\n\ndata: {"token":2,"first":false}\n\ndata: [DONE]\n\n')


@pytest.mark.parametrize("listens", [True, False])
def test_a_stream_that_overflows_ends_with_an_error_and_nothing_else(listens: bool) -> None:
    engine = Engine(1000, streams=True, spoils_at=3, listens=listens)
    client, checks = asyncio.run(answered(engine))
    assert checks == 1 and engine.given < 10 and engine.ended
    head, _, tail = client.body.partition(b'data: {"token":2,"first":false}\n\n')
    assert head == b'data: {"token":1,"first":true}\n\n'
    assert tail == ERROR.event() + b"data: [DONE]\n\n"


def test_a_stream_that_overflows_at_its_end_is_ended() -> None:
    """While it is looked whether the answer is one, and after nothing was found."""

    async def ended(spoils_in_check: bool) -> bytes:
        client, engine = Client(), Engine(1, streams=True, listens=False)

        async def check() -> ApiError | None:
            if engine.spoilt.is_set():
                return ERROR
            if spoils_in_check:
                engine.spoilt.set()
                await asyncio.sleep(0.05)
            return None

        async def app(scope: Scope, receive: Receive, send: Send) -> None:
            await engine(scope, receive, more(send))
            engine.spoilt.set()
            await send({"type": "http.response.body", "body": b""})

        def more(send: Send) -> Send:
            async def on_its_way(message: Message) -> None:
                await send({**message, "more_body": True} if "body" in message else message)

            return on_its_way

        send = Rewriting(client.send, lambda found, first: None, check, engine.spoilt)
        await run(app, SCOPE, client.receive, send, engine.spoilt)
        return client.body

    token = b'data: {"token":1}\n\n'
    assert asyncio.run(ended(False)) == token + b"data: [DONE]\n\n"
    assert asyncio.run(ended(True)) == token + ERROR.event() + b"data: [DONE]\n\n"


def test_an_answer_that_overflows_is_an_error_at_once() -> None:
    engine = Engine(1000, streams=False, spoils_at=3)
    client, checks = asyncio.run(answered(engine))
    assert (client.status, client.body, checks) == (500, ERROR.content(), 1)
    assert engine.ended == "left" and engine.given < 10
    # One that goes on to its end is an error as well.
    engine = Engine(20, streams=False, spoils_at=3, listens=False)
    client, checks = asyncio.run(answered(engine))
    assert (client.status, client.body, engine.given) == (500, ERROR.content(), 20)


def test_what_an_app_raises_is_raised() -> None:
    async def broken(scope: Scope, receive: Receive, send: Send) -> None:
        raise ValueError("broken")

    client = Client()
    with pytest.raises(ValueError, match="broken"):
        asyncio.run(run(broken, SCOPE, client.receive, Rewriting(client.send, lambda *_: None), asyncio.Event()))


def test_a_stream_of_several_prompts_tells_of_those_that_are_refused() -> None:
    """Some are refused before they answer: the pool has changed, or the mixture cannot be made."""
    gone, large = unavailable("the pool changed", retry_after=1), UsageError("mix fewer adapters")

    async def refused(send: Send, error: Exception) -> None:
        raise error

    async def answered(send: Send) -> None:
        await send({"type": "http.response.start", "status": 200, "headers": []})
        event = b'data: {"id": "x", "choices": [{"index": 0, "text": "a"}]}\n\n'
        await send({"type": "http.response.body", "body": event, "more_body": True})
        await send({"type": "http.response.body", "body": b"data: [DONE]\n\n"})

    def streamed(*run: Run) -> Client:
        client = Client()
        asyncio.run(merged_stream(client.send, run, [{}] * len(run), 1))
        return client

    some = streamed(partial(refused, error=large), answered, partial(refused, error=gone))
    assert some.status == 200
    *events, end = [json.loads(line[6:]) if b"{" in line else line for line in some.body.split(b"\n") if line]
    assert end == b"data: [DONE]" and len(events) == 3
    assert [found["choices"][0]["index"] for found in events if "choices" in found] == [1]
    told = [found["error"]["message"] for found in events if "error" in found]
    assert told == ["mix fewer adapters", "the pool changed"]
    none = streamed(partial(refused, error=large), partial(refused, error=gone))
    assert none.status == 400 and json.loads(none.body)["error"]["message"] == "mix fewer adapters"
    assert streamed(partial(refused, error=gone), partial(refused, error=large)).status == 503
    with pytest.raises(ValueError, match="a fault"):
        streamed(partial(refused, error=ValueError("a fault")))


@dataclass
class Output:
    """Of vLLM, as far as overflows go."""

    request_id: str
    num_nans_in_logits: int


@dataclass
class State:
    lora_name: str | None


def test_only_answers_with_that_recipe_are_told() -> None:
    states = {"1": State("logo://a:1"), "2": State("logo://b:1"), "3": State(None)}
    a, b = "logo://a:1", "logo://b:1"
    with watched(a) as one, watched(a) as other, watched(b) as third, watched(None) as base:
        notice(states, [Output("1", 0), Output("2", 0)])
        assert not any(event.is_set() for event in (one, other, third, base))
        notice(states, [Output("3", 7), Output("1", 512), Output("gone", 1)])
        assert one.is_set() and other.is_set() and not third.is_set() and not base.is_set()
    with watched(a) as later:
        notice(states, [Output("2", 1)])
        assert not later.is_set()
