"""An answer follows from its own prompt alone, whatever other rows its batch holds."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import nn
from transformers import GenerationConfig

import tiny
from logo import AdapterPool, Generation, LoGo, SelectionSettings
from logo import engine as engine_module
from logo.decoding import batches_by_length
from test_engine import WORDS, engine, tokenizer, write_adapter
from tiny import read_tokens
from tolerances import same_selection

LENGTH = 10
# Single tokens, one that merges a newline, and texts that two tokens may form.
STOPS = ["c", "w7", "w8", "9", "5w", "</s>"]
PADS = {"own": 2, "eos": 1}


@pytest.fixture(scope="module", params=list(PADS))
def logo(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> LoGo:
    """A random model that often writes newlines and end tokens; padded with a token of its own, or with eos."""
    pad = PADS[request.param]
    base = tiny.model("llama", pad_token_id=pad)
    root = tmp_path_factory.mktemp("pool")
    for i in range(4):
        write_adapter(root / f"t{i}", base, ("q_proj", "v_proj"), rank=2, seed=i)
    tokens = tokenizer()
    tokens.pad_token = WORDS[pad]
    favour(base)
    return LoGo(base, tokens, AdapterPool.open(root), settings=SelectionSettings("norm", k=2), merge=False)


def favour(base: nn.Module) -> None:
    """Makes a few tokens likely at almost every step, each at other ones."""
    generator = torch.Generator().manual_seed(5)
    rows = torch.randn(8, 32, generator=generator) * 0.8
    base.lm_head.weight.data[[1, 2, 7, 8, 15, 90, 91, 93]] = rows  # type: ignore[union-attr]


def same(alone: Generation, among: Generation) -> bool:
    return (alone.token_ids, alone.text, alone.finish_reason) == (among.token_ids, among.text, among.finish_reason)


options = st.fixed_dictionaries(
    {},
    optional={
        "stop": st.lists(st.sampled_from(STOPS), min_size=1, max_size=2),
        "stop_at_newline": st.sampled_from([True, "official"]),
        "eos_token_id": st.sampled_from([1, [1, 7], [8, 15, 1], [7, 2]]),
        "min_new_tokens": st.integers(1, 5),
        "stop_strings": st.sampled_from([["c"], ["7", "w1"]]),
        # They look at prompts, and must not see the padding.
        "repetition_penalty": st.just(1.7),
        "no_repeat_ngram_size": st.just(1),
    },
)
prompts = st.lists(
    st.lists(st.integers(3, 89), min_size=1, max_size=6).map(lambda ids: " ".join(f"w{i}" for i in ids)),
    min_size=2,
    max_size=5,
)


@pytest.mark.slow
@given(prompts=prompts, options=options)
@settings(max_examples=20, deadline=None)  # with each token that pads
def test_a_batch_of_many_answers_as_batches_of_one(logo: LoGo, prompts: list[str], options: dict[str, Any]) -> None:
    together = logo.generate(prompts, max_new_tokens=LENGTH, batch_size=len(prompts), **options)
    alone = [logo.generate(prompt, max_new_tokens=LENGTH, **options) for prompt in prompts]
    assert [one for one, other in zip(alone, together, strict=True) if not same(one, other)] == []


def test_answers_of_this_model_end_in_every_way(logo: LoGo) -> None:
    """So that the property has something to find."""
    asked = [f"w{3 + i} w{80 - i}" for i in range(40)]
    for option in ({"stop": ["c", "w7"]}, {"stop_at_newline": True}, {"eos_token_id": [1, 7]}):
        answers = logo.generate(asked, max_new_tokens=LENGTH, batch_size=40, **option)
        assert {answer.finish_reason for answer in answers} == {"stop", "length"}
        assert len({len(answer.token_ids) for answer in answers}) > 2


def test_a_pad_token_that_the_model_writes_is_part_of_its_answer(logo: LoGo) -> None:
    others = [token for token in range(len(WORDS)) if token != 2]
    answers = logo.generate(["w3", "w4 w5"], max_new_tokens=LENGTH, stop=["never"], suppress_tokens=others)
    assert [answer.token_ids for answer in answers] == [(2,) * LENGTH] * 2


@pytest.mark.parametrize("config", [GenerationConfig(max_new_tokens=LENGTH), None], ids=["a config", "no config"])
def test_what_the_checkpoint_asks_for_is_known_before_rows_are_padded(
    llama: nn.Module, adapters: Path, config: GenerationConfig | None, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Where a call says nothing, transformers takes what the checkpoint's generation config says."""
    monkeypatch.setattr(llama.generation_config, "encoder_repetition_penalty", 1.7)
    made = engine(llama, adapters, k=2)
    asked = [" ".join(f"w{3 + (i * n) % 80}" for n in range(1, 2 + i)) for i in range(8)]
    options = {"max_new_tokens": LENGTH, "generation_config": config}
    together = made.generate(asked, batch_size=8, **options)
    for prompt, answer in zip(asked, together, strict=True):
        assert same(made.generate(prompt, **options), answer)


def test_checkpoints_stop_texts_end_answers(llama: nn.Module, adapters: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    made = engine(llama, adapters, k=2)
    answer = made.generate("w3 w4", max_new_tokens=LENGTH)
    text = made.tokenizer.decode(answer.token_ids[:3])
    monkeypatch.setattr(llama.generation_config, "stop_strings", [text])
    for config in (None, llama.generation_config):
        stopped = made.generate("w3 w4", max_new_tokens=LENGTH, generation_config=config)
        assert stopped.finish_reason == "stop" and len(stopped.token_ids) <= 3 < len(answer.token_ids)
    assert llama.generation_config.stop_strings == [text]


@given(st.lists(st.integers(1, 9), max_size=9), st.integers(1, 5), st.integers(1, 20))
def test_batches_hold_every_row_once_and_no_more_than_they_may(lengths: list[int], size: int, most: int) -> None:
    batches = list(batches_by_length(lengths, size, tokens=most))
    assert sorted(i for batch in batches for i in batch) == list(range(len(lengths)))
    held = [len(batch) * max(lengths[i] for i in batch) for batch in batches]
    for number, (batch, padded) in enumerate(zip(batches, held, strict=True), start=1):
        assert len(batch) <= size and (padded <= most or len(batch) == 1)
        if number < len(batches):  # none is smaller than it has to be
            assert len(batch) == size or padded + padded // len(batch) > most


@pytest.mark.parametrize("signal", ["norm", "calibrated"])
def test_a_probe_of_long_prompts_is_split(signal: str, logo: LoGo, monkeypatch: pytest.MonkeyPatch) -> None:
    asked = [" ".join(f"w{3 + (i * n) % 80}" for n in range(length)) for i, length in enumerate([40, 9, 30, 11, 60, 2])]
    logo.calibrate(signal)
    whole = logo.select(asked, signal=signal, batch_size=6)
    monkeypatch.setattr(engine_module, "MAX_TOKENS", 70)
    with read_tokens(logo.model) as seen:
        parts = logo.select(asked, signal=signal, batch_size=6)
    assert seen == [61, 41, 31 + 12, 10 + 3]  # which are packed
    for one, other in zip(parts, whole, strict=True):
        same_selection(one, other)
