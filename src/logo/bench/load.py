"""Load: many HTTP clients at once, and what each of them saw.

Knows OpenAI's wire format (`/v1/completions`, whole or streamed) and clocks; knows nothing about who serves, about
adapters being added meanwhile or about what an answer ought to be.
"""

from __future__ import annotations

import asyncio
import contextlib
import itertools
import json
import time
from collections.abc import AsyncGenerator, Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, Literal, cast

import httpx

Outcome = Literal["ok", "hung up", "error"]

_SHOWN = 300  # characters of what a server said in an error


@dataclass(frozen=True)
class Endpoint:
    """A server: its address, and the key it wants."""

    url: str
    api_key: str | None = None

    def client(self) -> httpx.AsyncClient:
        """A client for any number of connections, straight to the server whatever proxies there are."""
        headers = {} if self.api_key is None else {"Authorization": f"Bearer {self.api_key}"}
        limits = httpx.Limits(max_connections=None, max_keepalive_connections=None)
        # No time limits here: each request has one of its own, over all it does.
        return httpx.AsyncClient(base_url=self.url, headers=headers, limits=limits, timeout=None, trust_env=False)


@dataclass(frozen=True)
class Ask:
    """One request.

    Attributes:
        prompt: its text.
        max_tokens: longest answer.
        stream: whether the answer comes in pieces.
        hang_up: None: the client waits for its answer. Else a share in [0, 1): where the client closes the connection.
            Streaming, after this share of `max_tokens` (0: after the first token); otherwise after as many seconds.
    """

    prompt: str
    max_tokens: int
    stream: bool = False
    hang_up: float | None = None

    def body(self, model: str) -> dict[str, object]:
        """The request's JSON: greedy, with the answer's tokens."""
        streamed = {"stream": True, "stream_options": {"include_usage": True}} if self.stream else {}
        return {
            "model": model,
            "prompt": self.prompt,
            "max_tokens": self.max_tokens,
            "temperature": 0,
            "return_token_ids": True,
            **streamed,
        }


@dataclass(frozen=True)
class Answer:
    """What one client got.

    Attributes:
        ask: which of the asks, by position.
        outcome: a whole answer, closed by the client on purpose, or anything else.
        seconds: from sending to the last byte (or to the hang-up, or the error).
        kind: of an error: the HTTP status, `"timeout"`, `"connection"`, `"broken stream"`, `"error in stream"` or
            `"bad answer"`.
        message: of an error: what the server or the connection said.
        token_ids: of the answer; None where the server does not tell.
        output_tokens, prompt_tokens: counted by the server, else from the answer.
        first: seconds to the first token; None where the answer came whole.
        gaps: seconds between tokens. The time before a piece of several tokens is shared among them.
        adapters: that gave the answer, where the server tells.
    """

    ask: int
    outcome: Outcome
    seconds: float
    kind: str = ""
    message: str = ""
    token_ids: tuple[int, ...] | None = None
    output_tokens: int = 0
    prompt_tokens: int = 0
    first: float | None = None
    gaps: tuple[float, ...] = ()
    adapters: tuple[str, ...] = ()


async def run_load(
    client: httpx.AsyncClient,
    model: str,
    asks: Sequence[Ask],
    *,
    concurrency: int,
    seconds: float | None = None,
    timeout: float = 300.0,
    on_answer: Callable[[Answer], None] = lambda answer: None,
) -> tuple[list[Answer], float]:
    """Sends all asks once, or again and again for some time; so many at a time, each client taking the next.

    Args:
        concurrency: requests in flight.
        seconds: begin no request later than this; None: each ask once.
        timeout: seconds that one request may take.
        on_answer: called as answers come.

    Returns:
        Answers in the order in which they ended, and seconds from the first request to the last answer.
    """
    answers: list[Answer] = []
    started = time.perf_counter()
    numbers = _numbers(len(asks), seconds)

    async def worker() -> None:
        for number in numbers:  # one iterator for all: whoever is free takes the next
            answer = await send(client, model, number, asks[number], timeout)
            answers.append(answer)
            on_answer(answer)

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


class Refused(Exception):
    """An answer that is none: its `kind` (see `Answer`) and what was said."""

    def __init__(self, kind: str, message: str) -> None:
        super().__init__(message)
        self.kind = kind


async def send(client: httpx.AsyncClient, model: str, number: int, ask: Ask, timeout: float = 300.0) -> Answer:
    """One request and what came of it; never raises for what a server or a connection does."""
    heard = _Heard(time.perf_counter())
    kind = message = ""
    leaves = ask.hang_up is not None and not ask.stream
    patience = ask.hang_up if leaves else timeout
    try:
        receive = _stream if ask.stream else _whole
        complete = await asyncio.wait_for(receive(client, model, ask, heard), patience)
        outcome: Outcome = "ok" if complete else "hung up"
    except asyncio.TimeoutError:
        outcome = "hung up" if leaves else "error"
        kind, message = ("", "") if leaves else ("timeout", f"no whole answer after {timeout:g} s")
    except Refused as refused:
        outcome, kind, message = "error", refused.kind, str(refused)
    except httpx.HTTPError as error:
        outcome, kind, message = "error", "connection", f"{type(error).__name__}: {error}"
    return heard.answer(number, outcome, kind, message)


async def _whole(client: httpx.AsyncClient, model: str, ask: Ask, heard: _Heard) -> bool:
    response = await client.post("/v1/completions", json=ask.body(model))
    if response.status_code != 200:
        raise Refused(str(response.status_code), said(response.text))
    heard.take(_parsed(response.text))
    heard.check()
    return True


async def _stream(client: httpx.AsyncClient, model: str, ask: Ask, heard: _Heard) -> bool:
    """Whether the stream was heard to its end; False where the client left on purpose."""
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
                heard.take_piece(_parsed(data))
                if enough is not None and heard.tokens >= enough:
                    return False
        if not done:
            raise Refused("broken stream", f"it ended after {heard.tokens} tokens without [DONE]")
    heard.check()
    return True


async def _events(response: httpx.Response) -> AsyncGenerator[str, None]:
    """The data of a stream's server-sent events, each of which is one line here."""
    # A generator it is; left early, it has to be closed before the response is.
    async with contextlib.aclosing(cast(AsyncGenerator[str, None], response.aiter_lines())) as lines:
        async for line in lines:
            if line.startswith("data:"):
                yield line[len("data:") :].strip()


def _parsed(text: str) -> Mapping[str, Any]:
    try:
        parsed = json.loads(text)
    except ValueError:
        parsed = None
    if not isinstance(parsed, dict):
        raise Refused("bad answer", f"not a JSON object: {text[:_SHOWN]!r}")
    return parsed


def said(text: str) -> str:
    """The message in an error's JSON, else its text, cut."""
    try:
        return str(json.loads(text)["error"]["message"])[:_SHOWN]
    except (ValueError, KeyError, TypeError):
        return " ".join(text.split())[:_SHOWN]


@dataclass
class _Heard:
    """What has come in of one answer."""

    started: float
    last: float | None = None
    first: float | None = None
    gaps: list[float] = field(default_factory=list)
    token_ids: list[int] | None = None
    tokens: int = 0
    finished: str | None = None
    usage: Mapping[str, Any] = field(default_factory=dict)
    adapters: tuple[str, ...] = ()

    def take_piece(self, piece: Mapping[str, Any]) -> None:
        """A chunk of a stream, with the time."""
        if "error" in piece:
            raise Refused("error in stream", said(json.dumps(piece)))
        new = self.take(piece)
        if not new:
            return
        now = time.perf_counter()
        if self.last is None:
            self.first = now - self.started
        else:
            self.gaps += [(now - self.last) / new] * new
        self.last = now

    def take(self, piece: Mapping[str, Any]) -> int:
        """A whole answer, or a chunk of one; how many tokens it brings."""
        try:
            self.usage = piece.get("usage") or self.usage
            if "logo" in piece:
                self.adapters = tuple(piece["logo"]["adapters"])
            if not piece["choices"]:
                return 0
            choice = piece["choices"][0]
            self.finished = choice.get("finish_reason") or self.finished
            ids = choice.get("token_ids")
            if ids is not None:
                self.token_ids = [*(self.token_ids or ()), *map(int, ids)]
            new = len(ids) if ids is not None else int(bool(choice.get("text")))
        except (KeyError, TypeError, AttributeError, ValueError) as error:
            raise Refused("bad answer", f"{type(error).__name__} {error} in {str(piece)[:_SHOWN]}") from None
        self.tokens += new
        return new

    def check(self) -> None:
        """That a whole answer agrees with itself."""
        if self.finished is None:
            raise Refused("bad answer", "it has no finish_reason")
        counted = self.usage.get("completion_tokens")
        if counted is not None and self.token_ids is not None and counted != len(self.token_ids):
            raise Refused("bad answer", f"usage counts {counted} tokens, {len(self.token_ids)} came")

    def answer(self, number: int, outcome: Outcome, kind: str, message: str) -> Answer:
        return Answer(
            number,
            outcome,
            time.perf_counter() - self.started,
            kind,
            message,
            None if self.token_ids is None else tuple(self.token_ids),
            int(self.usage.get("completion_tokens") or self.tokens),
            int(self.usage.get("prompt_tokens") or 0),
            self.first,
            tuple(self.gaps),
            self.adapters,
        )
