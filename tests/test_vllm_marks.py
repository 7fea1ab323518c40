"""Marks of probes: only ours count."""

from __future__ import annotations

import asyncio
from dataclasses import dataclass
from typing import Any

from logo.backends.vllm.marks import mark, marking, seal


@dataclass
class Parameters:
    """Of vLLM, as far as marks go."""

    extra_args: dict[str, Any] | None


def test_a_mark_that_a_client_sends_means_nothing() -> None:
    forged = {"logo_probe": "k", "logo_signal": "norm", "logo_whole": "1", "of_the_client": 1}
    parameters = Parameters(forged)
    seal(parameters)
    assert mark(parameters) is None and parameters.extra_args == {"of_the_client": 1}
    assert len(forged) == 4  # it may be shared with other requests
    for half in ({"logo_probe": "k"}, {"logo_signal": "norm"}, {"logo_whole": "1"}):
        parameters = Parameters({**half})
        seal(parameters)
        assert parameters.extra_args is None
    parameters = Parameters(forged)
    with marking("ours", ""):
        seal(parameters)
    assert parameters.extra_args == {"of_the_client": 1, "logo_probe": "ours", "logo_signal": ""}
    assert mark(parameters) == ("ours", "")
    untouched = Parameters({"of_the_client": 1})
    seal(untouched)
    seal(None)  # a request that samples nothing
    assert untouched.extra_args == {"of_the_client": 1}


def test_only_the_task_that_probes_marks_its_requests() -> None:
    async def request() -> Any:
        await asyncio.sleep(0)
        parameters = Parameters(None)
        seal(parameters)
        return mark(parameters)

    async def probe(key: str) -> Any:
        with marking(key, "norm"):
            return await asyncio.create_task(request())

    async def everybody() -> Any:
        return await asyncio.gather(probe("a"), request(), probe("b"), request())

    assert asyncio.run(everybody()) == [("a", "norm"), None, ("b", "norm"), None]
