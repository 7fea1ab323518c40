"""Answers as JSON: OpenAI's shape, `logo` on top, nothing that JSON cannot hold."""

from __future__ import annotations

import json

from logo.api.replies import Mixture
from logo.serving.openai import (
    ChatChunkChoice,
    ChatCompletionChunk,
    Completion,
    CompletionChoice,
    Delta,
    Usage,
    event,
)


def test_replies_have_openais_shape() -> None:
    mixture = Mixture(adapters=["a"], weights=[1.0], confidence=0.5, probe_ms=1.5, queue_ms=0.0)
    choice = CompletionChoice(index=0, text="a", finish_reason="stop")
    reply = Completion(id="cmpl-1", created=1, model="logo", choices=[choice], usage=Usage.of(3, 4), logo=mixture)
    assert json.loads(reply.model_dump_json()) == {
        "id": "cmpl-1",
        "object": "text_completion",
        "created": 1,
        "model": "logo",
        "usage": {"prompt_tokens": 3, "completion_tokens": 4, "total_tokens": 7},
        "logo": {"adapters": ["a"], "weights": [1.0], "confidence": 0.5, "probe_ms": 1.5, "queue_ms": 0.0},
        "choices": [{"index": 0, "text": "a", "logprobs": None, "finish_reason": "stop"}],
    }


def test_chunks_leave_out_what_they_do_not_have() -> None:
    chunk = ChatCompletionChunk(
        id="chatcmpl-1", created=1, model="m", choices=[ChatChunkChoice(index=0, delta=Delta(content="é\u2028\n"))]
    )
    sent = event(chunk)
    assert sent.startswith(b"data: {") and sent.endswith(b"}\n\n") and sent.count(b"\n") == 2
    assert json.loads(sent[6:]) == {
        "id": "chatcmpl-1",
        "object": "chat.completion.chunk",
        "created": 1,
        "model": "m",
        "choices": [{"index": 0, "delta": {"content": "é\u2028\n"}, "logprobs": None, "finish_reason": None}],
    }
