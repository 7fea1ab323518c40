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


def refusal(model: type[BaseModel], body: Any) -> tuple[str, str | None]:
    with pytest.raises(ValidationError) as caught:
        model.model_validate(body)
    return validation_message(caught.value.errors())


def completion(**fields: Any) -> CompletionRequest:
    return CompletionRequest.model_validate(COMPLETION | fields)


def chat(**fields: Any) -> ChatRequest:
    return ChatRequest.model_validate(CHAT | fields)


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ({"max_tokens": -3}, "max_tokens: expected 1 or more, found -3"),
        ({"max_tokens": 0}, "max_tokens: expected 1 or more, found 0"),
        ({"max_tokens": 2**31}, "max_tokens: expected 2147483647 or less, found 2147483648"),
        ({"max_tokens": 10**4000}, "max_tokens: expected 2147483647 or less, found a number of many digits"),
        ({"max_tokens": 1e300}, "max_tokens: expected a whole number, found 1e+300"),
        ({"max_tokens": 2.5}, "max_tokens: expected a whole number, found 2.5"),
        ({"max_tokens": True}, "max_tokens: expected a whole number, found true"),
        ({"max_tokens": "1"}, "max_tokens: expected a whole number, found '1'"),
        ({"temperature": -0.1}, "temperature: expected 0 or more, found -0.1"),
        ({"temperature": 2.1}, "temperature: expected 2 or less, found 2.1"),
        ({"temperature": math.nan}, "temperature: expected a finite number, found NaN"),
        ({"temperature": -math.inf}, "temperature: expected a finite number, found -Infinity"),
        ({"temperature": True}, "temperature: expected a number, found true"),
        ({"temperature": "0"}, "temperature: expected a number, found '0'"),
        ({"temperature": 10**400}, "temperature: expected a number, found a number of many digits"),
        ({"top_p": 0}, "top_p: expected more than 0, found 0"),
        ({"top_p": 1.01}, "top_p: expected 1 or less, found 1.01"),
        ({"n": 0}, "n: expected 1 or more, found 0"),
        ({"n": 17}, "n: expected 16 or less, found 17"),
        ({"seed": 2**63}, "seed: expected 9223372036854775807 or less, found 9223372036854775808"),
        ({"logprobs": 21}, "logprobs: expected 20 or less, found 21"),
        ({"logprobs": True}, "logprobs: expected a whole number, found true"),
        ({"stop": ""}, "stop: expected 1 character or more, found 0"),
        ({"stop": ["x", ""]}, "stop[1]: expected 1 character or more, found 0"),
        ({"stop": ["x"] * 5}, "stop: expected 4 items or fewer, found 5"),
        ({"stop": "x" * 1001}, "stop: expected 1000 characters or fewer, found 1001"),
        ({"stop": 3}, "stop: expected a string or a list of strings, found 3"),
        ({"stream": 1}, "stream: expected true or false, found 1"),
        ({"stream_options": {"include_usage": 0}}, "stream_options.include_usage: expected true or false, found 0"),
        ({"model": 3}, "model: expected a string, found 3"),
        ({"model": None}, "model: expected a value, found none"),
        ({"prompt": None}, "prompt: expected a value, found none"),
        ({"prompt": {}}, "prompt: expected a string, a list of strings, or token ids, found an object"),
        ({"prompt": []}, "prompt: expected 1 item or more, found 0"),
        ({"prompt": ["x"] * 65}, "prompt: expected 64 items or fewer, found 65"),
        ({"prompt": ["x", 1]}, "prompt[1]: expected a string, found 1"),
        ({"prompt": [1, "x"]}, "prompt[1]: expected a whole number, found 'x'"),
        ({"prompt": [1, -1]}, "prompt[1]: expected 0 or more, found -1"),
        ({"prompt": [True]}, "prompt[0]: expected a whole number, found true"),
        ({"prompt": [[1], []]}, "prompt[1]: expected 1 item or more, found 0"),
        ({"prompt": [[1], [None]]}, "prompt[1][0]: expected a whole number, found null"),
        ({"prompt": [None]}, "prompt[0]: expected a string, found null"),
        ({"prompt": "ab\ud800"}, "prompt: expected Unicode text, found half a surrogate pair at character 2"),
        ({"logo": 3}, "logo: expected an object, found 3"),
        ({"logo": {"k": 0}}, "logo.k: expected 1 or more, found 0"),
        ({"logo": {"adaptors": {}}}, "logo.adaptors: there is no such field here"),
        ({"logo": {"adapters": []}}, "logo.adapters: expected an object, found a list"),
        ({"logo": {"adapters": {"a": True}}}, "logo.adapters.a: expected a number, found true"),
        ({"logo": {"adapters": {"a": math.nan}}}, "logo.adapters.a: expected a finite number, found NaN"),
        ({"logo": {"adapters": {"a": 1e6}}}, "logo.adapters.a: expected less than 1000000, found 1000000.0"),
        (
            {"logo": {"adapters": {}, "k": 1}},
            "logo: expected either 'adapters' (this mixture) or 'k' (select), found both",
        ),
        ({"whatever": [{"x": math.inf}]}, "whatever: expected JSON, found NaN or Infinity, which JSON does not have"),
    ],
)  # fmt: skip
def test_a_completion_that_is_refused_is_told_why_in_one_line(fields: dict[str, Any], message: str) -> None:
    assert refusal(CompletionRequest, COMPLETION | fields) == (message, message.partition(": ")[0])


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ({"messages": []}, "messages: expected 1 item or more, found 0"),
        ({"messages": "hi"}, "messages: expected a list, found 'hi'"),
        ({"messages": ["hi"]}, "messages[0]: expected an object, found 'hi'"),
        (
            {"messages": [{"role": "robot", "content": "x"}]},
            "messages[0].role: expected 'system', 'developer', 'user', 'assistant' or 'tool', found 'robot'",
        ),
        ({"messages": [{"content": "x"}]}, "messages[0].role: expected a value, found none"),
        (
            {"messages": [{"role": "user", "content": None}]},
            "messages[0].content: expected a value in a message of role 'user', found none",
        ),
        (
            {"messages": [{"role": "user", "content": 3}]},
            "messages[0].content: expected a string or a list of text parts, found 3",
        ),
        (
            {"messages": [{"role": "user", "content": [{"type": "text", "text": "x"}, {"type": "image_url"}]}]},
            "messages[0].content[1].type: expected 'text', found 'image_url'",
        ),
        (
            {"messages": [{"role": "user", "content": [{"type": "text"}]}]},
            "messages[0].content[0].text: expected a value, found none",
        ),
        ({"messages": [{"role": "user", "content": []}]}, "messages[0].content: expected 1 item or more, found 0"),
        ({"logprobs": 1}, "logprobs: expected true or false, found 1"),
        ({"logprobs": True, "top_logprobs": 21}, "top_logprobs: expected 20 or less, found 21"),
        ({"top_logprobs": 2}, "top_logprobs: expected 'logprobs': true beside it, found false"),
        (
            {"max_tokens": 1, "max_completion_tokens": 2},
            "max_tokens: expected this or 'max_completion_tokens', found both and different",
        ),
        ({"max_completion_tokens": 0}, "max_completion_tokens: expected 1 or more, found 0"),
    ],
)
def test_a_chat_that_is_refused_is_told_why_in_one_line(fields: dict[str, Any], message: str) -> None:
    assert refusal(ChatRequest, CHAT | fields) == (message, message.partition(": ")[0])


@pytest.mark.parametrize(
    ("field", "value"),
    [
        ("frequency_penalty", 0.5),
        ("presence_penalty", -1),
        ("logit_bias", {"50256": -100}),
        ("best_of", 2),
        ("suffix", "end"),
        ("echo", True),
        ("response_format", {"type": "json_object"}),
        ("tools", [{"type": "function"}]),
        ("functions", [{"name": "f"}]),
        ("top_k", 40),
        ("ignore_eos", True),
        ("guided_json", {}),
        ("skip_special_tokens", False),
        ("include_stop_str_in_output", True),
        ("return_tokens_as_token_ids", True),
        ("reasoning_effort", "high"),
        ("verbosity", "low"),
        ("frequency_penalty", "x"),
        ("echo", 0),
        ("presence_penalty", False),
        ("best_of", True),
    ],
)
def test_what_would_change_the_answer_is_never_ignored(field: str, value: Any) -> None:
    expected = (f"{field}: not supported by this server; leave it out", field)
    assert refusal(CompletionRequest, COMPLETION | {field: value}) == expected
    assert refusal(ChatRequest, CHAT | {field: value}) == expected


def test_special_tokens_are_added_to_texts_and_not_to_what_a_template_writes() -> None:
    assert completion(add_special_tokens=True) and chat(add_special_tokens=False)
    expected = ("add_special_tokens: not supported by this server; leave it out", "add_special_tokens")
    assert refusal(CompletionRequest, COMPLETION | {"add_special_tokens": False}) == expected
    assert refusal(ChatRequest, CHAT | {"add_special_tokens": True}) == expected


def test_fields_that_ask_for_nothing_are_taken_though_unsupported() -> None:
    harmless = {
        "frequency_penalty": 0.0,
        "presence_penalty": 0,
        "logit_bias": {},
        "best_of": 1,
        "suffix": None,
        "echo": False,
        "response_format": {"type": "text"},
        "tools": [],
        "tool_choice": "none",
        "top_k": -1,
        "repetition_penalty": 1.0,
        "skip_special_tokens": True,
        "include_stop_str_in_output": False,
        "return_tokens_as_token_ids": False,
        "verbosity": "medium",
    }
    assert not harmless.keys() - UNSUPPORTED.keys()
    assert completion(**harmless).model_extra == harmless


@pytest.mark.parametrize("field", LogoOptions.model_fields)
def test_options_beside_the_field_logo_are_told_where_they_belong(field: str) -> None:
    """Rather than ignored, as the fields of other servers are."""
    expected = (f'{field}: expected inside the field \'logo\': write "logo": {{"{field}": ...}}', field)
    for model, valid in REQUESTS[:3]:
        assert refusal(model, valid | {field: 1}) == expected


def test_unknown_fields_are_kept() -> None:
    assert completion(metadata={"a": [1, None]}, store=True).model_extra == {
        "metadata": {"a": [1, None]},
        "store": True,
    }
    [message] = chat(messages=[{"role": "assistant", "content": None, "tool_calls": [{"id": "1"}]}]).messages
    assert message.model_extra == {"tool_calls": [{"id": "1"}]}
    [named] = chat(messages=[{"role": "user", "content": "x", "name": "Ann", "more": 1}]).messages
    assert named.further == {"more": 1, "name": "Ann"} and message.further == message.model_extra  # for the template


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


@pytest.mark.parametrize(
    ("prompt", "prompts"),
    [("", [""]), ("a", ["a"]), (["a", ""], ["a", ""]), ([1, 2], [[1, 2]]), ([[1], [2, 0]], [[1], [2, 0]])],
)  # fmt: skip
def test_prompts_come_as_texts_or_ids_and_always_as_a_list(prompt: Any, prompts: Any) -> None:
    assert completion(prompt=prompt).prompts == prompts


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
    assert chat(logprobs=True, top_logprobs=0).top_logprobs == 0


def test_a_selection_is_asked_for_one_prompt_or_one_conversation() -> None:
    assert SelectRequest.model_validate({"prompt": [1, 2]}).prompt == [1, 2]
    assert SelectRequest.model_validate({"messages": CHAT["messages"], "prompt": None}).messages is not None
    either = "expected either 'prompt' or 'messages', found"
    assert refusal(SelectRequest, {}) == (f"{either} none", None)
    assert refusal(SelectRequest, {"prompt": "x", "messages": CHAT["messages"]}) == (f"{either} both", None)
    assert refusal(SelectRequest, {"prompt": ["x"]})[0] == "prompt: expected a string or token ids, found a list"


@pytest.mark.parametrize("name", ["a", "tasks/t0", "x.y-z_1", "ä b", "..a"])
def test_names_of_adapters_are_free(name: str) -> None:
    assert LoadAdapter.model_validate(LOAD | {"lora_name": name}).lora_name == name


@pytest.mark.parametrize(
    "name", ["../x", "a/../b", "/a", "a/", "a//b", ".", "a\\b", "a\nb", "a\0", "\u202ea", "", "x" * 201]
)
def test_names_that_are_tricks_are_refused(name: str) -> None:
    assert refusal(LoadAdapter, LOAD | {"lora_name": name})[1] == "lora_name"


def test_changes_of_the_pool_need_their_fields() -> None:
    assert refusal(UnloadAdapter, {}) == ("lora_name: expected a value, found none", "lora_name")
    assert refusal(LoadAdapter, LOAD | {"lora_path": "a\0b"})[1] == "lora_path"
    assert refusal(LoadAdapter, LOAD | {"lora_path": None})[1] == "lora_path"


def test_long_values_are_not_echoed() -> None:
    long = "y" * 100_000
    for body in (
        COMPLETION | {"n": long},
        COMPLETION | {"logo": {long: 1}},
        COMPLETION | {"logo": {"adapters": {long: "x"}}},
        COMPLETION | {"stream": [long]},
        CHAT | {"messages": [{"role": long, "content": "x"}], "prompt": "x"},
    ):
        model = ChatRequest if "messages" in body else CompletionRequest
        message, param = refusal(model, body)
        assert len(message) < 300 and "\n" not in message and len(param or "") < 120


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


REQUESTS = [(CompletionRequest, COMPLETION), (ChatRequest, CHAT), (SelectRequest, {"prompt": "x"}), (LoadAdapter, LOAD)]


@pytest.mark.parametrize(("model", "valid"), REQUESTS, ids=lambda v: getattr(v, "__name__", ""))
def test_any_json_is_a_request_or_a_problem_in_one_line(model: type[BaseModel], valid: dict[str, Any]) -> None:
    @given(body=bodies(model, valid))
    @settings(max_examples=200, deadline=None)
    def check(body: Any) -> None:
        try:
            request = model.model_validate(body)
        except ValidationError as error:
            message, param = validation_message(error.errors())
            message.encode("utf-8")
            (param or "").encode("utf-8")
            assert "\n" not in message and 0 < len(message) < 600
        else:
            assert request.model_extra is not None

    check()


@given(
    max_tokens=st.integers(1, 2**31 - 1),
    temperature=st.floats(0, 2) | st.integers(0, 2),
    top_p=st.floats(0, 1, exclude_min=True),
    n=st.integers(1, 16),
    seed=st.integers(-(2**63), 2**63 - 1),
    stop=st.lists(st.text(min_size=1, max_size=5), max_size=4),
    logprobs=st.integers(0, 20),
)
@settings(deadline=None)
def test_everything_within_the_bounds_is_taken_as_it_is(**fields: Any) -> None:
    request = completion(**json.loads(json.dumps(fields)))
    assert {name: getattr(request, name) for name in fields} == fields


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
