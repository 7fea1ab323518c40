"""Answers of vLLM's app on their way out: changed, joined, and ended where one fails. The app is made up."""

from __future__ import annotations

import asyncio
import json
from collections.abc import Coroutine
from dataclasses import dataclass, field
from functools import partial
from typing import Any

import pytest
from starlette.types import Message, Receive, Scope, Send

from logo.backends.vllm.asgi import answer, run, together
from logo.backends.vllm.rewriting import Rewriting
from logo.backends.vllm.several import Refused, merged, merged_stream
from logo.serve.errors import ApiError, failed

SCOPE: Scope = {"type": "http"}
ERROR = failed("the mixture could not be made", "mixture_failed")


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
    """An app that streams token after token, or gives them at the end; until its client leaves.

    As vLLM's, it does not end where only the task that waits for it is cancelled.
    """

    tokens: int
    streams: bool
    given: int = 0
    ended: str = ""
    status: int = 200

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if self.streams:
            await self.stream(send)
        else:
            await asyncio.shield(asyncio.ensure_future(self.whole(receive, send)))

    async def stream(self, send: Send) -> None:
        headers = [(b"content-type", b"text/event-stream")]
        await send({"type": "http.response.start", "status": 200, "headers": headers})
        try:
            while self.given < self.tokens:
                self.given += 1
                choice = {"index": 0, "text": f"{self.given}"}
                event = b"data: " + json.dumps({"id": "x", "choices": [choice]}).encode() + b"\n\n"
                await send({"type": "http.response.body", "body": event, "more_body": True})
                await asyncio.sleep(0)
        except asyncio.CancelledError:
            self.ended = "cancelled"
            raise
        await send({"type": "http.response.body", "body": b"data: [DONE]\n\n"})

    async def whole(self, receive: Receive, send: Send) -> None:
        leaving = asyncio.ensure_future(receive())
        while self.given < self.tokens and not leaving.done():
            self.given += 1
            await asyncio.sleep(0)
        self.ended = "left" if leaving.done() else ""
        leaving.cancel()
        usage = {"prompt_tokens": 3, "total_tokens": 4, "prompt_tokens_details": {"cached_tokens": self.given}}
        found = {"choices": [{"index": 0, "text": f"{self.given}"}], "usage": usage}
        await answer(send, self.status, json.dumps(found).encode())

    def asked(self, client: Client) -> Any:
        """Runs it, for `merged`."""

        async def run_it(send: Send) -> None:
            await run(self, SCOPE, client.receive, send)

        return run_it


def answered(engine: Engine, error: ApiError | None = None) -> tuple[Client, int]:
    """What a client is sent, and how often it was looked whether the answer is one."""
    client, checks = Client(), 0

    async def check() -> ApiError | None:
        nonlocal checks
        checks += 1
        return error

    def change(found: dict[str, Any], first: bool) -> None:
        found["first"] = first

    asyncio.run(run(engine, SCOPE, client.receive, Rewriting(client.send, change, check)))
    return client, checks


def events(client: Client) -> list[Any]:
    return [json.loads(line[6:]) if b"{" in line else line for line in client.body.split(b"\n") if line]


def test_an_answer_comes_as_it_is_unless_its_mixture_failed() -> None:
    client, checks = answered(Engine(2, streams=False))
    assert (client.status, json.loads(client.body)["first"], checks) == (200, True, 1)
    client, checks = answered(Engine(2, streams=True))
    *chunks, end = events(client)
    assert [chunk["first"] for chunk in chunks] == [True, False] and end == b"data: [DONE]" and checks == 1
    client, _ = answered(Engine(2, streams=False), ERROR)
    assert (client.status, client.body) == (500, ERROR.content())
    client, _ = answered(Engine(1, streams=True), ERROR)
    *_, error, end = events(client)
    assert error["error"]["code"] == "mixture_failed" and end == b"data: [DONE]"


def test_what_an_app_raises_is_raised() -> None:
    async def broken(scope: Scope, receive: Receive, send: Send) -> None:
        raise ValueError("broken")

    client = Client()
    with pytest.raises(ValueError, match="broken"):
        asyncio.run(run(broken, SCOPE, client.receive, Rewriting(client.send, lambda *_: None)))


@pytest.mark.parametrize("streams", [False, True])
def test_siblings_of_a_prompt_that_fails_are_aborted(streams: bool) -> None:
    client, sibling = Client(), Engine(10**6, streams=streams)

    async def refuse(send: Send) -> None:
        await asyncio.sleep(0.01)
        await answer(send, 400, b'{"error": {"message": "no"}}')

    if not streams:
        with pytest.raises(Refused) as refused:
            asyncio.run(merged(client.send, [sibling.asked(client), refuse], [{}] * 2, 1))
        assert refused.value.answer.status == 400 and not client.messages
    else:
        asyncio.run(merged_stream(client.send, [sibling.asked(client), refuse], [{}] * 2, 1))
        *_, error, end = events(client)
        assert error["error"]["message"] == "no" and end == b"data: [DONE]"
    assert sibling.ended == ("cancelled" if streams else "left") and 0 < sibling.given < 10**6


def test_an_error_of_a_selection_ends_the_others() -> None:
    ended = []

    async def probe(seconds: float, error: Exception) -> None:
        try:
            await asyncio.sleep(seconds)
            raise error
        finally:
            ended.append(seconds)

    with pytest.raises(ValueError, match="first"):
        asyncio.run(together([probe(60, ValueError("never")), probe(0, ValueError("first"))]))
    assert ended == [0, 60]


def test_usage_is_that_of_all_prompts() -> None:
    client = Client()
    engines = [Engine(tokens, streams=False) for tokens in (2, 5)]
    asyncio.run(merged(client.send, [one.asked(client) for one in engines], [{"k": 1}, {"k": 2}], 1))
    found = json.loads(client.body)
    assert [(choice["index"], choice["text"]) for choice in found["choices"]] == [(0, "2"), (1, "5")]
    assert found["logo"] == [{"k": 1}, {"k": 2}]
    assert found["usage"] == {"prompt_tokens": 6, "total_tokens": 8, "prompt_tokens_details": {"cached_tokens": 7}}


def test_a_stream_of_several_prompts_is_one() -> None:
    """And an error before anything was sent is the whole response."""
    client = Client()
    asyncio.run(merged_stream(client.send, [Engine(2, streams=True).asked(client) for _ in range(2)], [{}] * 2, 1))
    *chunks, end = events(client)
    assert end == b"data: [DONE]" and "logo" in chunks[0] and not any("logo" in chunk for chunk in chunks[1:])
    assert sorted(chunk["choices"][0]["index"] for chunk in chunks) == [0, 0, 1, 1]

    async def raises(send: Send, error: Exception) -> None:
        raise error

    def refused(*errors: Exception) -> Coroutine[Any, Any, None]:
        return merged_stream(Client().send, [partial(raises, error=error) for error in errors], [{}], 1)

    with pytest.raises(Refused) as found:
        asyncio.run(refused(ERROR))
    assert found.value.answer.status == 500
    with pytest.raises(ValueError, match="a fault"):
        asyncio.run(refused(ValueError("a fault")))
