"""Merging: the same answers as gates, base weights untouched whatever happens, refused where it cannot be."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import peft
import pytest
import torch
from torch import nn

import tiny
from logo import AdapterPool, LoGo, SelectionSettings
from logo.mixing.merge import mergeable
from logo.mixing.mixer import Mixture
from test_engine import PROMPTS, engine, tokenizer, write_adapter
from test_mixing import Mixed, Quantised, peft_model, save
from tolerances import same_tensor


def pool_of(base: nn.Module, folder: Path, *targets: Any, **how: Any) -> AdapterPool:
    configs = [peft.LoraConfig(r=3, target_modules=some, task_type="CAUSAL_LM", **how) for some in targets]
    return save(peft_model(base, configs, seed=1), folder)


@pytest.mark.parametrize("name", list(tiny.CONFIGS))
def test_merged_equals_gated(name: str, tmp_path: Path) -> None:
    base = tiny.model(name)
    pool = pool_of(base, tmp_path, "all-linear", "all-linear", fan_in_fan_out=name == "gpt2")
    mixture = [{"a0": 0.7, "a1": -0.2}]
    ids, mask = tiny.padded(tiny.prompts([6, 4]))
    with torch.no_grad():
        plain = base(input_ids=ids, attention_mask=mask).logits
    merged, gated = (Mixed(base, pool, merge).logits(mixture, ids, mask) for merge in (True, False))
    with torch.no_grad():
        after = base(input_ids=ids, attention_mask=mask).logits
    same_tensor(merged, gated)
    assert not torch.allclose(merged, plain, atol=1e-4)
    assert torch.equal(plain, after)


def test_base_weights_are_never_written_to(tmp_path: Path) -> None:
    base = tiny.model("llama")
    before = {name: (parameter, parameter.clone()) for name, parameter in base.named_parameters()}
    mixed = Mixed(base, pool_of(base, tmp_path, "all-linear"), merge=True)
    with pytest.raises(KeyboardInterrupt), mixed.mixer.active(mixed.pool, [Mixture({"a0": 1.0})]) as form:
        assert form == "merged"
        assert any(parameter is not before[name][0] for name, parameter in base.named_parameters())
        raise KeyboardInterrupt
    for name, parameter in base.named_parameters():
        assert parameter is before[name][0] and torch.equal(parameter, before[name][1])


def test_one_mixture_after_another(tmp_path: Path) -> None:
    """Memory is used again, so that nothing of the mixture before may be left in it."""
    base = tiny.model("llama")
    pool = pool_of(base, tmp_path, ["q_proj", "v_proj"], ["q_proj"])
    ids, mask = tiny.padded(tiny.prompts([6]))
    kept = Mixed(base, pool, merge=True)
    for mixture in ({"a0": 1.0}, {"a0": 0.3}, {"a1": 1.0}, {"a0": 1.0}, {"a0": 1.0}):
        fresh = Mixed(base, pool, merge=True).logits([mixture], ids, mask)
        assert torch.equal(kept.logits([mixture], ids, mask), fresh)


def test_what_cannot_be_merged_keeps_its_gates(tmp_path: Path) -> None:
    base = tiny.model("llama")
    for i in range(3):
        write_adapter(tmp_path / f"t{i}", base, ("q_proj", "v_proj"), rank=2, seed=i)
    for layer in base.model.layers:
        layer.self_attn.q_proj = Quantised(layer.self_attn.q_proj)
    pool, settings = AdapterPool.open(tmp_path), SelectionSettings("norm", k=2)
    asked, gated = (LoGo(base, tokenizer(), pool, settings=settings, merge=merge) for merge in (True, False))
    for prompt in PROMPTS:
        assert asked.generate(prompt, max_new_tokens=6).token_ids == gated.generate(prompt, max_new_tokens=6).token_ids
    assert not mergeable(base.model.layers[0].self_attn.q_proj)
    assert mergeable(base.model.layers[0].self_attn.v_proj)


def test_generation_is_the_same_merged(tmp_path: Path, llama: nn.Module, adapters: Path) -> None:
    pool, settings = AdapterPool.open(adapters), SelectionSettings("norm", k=3)
    merged, gated = (LoGo(llama, tokenizer(), pool, settings=settings, merge=merge) for merge in (True, False))
    for prompt in PROMPTS:
        one, other = merged.generate(prompt, max_new_tokens=12), gated.generate(prompt, max_new_tokens=12)
        assert one.token_ids == other.token_ids
        assert "".join(merged.stream(prompt, max_new_tokens=12)) == one.text
    assert merged.generate(PROMPTS, max_new_tokens=6)  # different mixtures in one batch: gates


def test_many_tokens_are_merged_and_few_are_not(tmp_path: Path) -> None:
    base = tiny.model("llama")  # 32 wide, so that 16 tokens are worth it
    mixed = Mixed(base, pool_of(base, tmp_path, ["q_proj"], ["q_proj"]), merge=None)
    one, other = Mixture({"a0": 1.0}), Mixture({"a1": 1.0})

    def form(mixtures: list[Mixture], tokens: float) -> str:
        with mixed.mixer.active(mixed.pool, mixtures, tokens) as found:
            return found

    assert [form([one], tokens) for tokens in (15, 16, 100)] == ["gated", "merged", "merged"]
    assert form([one, one], 16) == "merged" and form([one, other], 100) == "gated"
    assert form([Mixture({"a0": 1.0}, {"a0": 3})], 100) == "gated"
    assert form([Mixture(), Mixture()], 100) == "none"


@pytest.mark.slow
def test_nothing_is_merged_by_itself_in_half_precision(adapters: Path) -> None:
    """`W + ΔW` would be rounded to the weights' dtype, and other tokens might follow."""
    base = tiny.model("llama").to(torch.bfloat16)
    engines = {merge: engine(base, adapters, merge=merge) for merge in (None, False, True)}
    answers = {merge: [made.generate(p, max_new_tokens=60) for p in PROMPTS] for merge, made in engines.items()}
    assert {merge: {a.form for a in made} for merge, made in answers.items()} == {
        None: {"gated"},
        False: {"gated"},
        True: {"merged"},
    }
    assert [a.token_ids for a in answers[None]] == [a.token_ids for a in answers[False]]


@pytest.mark.slow
def test_what_ran_before_decides_nothing(llama: nn.Module, adapters: Path) -> None:
    """Same forms and tokens for the same rows: at once, after short answers, after long ones and batches of both."""
    asked = [*PROMPTS, PROMPTS[0]]

    def answered(before: list[dict[str, Any]]) -> list[tuple[str, tuple[int, ...]]]:
        logo = engine(llama, adapters)
        for options in before:
            logo.generate(PROMPTS[::-1], **options)
        found = []
        for length in (2, 8, 64):  # some of which are merged in float32, and some of which are not
            found += logo.generate(asked, max_new_tokens=length, batch_size=1)
        found += logo.generate(asked, max_new_tokens=8, batch_size=4)
        return [(answer.form, answer.token_ids) for answer in found]

    short, long = {"max_new_tokens": 40, "eos_token_id": list(range(96))}, {"max_new_tokens": 90}
    fresh = answered([])
    assert answered([short] * 3) == answered([long, {**short, "batch_size": 2}]) == fresh
    assert {form for form, _ in fresh} == {"merged", "gated"}


def test_every_answer_says_how_its_mixture_acted(llama: nn.Module, adapters: Path) -> None:
    logo = engine(llama, adapters)
    assert logo.generate(PROMPTS[0], adapters={}, max_new_tokens=2).form == "none"
    assert {answer.form for answer in logo.generate(PROMPTS, max_new_tokens=60)} == {"gated"}  # of one batch


def test_a_call_in_inference_mode_changes_no_later_one(llama: nn.Module, adapters: Path) -> None:
    """The copy that it leaves is written to by the next mixture."""
    logo = engine(llama, adapters, merge=True)
    one, other, *_ = ({name: 1.0} for name in logo.names)
    expected = logo.generate(PROMPTS[0], adapters=one, max_new_tokens=4)
    with torch.inference_mode():
        logo.generate(PROMPTS[0], adapters=other, max_new_tokens=4)
    assert logo.generate(PROMPTS[0], adapters=one, max_new_tokens=4).token_ids == expected.token_ids
    assert "".join(logo.stream(PROMPTS[0], adapters=other, max_new_tokens=4))
