"""Mixtures that overflow: the request that asked for one fails with a reason, and others are not affected."""

from __future__ import annotations

import asyncio
import itertools
from pathlib import Path
from typing import Any

import pytest
import torch

import tiny
from logo import LoGo
from logo.errors import AdapterError, NotFinite
from logo.protocol import GenerationFailed, MixtureRequest, Sampling
from logo.serving.service import Service
from test_engine import engine, write_adapter
from test_packed import failing
from test_serving_engine import alone, answer, served, settled
from test_store import consistent

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
        assert isinstance(error.__cause__ if isinstance(error, GenerationFailed) else error, NotFinite)
    assert after == single[0] or (dtype is torch.float16 and alike(after, single[0]))
    assert (left, alive) == ((0, 0, 0), True)
    if dtype is torch.float32 and not temperature:
        assert [tokens for tokens, _ in single] == [found[0] for found in alone(logo, rows, [GOOD] * 4, 20)]


@pytest.mark.slow
@pytest.mark.long
def test_out_of_memory_at_every_allocation_of_the_store_fails_one_request_and_no_other(tmp_path: Path) -> None:
    """One after the other, until an adapter becomes resident without meeting the one that fails."""
    logo = pool(tmp_path, *FAULTS["B (A x)"])
    rows = tiny.prompts([6, 11], seed=3)
    new = MixtureRequest(adapters={"good": 0.5, "late": 1.0})
    write_adapter(tmp_path / "late", logo.model, ("q_proj", "v_proj", "o_proj"), rank=3, seed=4)
    logo.pool.add(tmp_path / "late")
    want = alone(logo, rows, [GOOD, new], 6)
    used = {logo.pool["good"].file}

    async def use(service: Service) -> int:
        for at in itertools.count(1):
            beside = None
            while logo.store.keys and any(resident.users for resident in logo.store._residents.values()):
                await asyncio.sleep(0.01)
            logo.store.retain(used)  # the late one is not there yet
            beside = asyncio.ensure_future(answer(service, rows[0], GOOD, Sampling(6)))
            failed = False
            with failing(logo.store, at):
                try:
                    assert (await answer(service, rows[1], new, Sampling(6)))[0] == want[1][0]
                except (torch.OutOfMemoryError, AdapterError) as error:
                    failed = "no room for" in str(error)  # of its file, of columns, or of what is written to them
                    assert failed
            assert (await beside)[0] == want[0][0]
            consistent(logo.store)
            if not failed:
                return at
            assert (await answer(service, rows[1], new, Sampling(6)))[0] == want[1][0]
        raise AssertionError

    assert served(logo, use) > 10  # as many places where memory may run out
