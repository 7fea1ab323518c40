"""Bodies of requests: what is accepted, what is refused with which message, and that no input breaks the parser."""

from __future__ import annotations

import json
import math
from collections.abc import Iterator
from typing import Any

import httpx
import pytest
from fastapi import FastAPI
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from pydantic import BaseModel, ValidationError

from http_server import serving
from logo.api.requests import LoadAdapter, LogoOptions, SelectRequest, UnloadAdapter
from logo.api.validation import validation_message
from logo.serving.bodies import UNSUPPORTED, ChatRequest, CompletionRequest
from logo.serving.error_handlers import install

COMPLETION = {"model": "logo", "prompt": "hi"}
CHAT = {"model": "logo", "messages": [{"role": "user", "content": "hi"}]}
LOAD = {"lora_name": "a/b", "lora_path": "there"}
REQUESTS = [(CompletionRequest, COMPLETION), (ChatRequest, CHAT), (SelectRequest, {"prompt": "x"}), (LoadAdapter, LOAD)]


def refusal(model: type[BaseModel], body: Any) -> tuple[str, str | None]:
    with pytest.raises(ValidationError) as caught:
        model.model_validate(body)
    return validation_message(caught.value.errors())


def completion(**fields: Any) -> CompletionRequest:
    return CompletionRequest.model_validate(COMPLETION | fields)


def chat(**fields: Any) -> ChatRequest:
    return ChatRequest.model_validate(CHAT | fields)


@pytest.mark.parametrize(
    ("fields", "field"),
    [
        *(({"max_tokens": value}, "max_tokens") for value in (-3, 0, 2**31, 10**4000, 1e300, 2.5, True, "1")),
        *(({"temperature": value}, "temperature") for value in (-0.1, 2.1, math.nan, -math.inf, True, "0", 10**400)),
        *(({"top_p": value}, "top_p") for value in (0, 1.01)),
        *(({"n": value}, "n") for value in (0, 17)),
        ({"seed": 2**63}, "seed"),
        *(({"stop": value}, "stop") for value in ("", ["x"] * 5, "x" * 1001, 3)),
        ({"stop": ["x", ""]}, "stop[1]"),
        ({"stream": 1}, "stream"),
        ({"stream_options": {"include_usage": 0}}, "stream_options.include_usage"),
        *(({"model": value}, "model") for value in (3, None)),
        *(({"prompt": value}, "prompt") for value in (None, [], 3, "ab\ud800", ["x"] * 65)),
        *(({"prompt": value}, "prompt[0]") for value in ([None], [-1], [2**31], [[]])),
        ({"prompt": [[1], [True]]}, "prompt[1][0]"),
        ({"logo": 3}, "logo"),
        ({"logo": {"k": 0}}, "logo.k"),
        ({"logo": {"adaptors": {}}}, "logo.adaptors"),
        ({"logo": {"adapters": []}}, "logo.adapters"),
        *(({"logo": {"adapters": {"a": value}}}, "logo.adapters.a") for value in (True, math.nan, 1e6)),
        ({"logo": {"adapters": {}, "k": 1}}, "logo"),
        ({"whatever": [{"x": math.inf}]}, "whatever"),
    ],
    ids=lambda v: str(v)[:40],
)
def test_a_completion_that_is_refused_names_the_field(fields: dict[str, Any], field: str) -> None:
    message, found = refusal(CompletionRequest, COMPLETION | fields)
    assert found == field and message.startswith(f"{field}: ") and "\n" not in message


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ({"messages": []}, "messages: List should have at least 1 item"),
        ({"messages": ["hi"]}, "messages[0]: Input should be a valid dictionary"),
        ({"messages": [{"role": "robot", "content": "x"}]}, "messages[0].role: Input should be 'system', 'developer'"),
        ({"messages": [{"content": "x"}]}, "messages[0].role: Field required"),
        (
            {"messages": [{"role": "user", "content": None}]},
            "messages[0].content: expected a value in a message of role 'user', found none",
        ),
        (
            {"messages": [{"role": "user", "content": 3}]},
            "messages[0].content: Input should be a string or a list of text parts",
        ),
        (
            {"messages": [{"role": "user", "content": [{"type": "text", "text": "x"}, {"type": "image_url"}]}]},
            "messages[0].content[1].type: Input should be 'text'",
        ),
        ({"messages": [{"role": "user", "content": []}]}, "messages[0].content: List should have at least 1 item"),
        (
            {"max_tokens": 1, "max_completion_tokens": 2},
            "max_tokens: expected this or 'max_completion_tokens', found both and different",
        ),
        ({"max_completion_tokens": 0}, "max_completion_tokens: Input should be greater than or equal to 1"),
    ],
)
def test_a_chat_that_is_refused_is_told_why_in_one_line(fields: dict[str, Any], message: str) -> None:
    found, field = refusal(ChatRequest, CHAT | fields)
    assert found.startswith(message) and field == message.partition(": ")[0]


@pytest.mark.parametrize("field", UNSUPPORTED)
def test_what_would_change_the_answer_is_never_ignored(field: str) -> None:
    """The field is refused, and by the name of the server that has it if it is about log probabilities."""
    for model, valid in REQUESTS[:2]:
        message, found = refusal(model, valid | {field: "something"})
        assert found == field and message.startswith(f"{field}: not supported by this server; ")
        assert ("--engine vllm" in message) == ("logprobs" in field)


def test_values_that_change_nothing_are_taken() -> None:
    harmless = {"frequency_penalty": 0.0, "logit_bias": {}, "best_of": 1, "suffix": None, "echo": False, "tools": []}
    harmless |= {"response_format": {"type": "text"}, "tool_choice": "none", "top_k": -1, "repetition_penalty": 1.0}
    harmless |= {"logprobs": None, "top_logprobs": None, "skip_special_tokens": True, "verbosity": "medium"}
    assert not harmless.keys() - UNSUPPORTED.keys()
    for request in (completion(**harmless, add_special_tokens=True), chat(**harmless, add_special_tokens=False)):
        assert harmless.items() <= (request.model_extra or {}).items()
    assert chat(logprobs=False)
    for field, value in (("frequency_penalty", "x"), ("echo", 0), ("presence_penalty", False), ("best_of", True)):
        assert refusal(CompletionRequest, COMPLETION | {field: value})[1] == field
    assert refusal(CompletionRequest, COMPLETION | {"add_special_tokens": False})[1] == "add_special_tokens"
    assert refusal(ChatRequest, CHAT | {"add_special_tokens": True})[1] == "add_special_tokens"


@pytest.mark.parametrize("field", LogoOptions.model_fields)
def test_options_beside_the_field_logo_are_told_where_they_belong(field: str) -> None:
    """Rather than ignored, as the fields of other servers are."""
    expected = (f'{field}: expected inside the field \'logo\': write "logo": {{"{field}": ...}}', field)
    for model, valid in REQUESTS[:3]:
        assert refusal(model, valid | {field: 1}) == expected


def test_null_means_left_out() -> None:
    fields = set(CompletionRequest.model_fields) - {"model", "prompt"}
    request = completion(**dict.fromkeys(fields))
    assert request == completion()
    assert (request.max_tokens, request.temperature, request.top_p, request.n, request.stream) == (
        None,
        1.0,
        1.0,
        1,
        False,
    )
    assert chat(**dict.fromkeys(set(ChatRequest.model_fields) - {"model", "messages"})) == chat()


def test_whole_numbers_are_numbers_and_16_0_is_a_whole_one() -> None:
    request = completion(temperature=1, top_p=1, max_tokens=16.0, seed=-(2**63), logo={"adapters": {"a": 1}})
    assert isinstance(request.temperature, float) and isinstance(request.max_tokens, int)
    assert request.seed == -(2**63) and request.logo is not None and request.logo.adapters == {"a": 1.0}


def test_readings_of_a_request() -> None:
    assert completion(stop="a").stops == ("a",) and completion(stop=["a", "b"]).stops == ("a", "b")
    assert completion().stops == () and completion(stop=[]).stops == ()
    assert not completion(stream_options={}).include_usage
    assert completion(stream=True, stream_options={"include_usage": True}).include_usage
    parts = [{"type": "text", "text": "a"}, {"type": "text", "text": "b"}]
    texts = [m.text for m in chat(messages=[{"role": "user", "content": parts}, {"role": "assistant"}]).messages]
    assert texts == ["ab", ""]
    assert chat().max_new_tokens is None
    assert chat(max_tokens=3).max_new_tokens == chat(max_completion_tokens=3).max_new_tokens == 3
    assert chat(max_tokens=3, max_completion_tokens=3).max_new_tokens == 3


def test_a_selection_is_asked_for_one_prompt_or_one_conversation() -> None:
    assert SelectRequest.model_validate({"prompt": [1, 2]}).prompt == [1, 2]
    assert SelectRequest.model_validate({"messages": CHAT["messages"], "prompt": None}).messages is not None
    either = "expected either 'prompt' or 'messages', found"
    assert refusal(SelectRequest, {}) == (f"body: {either} none", None)
    assert refusal(SelectRequest, {"prompt": "x", "messages": CHAT["messages"]}) == (f"body: {either} both", None)
    assert refusal(SelectRequest, {"prompt": ["x"]})[0] == "prompt: Input should be a string or token ids"


@pytest.mark.parametrize("name", ["a", "tasks/t0", "x.y-z_1", "ä b", "..a"])
def test_names_of_adapters_are_free(name: str) -> None:
    assert LoadAdapter.model_validate(LOAD | {"lora_name": name}).lora_name == name


@pytest.mark.parametrize(
    "name", ["../x", "a/../b", "/a", "a/", "a//b", ".", "a\\b", "a\nb", "a\0", "\u202ea", "", "x" * 201]
)
def test_names_that_are_tricks_are_refused(name: str) -> None:
    assert refusal(LoadAdapter, LOAD | {"lora_name": name})[1] == "lora_name"


def test_changes_of_the_pool_need_their_fields() -> None:
    assert refusal(UnloadAdapter, {}) == ("lora_name: Field required", "lora_name")
    assert refusal(LoadAdapter, LOAD | {"lora_path": "a\0b"})[1] == "lora_path"
    assert refusal(LoadAdapter, LOAD | {"lora_path": None})[1] == "lora_path"


# Any JSON at all, half surrogate pairs, line breaks and numbers beyond all bounds among it.
texts = st.text(st.characters(codec=None, categories=None), max_size=8) | st.sampled_from(
    ["\ud800", "\n\0", "text", "user"]
)
scalars = st.none() | st.booleans() | st.integers() | st.floats() | texts | st.just(10**400)
values = st.recursive(scalars, lambda v: st.lists(v, max_size=4) | st.dictionaries(texts, v, max_size=4), max_leaves=12)


def bodies(model: type[BaseModel], valid: dict[str, Any]) -> st.SearchStrategy[Any]:
    """Bodies that are right but for a few fields, which may be known, unsupported or neither; and any JSON."""
    names = st.sampled_from([*model.model_fields, *UNSUPPORTED]) | texts
    return st.dictionaries(names, values, max_size=3).map(lambda fields: valid | fields) | values


@pytest.fixture(scope="module")
def client() -> Iterator[httpx.Client]:
    app = FastAPI()
    install(app)

    @app.post("/completions")
    async def completions(request: CompletionRequest) -> int:
        return request.n

    @app.post("/chat")
    async def chats(request: ChatRequest) -> int:
        return request.n

    @app.post("/load")
    async def load(request: LoadAdapter) -> int:
        return 1

    @app.post("/select")
    async def select(request: SelectRequest) -> int:
        return 1

    with serving(app) as url, httpx.Client(base_url=url, headers={"Content-Type": "application/json"}) as client:
        yield client


@pytest.mark.slow
@pytest.mark.parametrize(
    ("route", "model", "valid"),
    [(f"/{name}", *r) for name, r in zip(("completions", "chat", "select", "load"), REQUESTS, strict=True)],
    ids=lambda v: v if isinstance(v, str) else "",
)
def test_any_json_over_http_is_200_or_400(
    client: httpx.Client, route: str, model: type[BaseModel], valid: dict[str, Any]
) -> None:
    @given(body=bodies(model, valid))
    @settings(max_examples=60, deadline=None, suppress_health_check=[HealthCheck.too_slow])
    def check(body: Any) -> None:
        answer = client.post(route, content=json.dumps(body))
        assert answer.status_code in (200, 400), answer.text
        if answer.status_code == 400:
            error = answer.json()["error"]
            assert error.keys() == {"message", "type", "param", "code"} and error["type"] == "invalid_request_error"

    check()


def test_the_openapi_document_tells_bounds_and_that_null_is_fine(client: httpx.Client) -> None:
    fields = client.get("/openapi.json").json()["components"]["schemas"]["CompletionRequest"]["properties"]
    assert fields["n"]["anyOf"] == [{"type": "integer", "minimum": 1, "maximum": 16}, {"type": "null"}]
    assert fields["top_p"]["anyOf"][0] == {"type": "number", "exclusiveMinimum": 0, "maximum": 1}
    assert len(fields["prompt"]["oneOf"]) == 4 and "anyOf" not in fields["model"]
