"""Load on a server: many HTTP clients at once that speak OpenAI's protocol, and what each of them received."""

from __future__ import annotations

import asyncio
import contextlib
import functools
import json
import ssl
import time
from collections.abc import AsyncGenerator, Callable, Sequence
from dataclasses import dataclass, field
from typing import Any, cast

import httpx

_SHOWN = 300  # characters of what a server said in an error
_AFTER_FAILURE = 0.1  # seconds


@dataclass(frozen=True)
class Ask:
    """One request: a prompt, the longest answer in tokens, and whether it is streamed."""

    prompt: str
    max_tokens: int
    stream: bool = False

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


@dataclass
class Answer:
    """What one client received.

    Attributes:
        ask: number of the request.
        started: when it was sent; `seconds`: from then to the last byte or the error.
        error: its kind: the HTTP status, `"timeout"`, `"connection"`, `"broken stream"`, `"error in stream"` or `"bad
            answer"`; "" for a complete answer. `message`: what the server or the connection said.
        token_ids: tokens of the answer; None if the server does not return them.
        tokens, prompt_tokens: counted by the server, else from the answer.
        first: seconds to the first token; None without streaming.
        gaps: seconds between tokens. The time before a chunk of several tokens is divided among them.
        adapters: adapters of the answer, if the server returns them.
    """

    ask: int
    started: float = 0.0
    seconds: float = 0.0
    error: str = ""
    message: str = ""
    token_ids: tuple[int, ...] | None = None
    tokens: int = 0
    prompt_tokens: int = 0
    first: float | None = None
    gaps: list[float] = field(default_factory=list)
    adapters: tuple[str, ...] = ()
    _last: float | None = None
    _finished: bool = False

    def take(self, chunk: dict[str, Any]) -> int:
        """Takes a whole answer or a chunk of one, and returns its number of tokens; raises Refused if it is none."""
        if "error" in chunk:
            raise Refused("error in stream", said(json.dumps(chunk)))
        try:
            usage = chunk.get("usage") or {}
            self.prompt_tokens = int(usage.get("prompt_tokens", self.prompt_tokens))
            self.adapters = tuple(chunk["logo"]["adapters"]) if "logo" in chunk else self.adapters
            new = 0
            for choice in chunk["choices"]:
                self._finished = self._finished or choice.get("finish_reason") is not None
                ids = choice.get("token_ids")
                if ids is not None:
                    self.token_ids = (*(self.token_ids or ()), *map(int, ids))
                new = len(ids) if ids is not None else int(bool(choice.get("text")))
            self.tokens += new
            counted = usage.get("completion_tokens")
        except (KeyError, TypeError, AttributeError, ValueError) as error:
            raise Refused("bad answer", f"{type(error).__name__} {error} in {str(chunk)[:_SHOWN]}") from None
        if counted is not None:
            if self.token_ids is not None and counted != len(self.token_ids):
                raise Refused("bad answer", f"usage counts {counted} tokens, {len(self.token_ids)} came")
            self.tokens = counted
        return new

    def take_timed(self, chunk: dict[str, Any]) -> None:
        """Takes a chunk of a stream and its time."""
        new = self.take(chunk)
        if not new:
            return
        now = time.perf_counter()
        if self._last is None:
            self.first = now - self.started
        else:
            self.gaps += [(now - self._last) / new] * new
        self._last = now

    def check(self) -> None:
        """Raises Refused unless the answer has come to its end."""
        if not self._finished:
            raise Refused("bad answer", "it has no finish_reason")


class Refused(Exception):
    """An invalid answer: its kind (see `Answer.error`) and a message."""

    def __init__(self, kind: str, message: str) -> None:
        super().__init__(message)
        self.kind = kind


def said(text: str) -> str:
    """The message of an error's JSON, else its text, truncated."""
    try:
        return str(json.loads(text)["error"]["message"])[:_SHOWN]
    except (ValueError, KeyError, TypeError):
        return " ".join(text.split())[:_SHOWN]


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
    timeout: float = 300.0,
    on_answer: Callable[[Answer], None] = lambda answer: None,
) -> tuple[list[Answer], float]:
    """Sends all requests once, from several clients that each take the next one.

    Args:
        concurrency: requests in flight.
        timeout: seconds that one request may take.
        on_answer: called with each answer.

    Returns:
        Answers in the order in which they ended, and seconds from the first request to the last answer.
    """
    answers: list[Answer] = []
    started = time.perf_counter()
    numbers = iter(range(len(asks)))

    async def worker() -> None:
        # One client per worker: with a shared connection pool, some workers would wait for seconds.
        async with endpoint.client() as client:
            for number in numbers:  # one iterator for all: a free client takes the next
                answer = await send(client, model, number, asks[number], timeout)
                answers.append(answer)
                on_answer(answer)
                if answer.error == "connection":  # a server that is gone is not asked a thousand times a second
                    await asyncio.sleep(_AFTER_FAILURE)

    await asyncio.gather(*(worker() for _ in range(concurrency)))
    return answers, time.perf_counter() - started


async def send(client: httpx.AsyncClient, model: str, number: int, ask: Ask, timeout: float = 300.0) -> Answer:
    """Sends one request and returns its answer. Errors of server and connection are in the answer, not raised."""
    answer = Answer(number, time.perf_counter())
    try:
        await asyncio.wait_for((_stream if ask.stream else _whole)(client, model, ask, answer), timeout)
    except asyncio.TimeoutError:
        answer.error, answer.message = "timeout", f"no whole answer after {timeout:g} s"
    except Refused as refused:
        answer.error, answer.message = refused.kind, str(refused)
    except httpx.HTTPError as error:
        answer.error, answer.message = "connection", f"{type(error).__name__}: {error}"
    answer.seconds = time.perf_counter() - answer.started
    return answer


async def _whole(client: httpx.AsyncClient, model: str, ask: Ask, answer: Answer) -> None:
    response = await client.post("/v1/completions", json=ask.body(model))
    if response.status_code != 200:
        raise Refused(str(response.status_code), said(response.text))
    answer.take(_parsed(response.text))
    answer.check()


async def _stream(client: httpx.AsyncClient, model: str, ask: Ask, answer: Answer) -> None:
    async with client.stream("POST", "/v1/completions", json=ask.body(model)) as response:
        if response.status_code != 200:
            raise Refused(str(response.status_code), said((await response.aread()).decode(errors="replace")))
        done = False
        # `aiter_lines` is a generator; if it is left early, it has to be closed before the response.
        async with contextlib.aclosing(cast(AsyncGenerator[str, None], response.aiter_lines())) as lines:
            async for line in lines:  # to the end of the body, so that the connection can be used again
                data = line.partition("data:")[2].strip()
                done = done or data == "[DONE]"
                if data and not done:
                    answer.take_timed(_parsed(data))
        if not done:
            raise Refused("broken stream", f"it ended after {answer.tokens} tokens without [DONE]")
    answer.check()


def _parsed(text: str) -> dict[str, Any]:
    try:
        parsed = json.loads(text)
    except ValueError:
        parsed = None
    if not isinstance(parsed, dict):
        raise Refused("bad answer", f"not a JSON object: {text[:_SHOWN]!r}")
    return parsed
