"""OpenAI's wire format: requests, and answers in one piece or as a stream, with times."""

from __future__ import annotations

import json
import time
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any, Literal

Outcome = Literal["ok", "hung up", "error"]

_SHOWN = 300  # characters of what a server said in an error


@dataclass(frozen=True)
class Ask:
    """One request.

    Attributes:
        prompt: its text.
        max_tokens: longest answer.
        stream: whether the answer is streamed.
        hang_up: None: the client waits for the whole answer. Otherwise the point in [0, 1) at which it disconnects: as
            a share of `max_tokens` for a stream (0: after the first token), else in seconds.
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
    """What one client received.

    Attributes:
        ask: number of the request.
        outcome: a complete answer, ended by the client on purpose, or an error.
        seconds: from sending to the last byte (or to the disconnection, or the error).
        kind: of an error: the HTTP status, `"timeout"`, `"connection"`, `"broken stream"`, `"error in stream"` or `"bad
            answer"`.
        message: of an error: the message of the server or the connection.
        token_ids: tokens of the answer; None if the server does not return them.
        output_tokens, prompt_tokens: counted by the server, else from the answer.
        first: seconds to the first token; None without streaming.
        gaps: seconds between tokens. The time before a chunk of several tokens is divided among them.
        adapters: adapters of the answer, if the server returns them.
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


class Refused(Exception):
    """An invalid answer: its `kind` (see `Answer`) and a message."""

    def __init__(self, kind: str, message: str) -> None:
        super().__init__(message)
        self.kind = kind


def parsed(text: str) -> Mapping[str, Any]:
    """A JSON object.

    Raises:
        Refused: the text is not a JSON object.
    """
    try:
        parsed = json.loads(text)
    except ValueError:
        parsed = None
    if not isinstance(parsed, dict):
        raise Refused("bad answer", f"not a JSON object: {text[:_SHOWN]!r}")
    return parsed


def said(text: str) -> str:
    """The message of an error's JSON, else its text, truncated."""
    try:
        return str(json.loads(text)["error"]["message"])[:_SHOWN]
    except (ValueError, KeyError, TypeError):
        return " ".join(text.split())[:_SHOWN]


@dataclass
class Received:
    """The received part of one answer."""

    started: float
    last: float | None = None
    first: float | None = None
    gaps: list[float] = field(default_factory=list)
    token_ids: list[int] | None = None
    tokens: int = 0
    finished: str | None = None
    usage: Mapping[str, Any] = field(default_factory=dict)
    adapters: tuple[str, ...] = ()

    def take_chunk(self, chunk: Mapping[str, Any]) -> None:
        """Takes a chunk of a stream and its time; raises Refused if it is an error."""
        if "error" in chunk:
            raise Refused("error in stream", said(json.dumps(chunk)))
        new = self.take(chunk)
        if not new:
            return
        now = time.perf_counter()
        if self.last is None:
            self.first = now - self.started
        else:
            self.gaps += [(now - self.last) / new] * new
        self.last = now

    def take(self, chunk: Mapping[str, Any]) -> int:
        """Takes a whole answer or a chunk of one, and returns its number of tokens."""
        try:
            self.usage = chunk.get("usage") or self.usage
            if "logo" in chunk:
                self.adapters = tuple(chunk["logo"]["adapters"])
            if not chunk["choices"]:
                return 0
            choice = chunk["choices"][0]
            self.finished = choice.get("finish_reason") or self.finished
            ids = choice.get("token_ids")
            if ids is not None:
                self.token_ids = [*(self.token_ids or ()), *map(int, ids)]
            new = len(ids) if ids is not None else int(bool(choice.get("text")))
        except (KeyError, TypeError, AttributeError, ValueError) as error:
            raise Refused("bad answer", f"{type(error).__name__} {error} in {str(chunk)[:_SHOWN]}") from None
        self.tokens += new
        return new

    def check(self) -> None:
        """Raises Refused unless the complete answer is consistent."""
        if self.finished is None:
            raise Refused("bad answer", "it has no finish_reason")
        counted = self.usage.get("completion_tokens")
        if counted is not None and self.token_ids is not None and counted != len(self.token_ids):
            raise Refused("bad answer", f"usage counts {counted} tokens, {len(self.token_ids)} came")

    def answer(self, number: int, outcome: Outcome, kind: str, message: str) -> Answer:
        """The answer, as far as it has been received."""
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
