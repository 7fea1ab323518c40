"""Marks of probes and answers: only ours count."""

from __future__ import annotations

import asyncio
from dataclasses import dataclass
from typing import Any

from logo.backends.vllm.marks import answer_of, answering, is_probe, probing, reading, seal


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
    for half in ("logo_probe", "logo_signal", "logo_among", "logo_answer", "logo_prompt"):
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
