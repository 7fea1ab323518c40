"""Bodies of OpenAI's requests: their prompts, and the body of the probe of each."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from typing import Any

from logo.core import ProbeText
from logo.errors import UsageError
from logo.prompts import asked_text

COMPLETIONS, CHAT, RESPONSES = "/v1/completions", "/v1/chat/completions", "/v1/responses"

Body = dict[str, Any]

# The fields of every probe: whose cached blocks it may use, and when it runs.
_SENT = ("cache_salt", "priority", "user")

# The fields that decide how a prompt is read; other fields of the body could only make a probe fail or take longer.
_READ = {
    COMPLETIONS: ("prompt", "add_special_tokens", "truncate_prompt_tokens", "truncation_side"),
    CHAT: (
        "messages",
        "tools",
        "tool_choice",
        "chat_template",
        "chat_template_kwargs",
        "add_generation_prompt",
        "add_special_tokens",
        "continue_final_message",
        "documents",
        "media_io_kwargs",
        "mm_processor_kwargs",
        "reasoning_effort",
        "truncate_prompt_tokens",
        "truncation_side",
    ),
}


def split(path: str, body: Body) -> list[Body]:
    """One body per prompt, since the prompts of a list are sent as separate requests, each with its own mixture."""
    prompts = body.get("prompt") if path == COMPLETIONS else None
    if not isinstance(prompts, list) or not prompts or isinstance(prompts[0], int):
        return [body]
    return [{**body, "prompt": prompt} for prompt in prompts]


def probe(path: str, body: Body, base: str, probe_text: ProbeText | None) -> tuple[str, Body]:
    """The path and body of the request that probes a prompt; it has to be sent inside `marks.probing`.

    Args:
        path, body: of the request, which has one prompt.
        base: the base model's name.
        probe_text: what of a conversation is probed.
    """
    one: Body = {"model": base, "max_tokens": 1, "temperature": 0.0}
    one |= {name: body[name] for name in _SENT if name in body}
    text = None
    if path != COMPLETIONS:
        try:
            text = asked_text(messages(path, body), probe_text)
        except UsageError:  # such as pictures, or parts that we do not know: vLLM reads or refuses these
            text = None
    if text is not None:
        return COMPLETIONS, {"prompt": text, **one}
    if path == RESPONSES:
        return CHAT, {"messages": messages(path, body), **one}
    return path, {**{name: body[name] for name in _READ[path] if name in body}, **one}


def scores_prompt(path: str, body: Body) -> bool:
    """Whether a request asks for log probabilities of the tokens of its prompt."""
    given = [body.get("prompt_logprobs")]
    if body.get("echo"):  # vLLM's default for `top_logprobs` is 0, which counts
        given.append(body.get("logprobs") if path == COMPLETIONS else body.get("top_logprobs", 0))
    return any(number is not None for number in given)


def messages(path: str, body: Mapping[str, Any]) -> list[Any]:
    """The conversation of a chat, or of a request to `/v1/responses`."""
    if path == CHAT:
        given = body.get("messages")
        return given if isinstance(given, list) else []
    said = body.get("input")
    turns = [{"role": "user", "content": said}] if isinstance(said, str) else said if isinstance(said, list) else []
    instructions = body.get("instructions")
    first = [{"role": "system", "content": instructions}] if isinstance(instructions, str) else []
    return [*first, *_translated(turns)]


def _translated(items: Iterable[Any]) -> list[Any]:
    """The items of a `/v1/responses` request as chat messages, as vLLM translates them; others, such as reasoning, are
    left out."""
    turns: list[Any] = []
    for item in items:
        if not isinstance(item, Mapping) or "role" in item:
            turns.append(_message(item))
        elif item.get("type") == "function_call":
            function = {"name": item.get("name"), "arguments": item.get("arguments")}
            call = {"id": item.get("call_id"), "type": "function", "function": function}
            before = turns[-1] if turns and isinstance(turns[-1], Mapping) else {}
            if before.get("role") == "assistant":  # templates expect all calls of a turn in one message
                calls = before.get("tool_calls")
                turns[-1] = {**before, "tool_calls": [*(calls if isinstance(calls, list) else ()), call]}
            else:
                turns.append({"role": "assistant", "tool_calls": [call]})
        elif item.get("type") == "function_call_output":
            turns.append({"role": "tool", "tool_call_id": item.get("call_id"), "content": _text(item.get("output"))})
    return turns


def _message(item: Any) -> Any:
    """A message of a `/v1/responses` request as a chat message; one without a list of parts is returned unchanged."""
    if not isinstance(item, Mapping) or not isinstance(item.get("content"), list):
        return item
    return {"role": item.get("role"), "content": _text(item["content"])}


def _text(content: Any) -> Any:
    """The texts of a list of parts, joined; anything else is returned unchanged."""
    if not isinstance(content, list):
        return content
    parts = [part.get("text") for part in content if isinstance(part, Mapping)]
    return "".join(part for part in parts if isinstance(part, str))
