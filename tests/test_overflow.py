"""Mixtures that overflow: they raise an error, instead of answering with the first token of the vocabulary."""

from __future__ import annotations

from typing import Any

import pytest
import torch

import tiny
from logo import LoGo
from logo.errors import NotFinite
from test_engine import PROMPTS, engine, write_adapter

GOOD, BAD = {"good": 1.0}, {"bad": 1.0}


@pytest.fixture(scope="module")
def logo(tmp_path_factory: pytest.TempPathFactory) -> LoGo:
    folder = tmp_path_factory.mktemp("overflow")
    model = tiny.model("llama")
    write_adapter(folder / "good", model, ("q_proj", "v_proj"), rank=2, seed=1)
    write_adapter(folder / "bad", model, ("q_proj", "v_proj"), rank=2, seed=2, scale=1e20)  # each number is finite
    return engine(model, folder, k=1)


@pytest.mark.parametrize("options", [{}, {"do_sample": True}, {"num_beams": 2}], ids=str)
def test_a_mixture_that_overflows_is_an_error(logo: LoGo, options: dict[str, Any]) -> None:
    torch.manual_seed(0)
    for prompts, mixtures in (([PROMPTS[0]], [BAD]), (PROMPTS[:2], [GOOD, BAD])):
        with pytest.raises(NotFinite, match=r"not finite with this mixture of adapters.*float32.*'bad'"):
            logo.generate(prompts, adapters=mixtures, max_new_tokens=4, **options)
    assert len(logo.generate(PROMPTS[0], adapters=GOOD, max_new_tokens=4, **options).token_ids) == 4


def test_a_stream_fails_too(logo: LoGo) -> None:
    pieces = logo.stream(PROMPTS[0], adapters=BAD, max_new_tokens=4)
    with pytest.raises(NotFinite, match="not finite"):
        next(pieces)  # before a single token of it is shown
