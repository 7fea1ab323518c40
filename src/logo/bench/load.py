"""Load on a server: many HTTP clients at once, and what each of them received.

This module handles HTTP and times only. It does not know what serves, whether adapters are added meanwhile, or which
answers are right.
"""

from __future__ import annotations

import asyncio
import contextlib
import functools
import itertools
import ssl
import time
from collections.abc import AsyncGenerator, Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import cast

import httpx

from logo.bench.wire import Answer, Ask, Outcome, Received, Refused, parsed, said

_AFTER_FAILURE = 0.1  # seconds


@dataclass(frozen=True)
class Endpoint:
    """A server: its address and its API key."""

    url: str
    api_key: str | None = None

    def client(self) -> httpx.AsyncClient:
        """A client, straight to the server, past any proxies."""
        headers = {} if self.api_key is None else {"Authorization": f"Bearer {self.api_key}"}
        # No timeouts here: `send` limits the whole duration of each request.
        return httpx.AsyncClient(base_url=self.url, headers=headers, verify=_tls(), timeout=None, trust_env=False)


@functools.cache
def _tls() -> ssl.SSLContext:
    """One TLS context for all clients, because making one takes longer than a request."""
    return httpx.create_ssl_context()


async def run_load(
    endpoint: Endpoint,
    model: str,
    asks: Sequence[Ask],
    *,
    concurrency: int,
    seconds: float | None = None,
    timeout: float = 300.0,
    on_answer: Callable[[Answer], None] = lambda answer: None,
) -> tuple[list[Answer], float]:
    """Sends all requests once, or repeatedly for some time, from several clients that each take the next one.

    Args:
        concurrency: requests in flight.
        seconds: begin no request later than this; None: each ask once.
        timeout: seconds that one request may take.
        on_answer: called with each answer.

    Returns:
        Answers in the order in which they ended, and seconds from the first request to the last answer.
    """
    answers: list[Answer] = []
    started = time.perf_counter()
    numbers = _numbers(len(asks), seconds)

    async def worker() -> None:
        # One client per worker: with a shared connection pool, some workers would wait for seconds.
        async with endpoint.client() as client:
            for number in numbers:  # one iterator for all: a free client takes the next
                answer = await send(client, model, number, asks[number], timeout)
                answers.append(answer)
                on_answer(answer)
                if answer.kind == "connection":  # a server that is gone is not asked a thousand times a second
                    await asyncio.sleep(_AFTER_FAILURE)

    await asyncio.gather(*(worker() for _ in range(concurrency)))
    return answers, time.perf_counter() - started


def _numbers(count: int, seconds: float | None) -> Iterator[int]:
    if seconds is None:
        yield from range(count)
        return
    end = time.perf_counter() + seconds
    for number in itertools.cycle(range(count)):
        if time.perf_counter() >= end:
            return
        yield number


async def send(client: httpx.AsyncClient, model: str, number: int, ask: Ask, timeout: float = 300.0) -> Answer:
    """Sends one request and returns its answer. Errors of server and connection are in the answer, not raised."""
    received = Received(time.perf_counter())
    kind = message = ""
    leaves = ask.hang_up is not None and not ask.stream
    patience = ask.hang_up if leaves else timeout
    try:
        receive = _stream if ask.stream else _whole
        complete = await asyncio.wait_for(receive(client, model, ask, received), patience)
        outcome: Outcome = "ok" if complete else "hung up"
    except asyncio.TimeoutError:
        outcome = "hung up" if leaves else "error"
        kind, message = ("", "") if leaves else ("timeout", f"no whole answer after {timeout:g} s")
    except Refused as refused:
        outcome, kind, message = "error", refused.kind, str(refused)
    except httpx.HTTPError as error:
        outcome, kind, message = "error", "connection", f"{type(error).__name__}: {error}"
    return received.answer(number, outcome, kind, message)


async def _whole(client: httpx.AsyncClient, model: str, ask: Ask, received: Received) -> bool:
    response = await client.post("/v1/completions", json=ask.body(model))
    if response.status_code != 200:
        raise Refused(str(response.status_code), said(response.text))
    received.take(parsed(response.text))
    received.check()
    return True


async def _stream(client: httpx.AsyncClient, model: str, ask: Ask, received: Received) -> bool:
    """Whether the stream was received to its end; False if the client left on purpose."""
    enough = None if ask.hang_up is None else max(1, int(ask.hang_up * ask.max_tokens))
    async with client.stream("POST", "/v1/completions", json=ask.body(model)) as response:
        if response.status_code != 200:
            raise Refused(str(response.status_code), said((await response.aread()).decode(errors="replace")))
        done = False
        async with contextlib.aclosing(_events(response)) as events:
            async for data in events:
                done = done or data == "[DONE]"
                if data == "[DONE]":
                    continue  # to the end of the body, so that the connection can be used again
                received.take_chunk(parsed(data))
                if enough is not None and received.tokens >= enough:
                    return False
        if not done:
            raise Refused("broken stream", f"it ended after {received.tokens} tokens without [DONE]")
    received.check()
    return True


async def _events(response: httpx.Response) -> AsyncGenerator[str, None]:
    """The data of a stream's server-sent events, each of which is one line here."""
    # `aiter_lines` is a generator; if it is left early, it has to be closed before the response.
    async with contextlib.aclosing(cast(AsyncGenerator[str, None], response.aiter_lines())) as lines:
        async for line in lines:
            if line.startswith("data:"):
                yield line[len("data:") :].strip()
