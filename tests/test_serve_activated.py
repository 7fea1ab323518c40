"""Activated adapters on our server: answers are those of `LoGo.generate`, and prompts are read once."""

from __future__ import annotations

import asyncio
from pathlib import Path
from typing import Any

import pytest

import tiny
from logo.serve import batching
from logo.serve.names import MixtureRequest
from logo.serve.sampling import Sampling
from logo.serve.service import Service
from make_adapters import edit_config
from test_activation import INVOKE, MIXTURES, engine, invoked, notes, pool_of
from test_serve_engine import alone, answer, served
from tiny import read_tokens

pytestmark = pytest.mark.slow


@pytest.mark.parametrize("step", [512, 16], ids=["whole prompts", "prompts in parts"])
@pytest.mark.parametrize("kind", ["last:4", "invocation", "mixed"])
@pytest.mark.parametrize("name", ["llama", "gemma3", "gpt2"])
def test_answers_are_those_of_the_engine(
    name: str, kind: str, step: int, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(batching, "_STEP_TOKENS", step)
    model = tiny.model(name)
    modules = ("q_proj", "v_proj") if name != "gpt2" else ("c_attn",)
    folder = pool_of(tmp_path, model, modules)
    if kind == "last:4":
        notes(folder, kind)
    for adapter in ("t0",) if kind == "mixed" else ("t0", "t1", "t2") if kind == "invocation" else ():
        edit_config(folder / adapter, alora_invocation_tokens=INVOKE)
    if kind == "mixed":
        with pytest.warns(UserWarning, match="act on every token"):
            logo = engine(model, folder)
    else:
        logo = engine(model, folder)
    rows = [*invoked((20, 5, 80, 40, 70)), [*INVOKE, 9], [5, *INVOKE]]
    requests = [MixtureRequest(adapters=mixture) for mixture in MIXTURES] + [MixtureRequest()] * 3

    async def use(service: Service) -> Any:
        jobs = (answer(service, ids, wanted, Sampling(9)) for ids, wanted in zip(rows, requests, strict=True))
        found = await asyncio.gather(*jobs)
        again = [await answer(service, ids, MixtureRequest(), Sampling(9)) for ids in rows[4:]]
        return found, again

    found, again = served(logo, use, concurrent=4)
    for ids, wanted, (tokens, _, chosen) in zip(
        [*rows, *rows[4:]], [*requests, *requests[4:]], [*found, *again], strict=True
    ):
        [want] = alone(logo, [ids], [wanted], 9)
        assert (tokens, chosen.selection.adapters) == (want[0], want[2])


@pytest.mark.parametrize(("cached", "read"), [({}, [100, 3, 1, 1, 1]), ({"prefix_cache_gb": 0}, [100, 99, 1, 1, 1])])
def test_a_prompt_is_read_once_unless_it_was_dropped(cached: dict[str, int], read: list[int], tmp_path: Path) -> None:
    model = tiny.model("llama", eos_token_id=None)
    logo = engine(model, notes(pool_of(tmp_path, model), "last:4"), **cached)
    prompt = tiny.prompts([100])[0]

    async def use(service: Service) -> Any:
        with read_tokens(model) as seen:
            tokens, *_ = await answer(service, prompt, MixtureRequest(), Sampling(3))
            assert seen == read
            await answer(service, prompt, MixtureRequest(options={"k": 1}), Sampling(3))
        return seen[len(read) :], tokens

    again, tokens = served(logo, use)
    assert cached or again == [4, 3, 1, 1, 1]
    assert tokens == alone(logo, [prompt], [MixtureRequest()], 3)[0][0]
