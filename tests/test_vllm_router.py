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


def asked(
    model: str, resolvers: tuple[Any, ...] = (), path: str = "/v1/completions", module: str = "q_proj", **more: Any
) -> tuple[int, Any]:
    """Status and body of the answer to a request for a model; `module`: what the adapters act on."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(router_module, "Counts", lambda: None)  # its metrics can be registered once per process
        router: Any = Router(app)
    names = ("antonym", "team/french")
    adapters = [SimpleNamespace(name=name, modules=(f"model.layers.0.{module}",)) for name in names]
    router._core = SimpleNamespace(
        options=SimpleNamespace(max_body_mb=1.0),
        pool=SimpleNamespace(keys=dict.fromkeys(names, "0"), adapters=adapters),
        signal=lambda wanted: pytest.fail("probed"),
        models=lambda base: Models(base, names, ("calibrated",)),
    )
    paths = [SimpleNamespace(name=name) for name in ("base", "other-name")]
    router._models = SimpleNamespace(base_model_paths=paths, lora_requests={"native": 1}, lora_resolvers=resolvers)
    body, sent = json.dumps({"model": model, "prompt": "hello", **more}).encode(), []

    async def receive() -> Message:
        return {"type": "http.request", "body": body, "more_body": False}

    async def send(message: Message) -> None:
        sent.append(message)

    scope: Scope = {"type": "http", "method": "POST", "path": path, "headers": []}
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
