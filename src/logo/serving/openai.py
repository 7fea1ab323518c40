"""What the server answers: OpenAI's objects, with `logo` (which adapters, how strongly) on every one."""

from __future__ import annotations

import time
import uuid
from typing import Any, Literal

from pydantic import Field

from logo.api.replies import Mixture, ModelRole, Reply
from logo.core import FinishReason


def _absent(value: Any) -> bool:
    return value is None


class Usage(Reply):
    """Counts of tokens; each prompt is counted once, however many answers it has."""

    prompt_tokens: int
    completion_tokens: int
    total_tokens: int

    @classmethod
    def of(cls, prompt: int, completion: int) -> Usage:
        """The counts and their sum."""
        return cls(prompt_tokens=prompt, completion_tokens=completion, total_tokens=prompt + completion)


class CompletionChoice(Reply):
    """One answer, or a piece of it (then `finish_reason` is null until the last)."""

    index: int
    text: str
    logprobs: None = None
    finish_reason: FinishReason | None = None
    token_ids: list[int] | None = Field(None, exclude_if=_absent)


class _Answer(Reply):
    id: str
    created: int
    model: str
    usage: Usage | None = Field(None, exclude_if=_absent)
    logo: Mixture | list[Mixture] | None = Field(
        None,
        exclude_if=_absent,
        description="A list if the request has several prompts; in streams on the first chunk.",
    )


class Completion(_Answer):
    """Answer of `POST /v1/completions`."""

    object: Literal["text_completion"] = "text_completion"
    choices: list[CompletionChoice]


class CompletionChunk(Completion):
    """A piece of a streamed completion; the one with the usage has no choices."""


class ReplyMessage(Reply):
    """The assistant's turn."""

    role: Literal["assistant"] = "assistant"
    content: str
    refusal: None = None


class ChatChoice(Reply):
    """One answer."""

    index: int
    message: ReplyMessage
    logprobs: None = None
    finish_reason: FinishReason
    token_ids: list[int] | None = Field(None, exclude_if=_absent)


class ChatCompletion(_Answer):
    """Answer of `POST /v1/chat/completions`."""

    object: Literal["chat.completion"] = "chat.completion"
    choices: list[ChatChoice]


class Delta(Reply):
    """What a chunk adds to the message: the first one its role, the others text."""

    role: Literal["assistant"] | None = Field(None, exclude_if=_absent)
    content: str | None = Field(None, exclude_if=_absent)


class ChatChunkChoice(Reply):
    """A piece of one answer."""

    index: int
    delta: Delta
    logprobs: None = None
    finish_reason: FinishReason | None = None
    token_ids: list[int] | None = Field(None, exclude_if=_absent)


class ChatCompletionChunk(_Answer):
    """A piece of a streamed chat completion; the one with the usage has no choices."""

    object: Literal["chat.completion.chunk"] = "chat.completion.chunk"
    choices: list[ChatChunkChoice]


class ModelCard(Reply):
    """An id that requests may give as `model`."""

    id: str
    object: Literal["model"] = "model"
    created: int
    owned_by: str = "logo"
    root: str | None = None
    parent: str | None = Field(None, description="The base model of an adapter.")
    max_model_len: int | None = None
    permission: list[None] = Field([])
    logo: ModelRole


class ModelList(Reply):
    """Answer of `GET /v1/models`."""

    object: Literal["list"] = "list"
    data: list[ModelCard]


def new_id(prefix: Literal["cmpl", "chatcmpl"]) -> str:
    """An id that no other answer has."""
    return f"{prefix}-{uuid.uuid4().hex}"


def now() -> int:
    """For `created`: seconds since 1970."""
    return int(time.time())


DONE = b"data: [DONE]\n\n"
"""Ends a stream."""


def event(reply: Reply) -> bytes:
    """One server-sent event."""
    return b"data: " + reply.model_dump_json().encode("utf-8") + b"\n\n"
