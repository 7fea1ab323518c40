"""What is noted of the prompts of answers inside vLLM, with requests that are made up."""

from __future__ import annotations

import asyncio
import logging
from collections.abc import Sequence
from dataclasses import dataclass, field
from types import SimpleNamespace
from typing import Any

import pytest

from logo.adapters.activation import EVERYWHERE, Activation
from logo.backends.vllm import prompts
from logo.backends.vllm.prompts import begun, following, found, take
from logo.backends.vllm.recipe import Recipe
from logo.selection import Selection

A, B = "a" * 16, "b" * 16
LAST, INVOKED = Activation(last=4), Activation((9,))


@dataclass
class Counted:
    """What was told."""

    silent: list[tuple[str, ...]] = field(default_factory=list)
    tokens: list[tuple[int, int]] = field(default_factory=list)

    def not_invoked(self, keys: Sequence[str]) -> None:
        self.silent.append(tuple(keys))

    def read(self, found: int, missed: int) -> None:
        self.tokens.append((found, missed))


def request(name: str, tokens: list[int] | None, a: Activation = LAST, b: Activation = LAST) -> Any:
    text = str(Recipe.of([(A, 0.7), (B, 0.3)], {A: a, B: b}))
    lora = SimpleNamespace(lora_name=text, lora_path=text, lora_int_id=5)
    return SimpleNamespace(request_id=name, lora_request=lora, sampling_params=None, prompt_token_ids=tokens)


def step(**cached: int) -> None:
    """A step in which these requests have a token, the first for some."""
    states = {name: SimpleNamespace(num_cached_tokens=0) for name in cached}
    first = begun(states, [SimpleNamespace(request_id=name) for name in (*cached, "another")])
    for name, count in cached.items():
        states[name].num_cached_tokens = count  # as vLLM does when it looks at the step itself
    found(first)


@pytest.mark.parametrize(("cached", "told"), [(96, (96, 0)), (0, (0, 96)), (32, (32, 64)), (128, (96, 0))], ids=str)
def test_what_an_answer_finds_of_what_the_probe_has_read(cached: int, told: tuple[int, int]) -> None:
    counted = Counted()
    with following(counted, 16):
        take(request("one", [1] * 110))  # adapters act from position 106 on
        step(one=cached)
        step(one=cached)  # its second token
    assert counted.tokens == [told] and not counted.silent and not prompts._waiting


def test_what_no_probe_has_read_was_promised_nothing() -> None:
    counted = Counted()
    with following(counted, None):
        take(request("one", [1] * 110))
        step(one=0)
    whole = request("two", [1] * 110)
    whole.sampling_params = SimpleNamespace(extra_args=None, skip_reading_prefix_cache=True)
    with following(counted, 16):  # as vLLM does where log probabilities of the prompt are asked for
        take(whole)
        step(two=0)
    assert not counted.tokens


def test_adapters_that_a_prompt_does_not_invoke() -> None:
    counted = Counted()
    with following(counted, 16):
        take(request("one", [1] * 33, INVOKED, LAST))
        step(one=16)
    with following(counted, 16):
        take(request("two", [1] * 33, INVOKED, INVOKED))
        step(two=32)  # all is the base model's
    with following(counted, 16):
        take(request("three", [1] * 16 + [9] * 17, INVOKED, Activation((8,), without="last:2")))
        step(three=16)
    assert counted.silent == [(A,), (A, B)] and counted.tokens == [(16, 0), (32, 0), (16, 0)]


def test_several_answers_to_one_prompt_count_once() -> None:
    counted = Counted()
    with following(counted, 16):
        for name in ("one", "two", "three"):
            take(request(name, [1] * 33, INVOKED, LAST))
        step(one=16, two=0, three=0)
    assert counted.silent == [(A,)] and counted.tokens == [(16, 0)]


def test_what_does_not_concern_us() -> None:
    counted = Counted()
    take(request("one", [1] * 33, INVOKED))  # nobody follows it
    with following(counted, 16):
        take(request("two", [1] * 33, EVERYWHERE, EVERYWHERE))
        take(request("three", None))
        base = request("four", [1] * 33)
        base.lora_request = None
        take(base)
        step(one=0, two=0, three=0, four=0)
    assert counted == Counted() and not prompts._waiting


def test_an_answer_whose_client_leaves_is_forgotten() -> None:
    counted = Counted()
    with pytest.raises(asyncio.CancelledError), following(counted, 16):
        take(request("one", [1] * 33))
        raise asyncio.CancelledError
    step(one=16)
    assert not counted.tokens and not prompts._waiting


def test_tasks_that_answer_at_the_same_time_do_not_meet() -> None:
    async def answer(name: str, counted: Counted) -> None:
        async def asks() -> None:  # in a task of its own
            await asyncio.sleep(0)
            take(request(name, [1] * 33, INVOKED if name == "one" else LAST))

        with following(counted, 16):
            await asyncio.gather(asks(), asyncio.sleep(0))

    async def both() -> tuple[Counted, Counted]:
        one, other = Counted(), Counted()
        await asyncio.gather(answer("one", one), answer("two", other))
        return one, other

    one, other = asyncio.run(both())
    assert one.silent == [(A,)] and not other.silent


def test_what_is_counted(caplog: pytest.LogCaptureFixture) -> None:
    prometheus = pytest.importorskip("prometheus_client")
    from logo.backends.vllm.metrics import Counts

    counts = Counts()
    with caplog.at_level(logging.WARNING, "vllm.logo"):
        counts.not_invoked(["a", "b"])
        counts.not_invoked(["a", "c"])
        counts.read(96, 0)
        counts.read(32, 64)
    counts.selected(Selection(("a", "b"), (0.6, 0.4), {"a": 3.0, "b": 2.0}, 0.35), 0.01)
    counts.selected(Selection(("a",), (1.0,), {"a": 3.0}), 0.01)  # a signal that does not say how sure it is
    sampled = prometheus.REGISTRY.get_sample_value
    assert sampled("logo:not_invoked_total") == 4
    assert sampled("logo:adapter_selected_total", {"adapter": "a"}) == 2
    confident = [sampled("logo:selection_confidence_bucket", {"le": le}) for le in ("0.3", "0.4", "1.0", "+Inf")]
    assert confident == [0, 1, 1, 1]
    assert [sampled("logo:prefix_tokens_total", {"state": state}) for state in ("found", "missed")] == [128, 64]
    warned = [str(record.args[0]) for record in caplog.records]  # type: ignore[index]
    assert [text.split(":")[0] for text in warned] == ["adapters 'a', 'b'", "adapter 'c'"]
