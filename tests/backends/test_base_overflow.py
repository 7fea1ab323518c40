"""What vLLM's offline engine does after an overflow, with an engine that is made up."""

from __future__ import annotations

from types import SimpleNamespace
from typing import Any

import pytest
import torch

from logo.backends.vllm.calls import logo_clean
from logo.backends.vllm.offline import VllmLoGo
from logo.backends.vllm.requests import Running
from logo.errors import ModelError, NotFinite
from logo.selection import Selection

LORA = SimpleNamespace(lora_name="logo://" + "a" * 16 + ":1")


def engine(*, idle: bool = True) -> tuple[Any, list[Any]]:
    """An engine, and what it asks of vLLM; `idle`: whether no other request runs."""
    asked: list[Any] = []

    def reset() -> bool:
        asked.append("forget")
        return idle

    def on_workers(name: str, args: tuple[Any, ...]) -> list[Any]:
        asked.append((name, args[0]))
        return [{"value": None}]

    made: Any = VllmLoGo.__new__(VllmLoGo)
    made.llm = SimpleNamespace(reset_prefix_cache=reset, collective_rpc=on_workers)
    made.core = SimpleNamespace(failed=lambda recipe: asked.append(("failed", recipe)))
    made._requests = SimpleNamespace(stop=lambda running: asked.append("stop"))
    return made, asked


@pytest.mark.parametrize(
    ("lora", "idle", "expected"),
    [
        (LORA, True, ["stop", ("logo_clean", LORA.lora_name), ("failed", LORA.lora_name)]),
        # Keys and values of the base model are found by their tokens alone, so they are forgotten before they change.
        (None, True, ["stop", "forget", ("logo_clean", None)]),
        # Those that others use stay as they are: an error is better than zeros in their place.
        (None, False, ["stop", "forget"]),
    ],
    ids=["a mixture", "the base model", "the base model, beside others"],
)
def test_an_answer_that_overflows_leaves_nothing_in_the_cache(lora: Any, idle: bool, expected: list[Any]) -> None:
    made, asked = engine(idle=idle)
    with pytest.raises(NotFinite, match="with the adapters 'x'" if lora else "with no adapter"):
        made._check_finite(Running("key", finite=False), Selection.forced({"x": 1.0} if lora else {}), lora)
    assert asked == expected


def test_a_likelihood_that_overflows_leaves_nothing_there_either() -> None:
    made, asked = engine()
    nothing = SimpleNamespace(logprob=float("nan"), rank=1)
    output = SimpleNamespace(outputs=[SimpleNamespace(logprobs=[{7: nothing}], token_ids=[7])])
    with pytest.raises(ModelError, match="the likelihood of the completion is nan"):
        made._scored(Running("key", last=output), [7], None)
    assert asked == ["forget", ("logo_clean", None)]


@pytest.mark.parametrize("recipe", [LORA.lora_name, None])
def test_cleaning_removes_what_is_not_finite(recipe: str | None) -> None:
    failed: list[str] = []
    worker = SimpleNamespace(fail=lambda text, reason: failed.append(text))
    caches = [torch.tensor([1.0, float("nan")]), (torch.tensor([float("inf")]), torch.tensor([2.0]))]
    runner = SimpleNamespace(
        lora_manager=SimpleNamespace(logo=worker), device=torch.device("cpu"), kv_caches=caches
    )  # without `_zero_block_ids`, as on a GPU
    logo_clean(SimpleNamespace(model_runner=runner), recipe, "why")
    assert [part.tolist() for part in (caches[0], *caches[1])] == [[1.0, 0.0], [0.0], [2.0]]
    assert failed == ([] if recipe is None else [recipe])
