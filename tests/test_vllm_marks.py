"""Marks of probes and answers: only ours count."""

from __future__ import annotations

import asyncio
from dataclasses import dataclass
from types import SimpleNamespace
from typing import Any

import pytest

from logo.backends.vllm.marks import answer_of, answering, cut, is_probe, probing, reading, seal


@dataclass
class Parameters:
    """Of vLLM, as far as marks go."""

    extra_args: dict[str, Any] | None


def test_a_mark_that_a_client_sends_means_nothing() -> None:
    forged = {"logo_probe": "k", "logo_signal": "norm", "logo_answer": "a", "of_the_client": 1}
    parameters = Parameters(forged)
    seal(parameters)
    assert not is_probe(parameters) and answer_of(parameters) is None
    assert parameters.extra_args == {"of_the_client": 1} and len(forged) == 4  # it may be shared with other requests
    for half in ("logo_probe", "logo_signal", "logo_among", "logo_window", "logo_answer", "logo_prompt"):
        parameters = Parameters({half: "x"})
        seal(parameters)
        assert parameters.extra_args is None
    parameters = Parameters(forged)
    with probing("ours", "", ["one"]):
        seal(parameters)
    own = {"logo_probe": "ours", "logo_signal": "", "logo_among": ["one"]}
    assert parameters.extra_args == {"of_the_client": 1, **own}
    with answering("key"), reading(3):  # they add up
        seal(parameters)
    assert parameters.extra_args == {"of_the_client": 1, "logo_answer": "key", "logo_prompt": 3}
    untouched = Parameters({"of_the_client": 1})
    seal(untouched)
    seal(None)  # a request that samples nothing
    assert untouched.extra_args == {"of_the_client": 1}


@pytest.mark.parametrize(
    ("window", "more", "left"),
    [
        ((2, 3), {}, [0, 1, 7, 8, 9]),
        ((6, 6), {}, list(range(10))),
        ("whole", {}, list(range(10))),
        ((2, 3), {"mm_features": ["a picture"]}, list(range(10))),  # which belongs to positions of the prompt
        ((2, 3), {"prompt_token_ids": None, "prompt_embeds": "vectors"}, None),
    ],
)
def test_a_probe_is_its_window(window: Any, more: dict[str, Any], left: Any) -> None:
    given = {"prompt_token_ids": list(range(10)), "mm_features": None, "prompt_embeds": None, **more}
    probe, other = (SimpleNamespace(sampling_params=Parameters(None), **given) for _ in range(2))
    with probing("key", "calibrated", window=window):
        seal(probe.sampling_params)
    for request in (probe, other):
        cut(request)
    assert probe.prompt_token_ids == left
    assert other.prompt_token_ids == given["prompt_token_ids"]


def test_only_the_task_that_probes_marks_its_requests() -> None:
    async def request() -> Any:
        await asyncio.sleep(0)
        parameters = Parameters(None)
        seal(parameters)
        return parameters.extra_args and parameters.extra_args["logo_probe"]

    async def probe(key: str) -> Any:
        with probing(key, "norm"):
            return await asyncio.create_task(request())

    async def everybody() -> Any:
        return await asyncio.gather(probe("a"), request(), probe("b"), request())

    assert asyncio.run(everybody()) == ["a", None, "b", None]
