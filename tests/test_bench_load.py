"""Clients under load: that each tells good answers from bad ones, times them and leaves when it should."""

from __future__ import annotations

import asyncio
import itertools
from collections.abc import Awaitable, Callable
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

from logo.bench import load
from logo.bench.load import run_load, send
from logo.bench.watch import Churn, Sample, churn, sample, settled
from logo.bench.wire import Answer, Ask
from odd_server import TOKENS, OddServer
from tolerances import PATIENCE


def on_odd_server(act: Callable[[OddServer, Any], Awaitable[Any]]) -> Any:
    async def go() -> Any:
        async with OddServer() as server, server.endpoint.client() as client:
            return await act(server, client)

    return asyncio.run(go())


@pytest.mark.parametrize("stream", [False, True])
def test_an_answer_is_taken_in(stream: bool) -> None:
    async def act(server: OddServer, client: Any) -> Answer:
        answer = await send(client, "logo", 3, Ask("ok", 9, stream))
        [request] = server.requests
        assert request["model"] == "logo" and request["prompt"] == "ok" and request["max_tokens"] == 9
        assert request["temperature"] == 0 and request["return_token_ids"] is True
        assert server.keys == ["bearer key"]
        return answer

    answer = on_odd_server(act)
    assert (answer.ask, answer.outcome, answer.kind) == (3, "ok", "")
    assert answer.token_ids == tuple(TOKENS) and answer.output_tokens == 4 and answer.prompt_tokens == 3
    assert answer.adapters == ("b", "a")
    if not stream:
        assert answer.first is None and answer.gaps == ()
        return
    assert 0 < answer.first < answer.seconds  # not the piece without a token
    assert len(answer.gaps) == 3 and len(set(answer.gaps)) == 1  # three tokens in one piece share its time
    assert answer.first + sum(answer.gaps) <= answer.seconds


@pytest.mark.parametrize(
    ("prompt", "stream", "kind", "message"),
    [
        ("full", False, "429", "the queue is full"),
        ("full", True, "429", "the queue is full"),
        ("broken", False, "500", "<h1>Internal error</h1>"),
        ("junk", False, "bad answer", "not a JSON object: '<html>'"),
        ("no choices", False, "bad answer", "KeyError 'choices' in {}"),
        ("endless", False, "bad answer", "it has no finish_reason"),
        ("miscounted", False, "bad answer", "usage counts 4 tokens, 1 came"),
        ("cut", True, "broken stream", "it ended after 1 tokens without [DONE]"),
        ("failing", True, "error in stream", "out of memory"),
        ("short", False, "connection", "RemoteProtocolError"),
        ("stuck", False, "timeout", "no whole answer after 0.2 s"),
        ("stuck", True, "timeout", "no whole answer after 0.2 s"),
    ],
)
def test_a_bad_answer_is_an_error_of_its_kind(prompt: str, stream: bool, kind: str, message: str) -> None:
    async def act(server: OddServer, client: Any) -> list[Answer]:
        bad = await send(client, "logo", 0, Ask(prompt, 4, stream), timeout=0.2 if kind == "timeout" else PATIENCE)
        if kind == "timeout" and server.requests:  # on a busy machine it may be over before it has asked
            await server.left.wait()
        return [bad, await send(client, "logo", 1, Ask("ok", 4))]  # and the client can go on

    bad, good = on_odd_server(act)
    assert (bad.outcome, bad.kind) == ("error", kind)
    assert message in bad.message and "\n" not in bad.message
    assert good.outcome == "ok"


def test_no_server_is_an_error() -> None:
    async def act(server: OddServer, client: Any) -> Answer:
        server._server.close()
        await server._server.wait_closed()
        return await send(client, "logo", 0, Ask("ok", 4))

    answer = on_odd_server(act)
    assert (answer.outcome, answer.kind) == ("error", "connection") and "ConnectError" in answer.message


@pytest.mark.parametrize(
    ("stream", "hang_up", "tokens"), [(True, 0.0, 1), (True, 0.5, 2), (False, 0.0, 0), (False, 0.1, 0)]
)
def test_a_client_hangs_up(stream: bool, hang_up: float, tokens: int) -> None:
    """The server sees that the connection is closed; it would wait for ever otherwise."""

    async def act(server: OddServer, client: Any) -> Answer:
        answer = await send(client, "logo", 0, Ask("stuck", 4, stream, hang_up))
        if server.requests:  # a client that leaves at once may not even have asked
            await server.left.wait()
        return answer

    answer = on_odd_server(act)
    assert (answer.outcome, answer.kind, answer.output_tokens) == ("hung up", "", tokens)


def test_a_client_that_would_leave_later_than_its_answer_comes_gets_it() -> None:
    asks = [Ask("ok", 4, False, PATIENCE), Ask("ok", 100, True, 0.9)]

    async def act(server: OddServer, client: Any) -> list[Answer]:
        return [await send(client, "logo", i, ask) for i, ask in enumerate(asks)]

    assert [answer.outcome for answer in on_odd_server(act)] == ["ok", "ok"]


def test_so_many_clients_at_a_time() -> None:
    asks = [Ask("ok", 4, i % 3 == 0) for i in range(40)] + [Ask("full", 4)]
    told: list[Answer] = []

    async def act(server: OddServer, client: Any) -> tuple[list[Answer], float, int]:
        server.together = 7
        return *await run_load(server.endpoint, "logo", asks, concurrency=7, on_answer=told.append), server.most

    answers, seconds, most = on_odd_server(act)
    assert most == 7 and told == answers
    assert sorted(answer.ask for answer in answers) == list(range(41))
    assert [answer.ask for answer in answers if answer.outcome == "error"] == [40]
    assert seconds >= max(answer.seconds for answer in answers)


def test_for_so_long(monkeypatch: pytest.MonkeyPatch) -> None:
    """By a clock that moves a tenth of a second whenever somebody looks at it."""
    looks = itertools.count()
    monkeypatch.setattr(load, "time", SimpleNamespace(perf_counter=lambda: next(looks) / 10))
    asks = [Ask("ok", 4), Ask("ok", 4)]

    async def act(server: OddServer, client: Any) -> tuple[list[Answer], float]:
        return await run_load(server.endpoint, "logo", asks, concurrency=2, seconds=10)

    answers, seconds = on_odd_server(act)
    assert seconds >= 10 and len(answers) > 2  # over again
    assert {answer.ask for answer in answers} == {0, 1}


def test_an_adapter_comes_and_goes() -> None:
    async def act(server: OddServer, client: Any) -> tuple[int, list[str], list[dict[str, Any]]]:
        stop = asyncio.Event()
        coming_and_going = asyncio.create_task(churn(client, Churn(0.01, Path("/pool/x"), "x"), stop))
        while len(server.requests) < 4:
            await asyncio.sleep(0.01)
        stop.set()
        return *await coming_and_going, server.requests

    changes, failed, requests = on_odd_server(act)
    assert not failed and changes == len(requests) >= 4 and changes % 2 == 0  # what was added is removed at the end
    for i, request in enumerate(requests):
        what = "unload" if i % 2 else "load"
        assert request.pop("path") == f"/v1/{what}_lora_adapter"
        assert request == {"lora_name": "x"} | ({} if i % 2 else {"lora_path": "/pool/x"})


def test_an_adapter_that_is_refused_is_reported() -> None:
    async def act(server: OddServer, client: Any) -> tuple[int, list[str]]:
        stop = asyncio.Event()
        stop.set()
        return await churn(client, Churn(1.0, Path("/x"), "refused"), stop)

    assert on_odd_server(act) == (0, ["load refused: 400: no"])


def test_the_server_is_given_time_to_settle() -> None:
    async def act(server: OddServer, client: Any) -> list[Sample | None]:
        server.kv_blocks = [2, 5, 4, 2]
        before = await sample(client, 0.0)
        after = await settled(client, 0.0, before, wait=PATIENCE)
        server.kv_blocks = [9]
        return [before, after, await settled(client, 0.0, before, wait=0.2)]

    before, after, late = on_odd_server(act)
    assert before.resident == 5e7 and before.requests == 0
    assert [before.kv_blocks, after.kv_blocks, late.kv_blocks] == [2, 2, 9]
