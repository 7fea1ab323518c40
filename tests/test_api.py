"""Requests that our own server and vLLM share: what they may ask of LoGo, and the messages about invalid ones."""

from __future__ import annotations

import subprocess
import sys
from typing import Any

import pytest

from logo.api.errors import ApiError
from logo.api.names import AUTO, Models
from logo.api.requests import ModelRequest, checked
from logo.errors import UsageError
from logo.protocol import MixtureRequest
from tolerances import PATIENCE

MODELS = Models("tiny", ("french", "sums"), ("norm", "calibrated"))


def asked(**body: Any) -> MixtureRequest:
    request = checked(ModelRequest, body)
    return MODELS.mixture_request(request.model, request.logo)


@pytest.mark.parametrize(
    ("body", "wanted"),
    [
        ({"model": AUTO}, MixtureRequest(None)),
        (
            {"model": AUTO, "logo": None, "temperature": 9, "tools": [{}]},
            MixtureRequest(None),
        ),  # what is the server's is its own
        ({"model": AUTO, "logo": {"k": 2, "signal": "norm"}}, MixtureRequest(None, {"k": 2, "signal": "norm"})),
        ({"model": AUTO, "logo": {"adapters": {"sums": 0.5}}}, MixtureRequest({"sums": 0.5})),
        ({"model": "french", "logo": {"adapters": {"sums": 0.5}}}, MixtureRequest({"sums": 0.5})),
        ({"model": "french"}, MixtureRequest({"french": 1.0})),
        ({"model": "tiny", "logo": {}}, MixtureRequest({})),
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
        ({"model": "logo://0/1:1.0"}, 404, "model", "The model 'logo://0/1:1.0' does not exist"),
        ({"model": AUTO, "logo": {"k": 0}}, 400, "logo.k", "logo.k: Input should be greater than or equal to 1"),
        ({"model": AUTO, "logo": {"kk": 1}}, 400, "logo.kk", "logo.kk: Extra inputs are not permitted"),
        (
            {"model": AUTO, "logo": {"k": 1, "adapters": {}}},
            400,
            "logo",
            "logo: expected either 'adapters' (this mixture) or 'k' (select), found both",
        ),
        (
            {"model": AUTO, "logo": {"signal": "x"}},
            400,
            "logo.signal",
            "logo.signal: expected one of norm, calibrated, which this server was started with, found 'x'",
        ),
        (
            {"model": "tiny", "logo": {"k": 2}},
            400,
            "logo",
            "logo: model 'tiny' does not select adapters; leave out 'k'",
        ),
        (
            {"model": AUTO, "x": float("nan")},
            400,
            "x",
            "x: expected JSON, found NaN or Infinity, which JSON does not have",
        ),
    ],
)
def test_what_is_refused(body: dict[str, Any], status: int, param: str, message: str) -> None:
    with pytest.raises(ApiError) as caught:
        asked(**body)
    assert (caught.value.status, caught.value.param, caught.value.message) == (status, param, message)


@pytest.mark.parametrize("body", [[], "x", None])
def test_what_is_no_object(body: Any) -> None:
    with pytest.raises(ApiError, match="body: Input should be a valid dictionary"):
        checked(ModelRequest, body)


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


def test_errors_of_the_library_become_answers() -> None:
    cause = UsageError("k: expected 1 or more")
    assert (ApiError.of(cause).status, str(ApiError.of(cause))) == (400, str(cause))
    own = ApiError(418, "short and stout", "server_error")
    assert ApiError.of(own) is own


def test_no_web_framework_is_needed() -> None:
    """vLLM's workers have none of ours, and our server has none of vLLM's."""
    code = (
        "import logo.api.names, logo.api.replies, logo.protocol, sys; "
        "assert not {'fastapi', 'starlette', 'uvicorn', 'prometheus_client', 'vllm'} & set(sys.modules)"
    )
    subprocess.run([sys.executable, "-c", code], check=True, timeout=PATIENCE)
