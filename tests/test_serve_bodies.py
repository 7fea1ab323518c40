"""Requests that our own server and vLLM share: what they may ask of LoGo, and the messages about invalid ones."""

from __future__ import annotations

import json
import math
import re
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st
from pydantic import ValidationError

from logo.api.bodies import (
    UNSUPPORTED,
    Body,
    ChatRequest,
    CompletionRequest,
    LoadAdapter,
    LogoOptions,
    ModelRequest,
    SelectRequest,
    UnloadAdapter,
    checked,
    read_json,
)
from logo.api.errors import ApiError
from logo.api.guards import response
from logo.api.names import AUTO, MixtureRequest, Models, read_key_adapters
from logo.errors import StorageError, UsageError

MODELS = Models("tiny", ("french", "sums", "x:1", "p+q"), ("norm", "calibrated"))
COMPLETION = {"model": "logo", "prompt": "hi"}
CHAT = {"model": "logo", "messages": [{"role": "user", "content": "hi"}]}
LOAD = {"lora_name": "a/b", "lora_path": "there"}
REQUESTS: list[tuple[type[Body], dict[str, Any]]] = [
    (CompletionRequest, COMPLETION),
    (ChatRequest, CHAT),
    (SelectRequest, {"prompt": "x"}),
    (LoadAdapter, LOAD),
]


def asked(model: Any = AUTO, **body: Any) -> MixtureRequest:
    request = checked(ModelRequest, {"model": model, **body})
    return MODELS.mixture_request(request.model, request.logo)


def test_what_a_request_asks_for() -> None:
    for body, wanted in (
        ({"logo": None, "temperature": 9, "tools": [{}]}, MixtureRequest(None)),
        ({"logo": {"k": 2, "signal": "norm"}}, MixtureRequest(None, {"k": 2, "signal": "norm"})),
        ({"model": "tiny", "logo": {}}, MixtureRequest({})),
        ({"model": "sums:-1e1"}, MixtureRequest({"sums": -10.0})),
        ({"model": "p+q"}, MixtureRequest({"p+q": 1.0})),
        ({"model": "x:1"}, MixtureRequest({"x:1": 1.0})),
        ({"model": "x:1:0.5+sums:2"}, MixtureRequest({"x:1": 0.5, "sums": 2.0})),
    ):
        assert asked(**body) == wanted


def test_a_body_that_is_refused_names_the_field() -> None:
    for kind, fields, field in (
        *((CompletionRequest, {"max_tokens": value}, "max_tokens") for value in (-3, 0, 2**31, 10**4000, 2.5, "x")),
        *(
            (kind, {name: value}, name)
            for kind in (CompletionRequest, SelectRequest)
            for name in ("max_tokens", "max_completion_tokens")
            for value in (0, "abc")
        ),
        *((CompletionRequest, {"temperature": value}, "temperature") for value in (-0.1, 2.1, math.nan, 10**400)),
        *((CompletionRequest, {"top_p": value}, "top_p") for value in (0, 1.01)),
        *((CompletionRequest, {"n": value}, "n") for value in (0, 17)),
        (CompletionRequest, {"seed": 2**63}, "seed"),
        *((CompletionRequest, {"stop": value}, "stop") for value in ("", ["x"] * 5, "x" * 1001, 3)),
        (CompletionRequest, {"stop": ["x", ""]}, "stop[1]"),
        (CompletionRequest, {"stream_options": {"include_usage": "x"}}, "stream_options.include_usage"),
        *((CompletionRequest, {"prompt": value}, "prompt") for value in (None, [], 3, ["x"] * 65)),
        (CompletionRequest, {"prompt": ["12", 3]}, "prompt[1]"),
        (CompletionRequest, {"logo": {"adapters": {"a": 1e6}}}, "logo.adapters.a"),
        (CompletionRequest, {"add_special_tokens": False}, "add_special_tokens"),
        (ChatRequest, {"add_special_tokens": True}, "add_special_tokens"),
        (ChatRequest, {"messages": []}, "messages"),
        (ChatRequest, {"messages": [{"role": "robot", "content": "x"}]}, "messages[0].role"),
        (
            ChatRequest,
            {"messages": [{"role": "user", "content": [{"type": "text", "text": "x"}, {"type": "image_url"}]}]},
            "messages[0].content[1].type",
        ),
        (SelectRequest, {"messages": CHAT["messages"]}, None),  # and a prompt
        (UnloadAdapter, {"lora_name": None}, "lora_name"),
        (LoadAdapter, {"lora_path": "a\0b"}, "lora_path"),
        *(
            (LoadAdapter, {"lora_name": name}, "lora_name")
            for name in ("../x", "a/../b", "/a", "a/", "a//b", ".", "a\\b", "a\nb", "a\0", "\u202ea", "", "x" * 201)
        ),
        *((CompletionRequest, {name: "something"}, name) for name in UNSUPPORTED),
        *((CompletionRequest, {name: 1}, name) for name in LogoOptions.model_fields),  # they belong inside 'logo'
    ):
        valid: dict[Any, dict[str, Any]] = {**dict(REQUESTS), UnloadAdapter: LOAD}
        with pytest.raises(ApiError, match=f"^{re.escape(field or 'body')}: .*$") as caught:
            checked(kind, valid[kind] | fields)
        assert (caught.value.status, caught.value.param) == (400, field)


MANY = 5_000
FAULTY_LISTS: list[tuple[type[Body], dict[str, Any]]] = [
    (CompletionRequest, {"prompt": [None] * MANY}),
    (CompletionRequest, {"prompt": [[None] * MANY] * 3}),
    (CompletionRequest, {"stop": [None] * MANY}),
    (ChatRequest, {"messages": [None] * MANY}),
    (ChatRequest, {"messages": [{"role": 1, "content": 2}] * MANY}),
    (ChatRequest, {"messages": [{"role": "user", "content": [None] * MANY}]}),
    (SelectRequest, {"prompt": None, "messages": [{}] * MANY}),
    (SelectRequest, {"logo": {"candidates": [None] * MANY}}),
    (SelectRequest, {"logo": {"adapters": {f"a{number}": None for number in range(MANY)}}}),
    (SelectRequest, {"logo": {f"a{number}": 1 for number in range(MANY)}}),
]


@pytest.mark.parametrize(("kind", "fields"), FAULTY_LISTS, ids=range(len(FAULTY_LISTS)))
def test_a_body_of_many_faults_is_read_up_to_the_first_ones(kind: type[Body], fields: dict[str, Any]) -> None:
    """To describe all of a body of 1 MB would keep the event loop for seconds."""
    body = dict(REQUESTS)[kind] | fields
    with pytest.raises(ValidationError) as caught:
        kind.model_validate(body)
    assert caught.value.error_count() < 20
    with pytest.raises(ApiError, match=r"^[\w.\[\]]+: ") as refused:
        checked(kind, body)
    assert refused.value.status == 400


def test_values_that_change_nothing_are_taken() -> None:
    """Null means left out; 16.0 is a whole number."""
    harmless: dict[str, Any] = {"frequency_penalty": 0.0, "logit_bias": {}, "best_of": 1, "suffix": None, "echo": False}
    harmless |= {"tools": [], "response_format": {"type": "text"}, "tool_choice": "none", "top_k": -1, "user": "me"}
    harmless |= {"logprobs": None, "max_tokens": 16.0, "temperature": 1}
    assert checked(CompletionRequest, COMPLETION | harmless).max_tokens == 16
    assert checked(ChatRequest, CHAT | harmless).temperature == 1.0
    for kind, valid in REQUESTS[:2]:
        null = dict.fromkeys(set(kind.model_fields) - set(valid))
        assert checked(kind, valid | null).model_dump() == checked(kind, valid).model_dump()


def test_readings_of_a_request() -> None:
    assert checked(CompletionRequest, COMPLETION | {"stop": "a"}).stop == ("a",)
    parts = {"role": "user", "content": [{"type": "text", "text": "a"}, {"type": "text", "text": "b"}], "name": "me"}
    messages = checked(ChatRequest, CHAT | {"messages": [parts, {"role": "assistant"}]}).messages
    assert [one.turn["content"] for one in messages] == ["a\nb", None] and messages[0].turn["name"] == "me"
    many = checked(ChatRequest, CHAT | {"logo": {"candidates": ["b", "a"] * 50_000}})
    assert many.logo is not None and many.logo.candidates == ["b", "a"]  # of which each is looked for once


# Any JSON at all, half surrogate pairs, line breaks and numbers beyond all bounds among it.
texts = st.text(st.characters(codec=None, categories=None), max_size=8) | st.sampled_from(["\ud800", "\n\0", "text"])
scalars = st.none() | st.booleans() | st.integers() | st.floats() | texts | st.just(10**400)
values = st.recursive(scalars, lambda v: st.lists(v, max_size=4) | st.dictionaries(texts, v, max_size=4), max_leaves=12)


@given(st.data())
def test_any_json_is_a_request_or_refused_in_one_line(data: st.DataObject) -> None:
    kind, valid = data.draw(st.sampled_from(REQUESTS))
    names = st.sampled_from([*kind.model_fields, *UNSUPPORTED]) | texts
    body = data.draw(st.dictionaries(names, values, max_size=3).map(lambda fields: valid | fields) | values)
    try:
        checked(kind, read_json(json.dumps(body).encode()))
    except ApiError as error:
        assert error.status == 400 and "\n" not in error.message
        response(error)


def test_a_file_of_keys_that_cannot_be_used(tmp_path: Path) -> None:
    file = tmp_path / "keys.json"
    for content in ("", "[]", "{}", '{"a": ["x"], "secret": "x"}', '{"secret": []}', '{"secret": [1]}'):
        file.write_text(content)
        with pytest.raises(UsageError, match="expected JSON such as") as caught:
            read_key_adapters(file)
        assert "secret" not in str(caught.value) and "\n" not in str(caught.value)
    with pytest.raises(StorageError, match="cannot be read"):
        read_key_adapters(tmp_path / "none.json")
