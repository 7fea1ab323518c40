"""Requests that our own server and vLLM share: what they may ask of LoGo, and the messages about invalid ones."""

from __future__ import annotations

import difflib
import json
import math
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from logo.errors import StorageError, UsageError
from logo.serve.bodies import (
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
from logo.serve.errors import ApiError
from logo.serve.names import AUTO, MixtureRequest, Models, read_key_adapters
from make_adapters import calm
from tolerances import PATIENCE

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


def refusal(kind: type[Body], body: Any) -> ApiError:
    with pytest.raises(ApiError) as caught:
        checked(kind, body)
    assert caught.value.status == 400 and "\n" not in caught.value.message
    return caught.value


def asked(**body: Any) -> MixtureRequest:
    request = checked(ModelRequest, body)
    return MODELS.mixture_request(request.model, request.logo)


@pytest.mark.parametrize(
    ("body", "wanted"),
    [
        ({"model": AUTO, "logo": None, "temperature": 9, "tools": [{}]}, MixtureRequest(None)),
        ({"model": AUTO, "logo": {"k": 2, "signal": "norm"}}, MixtureRequest(None, {"k": 2, "signal": "norm"})),
        ({"model": "french", "logo": {"adapters": {"sums": 0.5}}}, MixtureRequest({"sums": 0.5})),
        ({"model": "french"}, MixtureRequest({"french": 1.0})),
        ({"model": "tiny", "logo": {}}, MixtureRequest({})),
        ({"model": "french:0.7+sums:0.3"}, MixtureRequest({"french": 0.7, "sums": 0.3})),
        ({"model": "sums:-1e1"}, MixtureRequest({"sums": -10.0})),
        ({"model": "p+q"}, MixtureRequest({"p+q": 1.0})),
        ({"model": "x:1"}, MixtureRequest({"x:1": 1.0})),
        ({"model": "x:1:0.5+sums:2"}, MixtureRequest({"x:1": 0.5, "sums": 2.0})),
    ],
)
def test_what_a_request_asks_for(body: dict[str, Any], wanted: MixtureRequest) -> None:
    assert asked(**body) == wanted


@pytest.mark.parametrize(
    ("body", "status", "param", "message"),
    [
        ({}, 400, "model", "model: Field required"),
        ({"model": 3}, 400, "model", "model: Input should be a valid string"),
        ({"model": "frensh"}, 404, "model", "The model 'frensh' does not exist (did you mean 'french'?)"),
        ({"model": "frensh:1"}, 404, "model", "The model 'frensh' does not exist (did you mean 'french'?)"),
        ({"model": "french:1+nope:1"}, 404, "model", "The model 'nope' does not exist"),
        *(
            (
                {"model": f"{term}+x:1"},
                400,
                "model",
                "model: expected each adapter once, with a weight between -1e6 and 1e6, as in 'a:0.7+b:0.3', found "
                f"'{term.rpartition('+')[2]}'",
            )
            for term in ("french", "french:", "french:x", "french:nan", "french:1e6", "sums:1+sums:1")
        ),
        (
            {"model": AUTO, "logo": {"adapters": {"sum": 1}}},
            404,
            "logo.adapters",
            "The model 'sum' does not exist (did",
        ),
        ({"model": AUTO, "logo": {"candidates": ["zz"]}}, 404, "logo.candidates", "The model 'zz' does not exist"),
        ({"model": AUTO, "logo": {"k": 0}}, 400, "logo.k", "logo.k: Input should be greater than or equal to 1"),
        ({"model": AUTO, "logo": {"kk": 1}}, 400, "logo.kk", "logo.kk: Extra inputs are not permitted"),
        ({"model": AUTO, "logo": {"k": 1, "adapters": {}}}, 400, "logo", "logo: expected either 'adapters' (this mixt"),
        (
            {"model": AUTO, "logo": {"signal": "x"}},
            400,
            "logo.signal",
            "logo.signal: expected one of norm, calibrated, ",
        ),
        (
            {"model": "tiny", "logo": {"k": 2}},
            400,
            "logo",
            "logo: model 'tiny' does not select adapters; leave out 'k'",
        ),
    ],
)
def test_what_is_refused(body: dict[str, Any], status: int, param: str, message: str) -> None:
    with pytest.raises(ApiError) as caught:
        asked(**body)
    assert (caught.value.status, caught.value.param) == (status, param)
    assert caught.value.message.startswith(message) and "\n" not in caught.value.message


@pytest.mark.parametrize(
    ("kind", "fields", "field"),
    [
        *((CompletionRequest, {"max_tokens": value}, "max_tokens") for value in (-3, 0, 2**31, 10**4000, 2.5, "x")),
        *((CompletionRequest, {"temperature": value}, "temperature") for value in (-0.1, 2.1, math.nan, 10**400)),
        *((CompletionRequest, {"top_p": value}, "top_p") for value in (0, 1.01)),
        *((CompletionRequest, {"n": value}, "n") for value in (0, 17)),
        (CompletionRequest, {"seed": 2**63}, "seed"),
        *((CompletionRequest, {"stop": value}, "stop") for value in ("", ["x"] * 5, "x" * 1001, 3)),
        (CompletionRequest, {"stop": ["x", ""]}, "stop[1]"),
        (CompletionRequest, {"stream_options": {"include_usage": "x"}}, "stream_options.include_usage"),
        *((CompletionRequest, {"prompt": value}, "prompt") for value in (None, [], 3, ["x"] * 65)),
        (CompletionRequest, {"prompt": ["x", 3]}, "prompt[1]"),
        (CompletionRequest, {"prompt": [[1], []]}, "prompt[1]"),
        (CompletionRequest, {"logo": {"adapters": {"a": 1e6}}}, "logo.adapters.a"),
        (CompletionRequest, {"add_special_tokens": False}, "add_special_tokens"),
        (ChatRequest, {"add_special_tokens": True}, "add_special_tokens"),
        (ChatRequest, {"messages": []}, "messages"),
        (ChatRequest, {"messages": [{"role": "robot", "content": "x"}]}, "messages[0].role"),
        (ChatRequest, {"messages": [{"role": "user", "content": 3}]}, "messages[0].content"),
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
    ],
    ids=lambda v: str(v)[:40],
)
def test_a_body_that_is_refused_names_the_field(kind: type[Body], fields: dict[str, Any], field: str | None) -> None:
    valid: dict[Any, dict[str, Any]] = {**dict(REQUESTS), UnloadAdapter: LOAD}
    error = refusal(kind, valid[kind] | fields)
    assert error.param == field and error.message.startswith(f"{field or 'body'}: ")


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
    assert checked(CompletionRequest, COMPLETION | {"stop": ["a", "b"]}).stop == ("a", "b")
    for prompt, want in (("a", ["a"]), ([1, 2], [[1, 2]]), (["a", "b"], ["a", "b"]), ([[1], [2]], [[1], [2]])):
        assert checked(CompletionRequest, COMPLETION | {"prompt": prompt}).prompts == want
    parts = {"role": "user", "content": [{"type": "text", "text": "a"}, {"type": "text", "text": "b"}], "name": "me"}
    messages = checked(ChatRequest, CHAT | {"messages": [parts, {"role": "assistant"}]}).messages
    assert [one.turn["content"] for one in messages] == ["ab", None] and messages[0].turn["name"] == "me"


# Any JSON at all, half surrogate pairs, line breaks and numbers beyond all bounds among it.
texts = st.text(st.characters(codec=None, categories=None), max_size=8) | st.sampled_from(["\ud800", "\n\0", "text"])
scalars = st.none() | st.booleans() | st.integers() | st.floats() | texts | st.just(10**400)
values = st.recursive(scalars, lambda v: st.lists(v, max_size=4) | st.dictionaries(texts, v, max_size=4), max_leaves=12)


@calm
@given(st.data())
def test_any_json_is_a_request_or_refused_in_one_line(data: st.DataObject) -> None:
    kind, valid = data.draw(st.sampled_from(REQUESTS))
    names = st.sampled_from([*kind.model_fields, *UNSUPPORTED]) | texts
    body = data.draw(st.dictionaries(names, values, max_size=3).map(lambda fields: valid | fields) | values)
    try:
        checked(kind, read_json(json.dumps(body).encode()))
    except ApiError as error:
        assert error.status == 400 and "\n" not in error.message
        error.content()


@pytest.mark.parametrize("raw", [b"", b"{", b"\xff", b"[" * 100_000, b'{"a": NaN}', b'"\\ud800"', b"1" + b"0" * 5000])
def test_what_is_no_json_is_refused(raw: bytes) -> None:
    with pytest.raises(ApiError, match="the body is not JSON that can be read: "):
        read_json(raw)


def test_names_that_an_adapter_may_be_given() -> None:
    MODELS.check_new("new", replace=False)
    MODELS.check_new("sums", replace=True)
    MODELS.check_there("sums")
    for name, replace, why in (
        (AUTO, True, "is the name of another model"),
        ("tiny", True, "is the name of another model"),
        ("sums", False, "has already been loaded"),
    ):
        with pytest.raises(ApiError, match=why):
            MODELS.check_new(name, replace=replace)
    with pytest.raises(ApiError, match=r"'sum' cannot be found\. \(did you mean 'sums'\?\)"):
        MODELS.check_there("sum")


@pytest.mark.parametrize(
    ("name", "known", "hint"),
    [
        ("adapter-17x", [f"adapter-{i}" for i in range(20_000)], "adapter-17"),
        ("x" * 4_000_000, ["french", "x" * 100], None),
        ("x:1+" * 200_000, ["french", "x" * 100], None),
    ],
    ids=["many names", "a long name", "a long mixture"],
)
def test_what_resembles_an_unknown_name_is_found_with_bounded_work(
    name: str, known: list[str], hint: str | None, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Servers look for it between the requests of others."""
    compared: list[str] = []
    ordinary = difflib.get_close_matches

    def counted(word: str, possibilities: list[str], **options: Any) -> list[str]:
        compared.extend(possibilities)
        return ordinary(word, possibilities, **options)

    monkeypatch.setattr(difflib, "get_close_matches", counted)
    with pytest.raises(ApiError) as caught:
        Models("base", known, ["norm"]).mixture_request(name, None)
    assert caught.value.status == 404 and len(caught.value.message) < 300
    assert ("did you mean" in caught.value.message) == (hint is not None)
    assert hint is None or hint in caught.value.message
    assert len(compared) <= 100 and all(len(one) <= 200 for one in compared)


@pytest.mark.parametrize(
    "content", ["", "[]", "{}", '{"a": ["x"], "secret": "x"}', '{"secret": []}', '{"secret": [1]}']
)
def test_a_file_of_keys_that_cannot_be_used(content: str, tmp_path: Path) -> None:
    file = tmp_path / "keys.json"
    file.write_text(content)
    with pytest.raises(UsageError, match="expected JSON such as") as caught:
        read_key_adapters(file)
    assert "secret" not in str(caught.value) and "\n" not in str(caught.value)
    with pytest.raises(StorageError, match="cannot be read"):
        read_key_adapters(tmp_path / "none.json")


def test_no_web_framework_is_needed() -> None:
    """vLLM's workers have none of ours, and our server has none of vLLM's."""
    code = (
        "import logo.serve.names, sys; assert not {'fastapi', 'starlette', 'uvicorn', 'prometheus_client', 'vllm', "
        "'logo.serve.service', 'logo.serve.guards'} & set(sys.modules)"
    )
    subprocess.run([sys.executable, "-c", code], check=True, timeout=PATIENCE)
