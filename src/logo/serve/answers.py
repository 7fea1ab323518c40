"""The objects of OpenAI's API that answers are sent in, whole or as events of a stream.

Call, Chunk, Chunk, ... -> a completion or a chat, or `data: {...}` for every chunk
"""

from __future__ import annotations

import json
import time
import uuid
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple

from logo.api import bodies
from logo.core import FinishReason, Prompt
from logo.serve.packed import HeldMixture
from logo.serve.sampling import Sampling


@dataclass(frozen=True)
class Call:
    """A request for text with all that answering it needs."""

    body: bodies.ChatRequest | bodies.CompletionRequest
    prompts: Sequence[Prompt]
    mixtures: Sequence[HeldMixture]  # of each prompt
    sampling: Sampling  # of the first choice; the seeds of the others are the numbers that follow its
    began: float  # by `time.perf_counter`
    logged: dict[str, Any]  # its line in the log

    @property
    def is_chat(self) -> bool:
        """Whether it asks for the answer of a chat, and not for a completion."""
        return isinstance(self.body, bodies.ChatRequest)

    @property
    def count(self) -> int:
        """The number of its answers."""
        return len(self.prompts) * self.body.n


class Chunk(NamedTuple):
    """New text (whole characters) and tokens of one answer, and why it ended; None until it does. Answers to the first
    prompt have the first numbers. The text of a token may be in a later chunk."""

    number: int
    text: str = ""
    tokens: tuple[int, ...] = ()
    finish_reason: FinishReason | None = None


def head(call: Call) -> dict[str, Any]:
    """What all objects of an answer begin with."""
    if not call.is_chat:
        kind = "text_completion"
    elif call.body.stream:
        kind = "chat.completion.chunk"
    else:
        kind = "chat.completion"
    name = f"{'chatcmpl' if call.is_chat else 'cmpl'}-{uuid.uuid4().hex}"
    return {"id": name, "object": kind, "created": int(time.time()), "model": call.body.model}


def choice(call: Call, chunk: Chunk, begins: bool = False) -> dict[str, Any]:
    """One answer, or a piece of it; `begins`: the first one."""
    if not call.is_chat:
        content: dict[str, Any] = {"text": chunk.text}
    elif not call.body.stream:
        content = {"message": {"role": "assistant", "content": chunk.text, "refusal": None}}
    elif begins:
        content = {"delta": {"role": "assistant", "content": chunk.text}}
    else:
        content = {"delta": {"content": chunk.text}}
    fields = {"index": chunk.number, **content, "logprobs": None, "finish_reason": chunk.finish_reason}
    if call.body.return_token_ids:
        fields["token_ids"] = list(chunk.tokens)
    return fields


def usage(call: Call) -> dict[str, int]:
    """The counts of tokens; each prompt is counted once, however many answers it has."""
    prompt_tokens = call.logged["prompt_tokens"]
    completion_tokens = call.logged["completion_tokens"]
    return {
        "prompt_tokens": prompt_tokens,
        "completion_tokens": completion_tokens,
        "total_tokens": prompt_tokens + completion_tokens,
    }


def mixtures(call: Call) -> Any:
    """Field `logo`: the mixture of a single prompt, or a list for a list of prompts."""
    replies = [mixture.chosen.reply() for mixture in call.mixtures]
    is_list = isinstance(call.body, bodies.CompletionRequest) and call.body.several
    return replies if is_list else replies[0]


def event(reply: Mapping[str, Any]) -> bytes:
    """An object as an event of a stream."""
    return b"data: " + json.dumps(reply).encode() + b"\n\n"
