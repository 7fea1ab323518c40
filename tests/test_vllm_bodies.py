"""What the router makes of the bodies of OpenAI's requests, without vLLM."""

from __future__ import annotations

from typing import Any

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
