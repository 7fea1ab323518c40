"""What the router makes of the bodies of OpenAI's requests, without vLLM."""

from __future__ import annotations

from typing import Any

import pytest

from logo.backends.vllm.bodies import CHAT, COMPLETIONS, RESPONSES, messages, probe

CALL = {"type": "function_call", "call_id": "1", "name": "look", "arguments": "{}"}
HISTORY: list[Any] = [
    {"role": "user", "content": "What is the weather?"},
    {"type": "reasoning", "id": "r", "summary": []},
    {"type": "message", "role": "assistant", "content": [{"type": "output_text", "text": "I look."}]},
    CALL,
    {**CALL, "call_id": "2"},
    {"type": "function_call_output", "call_id": "1", "output": "rain"},
    {"type": "function_call_output", "call_id": "2", "output": [{"type": "input_text", "text": "wind"}]},
    {**CALL, "call_id": "3"},
]


def test_a_conversation_with_tools_is_probed() -> None:
    body = {"model": "logo", "input": HISTORY, "instructions": "Be brief."}
    assert probe(RESPONSES, body, "base", None) == (
        COMPLETIONS,
        {"prompt": "What is the weather?", "model": "base", "max_tokens": 1, "temperature": 0.0},
    )
    path, asked = probe(RESPONSES, body, "base", "all")
    assert path == CHAT and asked["messages"] == messages(RESPONSES, body)
    calls = [{"id": i, "type": "function", "function": {"name": "look", "arguments": "{}"}} for i in "123"]
    assert (
        asked["messages"]
        == [  # as vLLM itself translates it for the answer
            {"role": "system", "content": "Be brief."},
            {"role": "user", "content": "What is the weather?"},
            {"role": "assistant", "content": "I look.", "tool_calls": calls[:2]},
            {"role": "tool", "tool_call_id": "1", "content": "rain"},
            {"role": "tool", "tool_call_id": "2", "content": "wind"},
            {"role": "assistant", "tool_calls": calls[2:]},
        ]
    )
    assert HISTORY[3] == CALL and "tool_calls" not in HISTORY[2]  # the answer gets the request as it came


SENT = {"cache_salt": "tenant", "priority": 3, "user": "me"}


@pytest.mark.parametrize("path", [COMPLETIONS, CHAT, RESPONSES])
@pytest.mark.parametrize("probe_text", [None, "all"])
def test_a_probe_is_salted_and_scheduled_as_its_answer(path: str, probe_text: Any) -> None:
    said = {COMPLETIONS: "prompt", CHAT: "messages", RESPONSES: "input"}[path]
    what = [{"role": "user", "content": "hello"}] if path == CHAT else "hello"
    _, asked = probe(path, {said: what, "seed": 4, **SENT}, "base", probe_text)
    assert {name: asked.get(name) for name in SENT} == SENT and "seed" not in asked
    assert not probe(path, {said: what}, "base", probe_text)[1].keys() & SENT.keys()


def test_a_probe_is_cut_and_reads_pictures_as_its_answer() -> None:
    cut = {"truncate_prompt_tokens": 9, "truncation_side": "left"}
    assert cut.items() <= probe(COMPLETIONS, {"prompt": "hello", **cut}, "base", None)[1].items()
    cut |= {"mm_processor_kwargs": {"size": 1}, "media_io_kwargs": {"image": {}}}
    messages = [{"role": "user", "content": [{"type": "image_url", "image_url": {"url": "x"}}]}]
    path, asked = probe(CHAT, {"messages": messages, **cut}, "base", None)
    assert path == CHAT and cut.items() <= asked.items()
