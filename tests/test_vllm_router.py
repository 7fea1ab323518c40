"""Which requests the router in front of vLLM's app answers itself. The app and the pool are made up."""

from __future__ import annotations

import asyncio
import json
from types import SimpleNamespace
from typing import Any

import pytest
from starlette.types import Message, Receive, Scope, Send

from logo.backends.vllm import router as router_module
from logo.backends.vllm.asgi import answer
from logo.backends.vllm.router import Router
from logo.serve.names import Models


async def app(scope: Scope, receive: Receive, send: Send) -> None:
    """Stands for vLLM's app."""
    await answer(send, 200, b'{"from": "vllm"}')


def asked(
    model: str,
    path: str = "/v1/completions",
    module: str = "q_proj",
    kind: str | None = "application/json",
    broken: str | None = None,
    **more: Any,
) -> tuple[int, Any]:
    """Status and body of the answer to a request for a model.

    Args:
        module: what the adapters act on.
        kind: the type of the body.
        broken: of the pool.
    """
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(router_module, "Counts", lambda: None)  # its metrics can be registered once per process
        router: Any = Router(app)
    names = ("antonym", "team/french")
    adapters = [SimpleNamespace(name=name, modules=(f"model.layers.0.{module}",)) for name in names]
    router._core = SimpleNamespace(
        options=SimpleNamespace(max_body_mb=1.0, adapter_changes=True),
        broken=broken,
        pool=SimpleNamespace(keys=dict.fromkeys(names, "0"), adapters=adapters),
        asked=lambda wanted: pytest.fail("probed"),
        models=lambda base: Models(base, names, ("calibrated",)),
    )
    paths = [SimpleNamespace(name=name) for name in ("base", "other-name")]
    router._models = SimpleNamespace(base_model_paths=paths)
    router._answering = SimpleNamespace()
    body, sent = json.dumps({"model": model, "prompt": "hello", **more}).encode(), []

    async def receive() -> Message:
        return {"type": "http.request", "body": body, "more_body": False}

    async def send(message: Message) -> None:
        sent.append(message)

    headers = [] if kind is None else [(b"content-type", kind.encode())]
    scope: Scope = {"type": "http", "method": "POST", "path": path, "headers": headers}
    asyncio.run(router(scope, receive, send))
    return sent[0]["status"], json.loads(b"".join(message.get("body", b"") for message in sent))


@pytest.mark.parametrize("model", ["antonyms", "Antonym", "antonnym"])
def test_a_model_that_nobody_has_is_refused_with_a_hint(model: str) -> None:
    status, said = asked(model)
    assert status == 404 and said["error"]["code"] == "model_not_found"
    assert said["error"]["message"] == f"The model '{model}' does not exist (did you mean 'antonym'?)"


@pytest.mark.parametrize("model", ["base", "other-name", ""])
def test_models_of_vllm_are_left_to_vllm(model: str) -> None:
    assert asked(model) == (200, {"from": "vllm"})


@pytest.mark.parametrize("kind", ["text/plain", "application/x-www-form-urlencoded", "multipart/form-data", None])
@pytest.mark.parametrize(
    "path",
    [
        *("/v1/completions", "/v1/chat/completions", "/v1/responses", "/v1/logo/select"),
        *("/v1/load_lora_adapter", "/v1/unload_lora_adapter"),
    ],
)
def test_content_that_is_not_called_json_is_refused(path: str, kind: str | None) -> None:
    """So a page elsewhere cannot post here without asking: browsers send only these types unasked."""
    for model in ("logo", "base"):
        status, said = asked(model, path=path, kind=kind, lora_name="antonym")
        assert status == 400
        assert said["error"]["message"].startswith("expected a JSON object and 'Content-Type: application/json'")
    assert asked("base", kind="application/json; charset=utf-8")[0] == 200


def test_nothing_is_answered_where_the_workers_pools_differ() -> None:
    for model in ("logo", "antonym", "base"):
        status, said = asked(model, broken="start the server again")
        assert (status, said["error"]["message"]) == (500, "start the server again")
    assert asked("base", path="/health", broken="start the server again")[0] == 500  # somebody is to start it again
    assert asked("base", path="/health") == (200, {"from": "vllm"})


def test_options_beside_the_field_logo_are_refused() -> None:
    status, said = asked("antonym", k=1)
    assert (status, said["error"]["param"]) == (400, "k")
    assert asked("base", k=1) == (200, {"from": "vllm"})


@pytest.mark.parametrize(
    ("path", "options"),
    [
        ("/v1/completions", {"prompt_logprobs": 0}),
        ("/v1/completions", {"echo": True, "logprobs": 0}),
        ("/v1/chat/completions", {"prompt_logprobs": 1}),
        ("/v1/chat/completions", {"echo": True, "logprobs": True, "top_logprobs": 2}),
        ("/v1/chat/completions", {"echo": True}),
    ],
)
def test_probabilities_of_a_prompt_are_refused_with_adapters_of_the_output_head(
    path: str, options: dict[str, Any]
) -> None:
    for model in ("antonym", "logo"):
        status, said = asked(model, path=path, module="lm_head", **options)
        assert (status, said["error"]["param"]) == (400, "prompt_logprobs")
        assert "adapter 'antonym' acts on the output head" in said["error"]["message"]
    assert asked("base", path=path, module="lm_head", **options)[0] == 200
    for module, others in (("q_proj", options), ("lm_head", {"logprobs": 1, "echo": False, "prompt_logprobs": None})):
        with pytest.raises(pytest.fail.Exception, match="probed"):
            asked("logo", path=path, module=module, **others)
