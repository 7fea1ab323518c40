"""Which requests the router in front of vLLM's app answers itself. The app and the pool are made up."""

from __future__ import annotations

import asyncio
import json
from types import SimpleNamespace
from typing import Any

import pytest

from logo.api.asgi import Message, Receive, Scope, Send, answer
from logo.api.names import Models
from logo.backends.vllm import router as router_module
from logo.backends.vllm.router import Router


async def app(scope: Scope, receive: Receive, send: Send) -> None:
    """Stands for vLLM's app."""
    await answer(send, 200, b'{"from": "vllm"}')


def asked(model: str, resolvers: tuple[Any, ...] = (), **more: Any) -> tuple[int, Any]:
    """Status and body of the answer to a request for a model."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(router_module, "Counts", lambda: None)  # its metrics can be registered once per process
        router: Any = Router(app)
    router._core = SimpleNamespace(
        options=SimpleNamespace(max_body_mb=1.0),
        pool=SimpleNamespace(keys={"antonym": "0", "team/french": "1"}),
        models=lambda base: Models(base, ("antonym", "team/french"), ("calibrated",)),
    )
    paths = [SimpleNamespace(name=name) for name in ("base", "other-name")]
    router._models = SimpleNamespace(base_model_paths=paths, lora_requests={"native": 1}, lora_resolvers=resolvers)
    body, sent = json.dumps({"model": model, "prompt": "hello", **more}).encode(), []

    async def receive() -> Message:
        return {"type": "http.request", "body": body, "more_body": False}

    async def send(message: Message) -> None:
        sent.append(message)

    scope: Scope = {"type": "http", "method": "POST", "path": "/v1/completions", "headers": []}
    asyncio.run(router(scope, receive, send))
    return sent[0]["status"], json.loads(b"".join(message.get("body", b"") for message in sent))


@pytest.mark.parametrize("model", ["antonyms", "Antonym", "antonnym"])
def test_a_model_that_nobody_has_is_refused_with_a_hint(model: str) -> None:
    status, said = asked(model)
    assert status == 404 and said["error"]["code"] == "model_not_found"
    assert said["error"]["message"] == f"The model '{model}' does not exist (did you mean 'antonym'?)"


@pytest.mark.parametrize("model", ["base", "other-name", "native", ""])
def test_models_of_vllm_are_left_to_vllm(model: str) -> None:
    assert asked(model) == (200, {"from": "vllm"})


def test_a_name_that_vllm_may_find_elsewhere_is_left_to_vllm() -> None:
    assert asked("antonyms", resolvers=("one",)) == (200, {"from": "vllm"})


def test_options_beside_the_field_logo_are_refused() -> None:
    status, said = asked("antonym", k=1)
    assert (status, said["error"]["param"]) == (400, "k")
    assert asked("base", k=1) == (200, {"from": "vllm"})
