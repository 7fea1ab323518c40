"""Mixtures that overflow: the request that asked for one fails with a reason, and others are not affected."""

from __future__ import annotations

import asyncio
from pathlib import Path
from typing import Any

import pytest
import torch

import tiny
from logo import LoGo
from logo.errors import NotFinite
from logo.serve.names import MixtureRequest
from logo.serve.sampling import Sampling
from logo.serve.service import Service
from test_engine import engine, write_adapter
from test_serve_engine import alone, answer, served, settled

GOOD, BAD = MixtureRequest(adapters={"good": 1.0}), MixtureRequest(adapters={"bad": 1.0})
# Each of them is finite in its file; what they make of a prompt is not.
FAULTS = {
    "B (A x)": (torch.float32, 1e20),
    "A x": (torch.float32, 1e38),  # not finite in columns that other tokens are multiplied with, too
    "half precision": (torch.float16, 1e3),
}


def pool(folder: Path, dtype: torch.dtype, scale: float, names: tuple[str, ...] = ("q_proj", "v_proj")) -> LoGo:
    model = tiny.model("llama").to(dtype)
    write_adapter(folder / "good", model, names, rank=2, seed=1)
    write_adapter(folder / "bad", model, names, rank=2, seed=2, scale=scale)
    return engine(model, folder, k=1)


def alike(one: tuple[tuple[int, ...], str], other: tuple[tuple[int, ...], str]) -> bool:
    """Whether two answers are as long and end for the same reason."""
    return (len(one[0]), one[1]) == (len(other[0]), other[1])


@pytest.mark.slow
@pytest.mark.parametrize("temperature", [0.0, 0.7])
@pytest.mark.parametrize(("dtype", "scale"), FAULTS.values(), ids=FAULTS)
def test_a_mixture_that_overflows_is_an_error_of_its_own_request(
    dtype: torch.dtype, scale: float, temperature: float, tmp_path: Path
) -> None:
    logo = pool(tmp_path, dtype, scale)
    rows = tiny.prompts([6, 11, 3, 8], seed=3)
    way = Sampling(20, temperature, seed=4)

    async def use(service: Service) -> Any:
        single = [(await answer(service, ids, GOOD, way))[:2] for ids in rows]
        jobs = [answer(service, ids, wanted, way) for ids in rows for wanted in (GOOD, BAD)]
        together = await asyncio.gather(*jobs, return_exceptions=True)
        after = await answer(service, rows[0], GOOD, way)  # the bad adapter's columns may still be there
        return single, together, after[:2], await settled(service), service.batching.alive

    single, together, after, left, alive = served(logo, use)
    for entry, want in zip(together[::2], single, strict=True):  # half precision rounds differently in company
        assert entry[:2] == want or (dtype is torch.float16 and alike(entry[:2], want))
    for error in together[1::2]:
        # Before the prompt is read where an adapter alone overflows, else in the middle of the answer.
        assert isinstance(error, NotFinite)
    assert after == single[0] or (dtype is torch.float16 and alike(after, single[0]))
    assert (left, alive) == ((0, 0, 0), True)
    if dtype is torch.float32 and not temperature:
        assert [tokens for tokens, _ in single] == [found[0] for found in alone(logo, rows, [GOOD] * 4, 20)]
