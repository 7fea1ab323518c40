"""Folding: the same answers as gates, base weights untouched whatever happens, refused where it cannot be."""

from __future__ import annotations

import math
from pathlib import Path
from typing import Any

import peft
import pytest
import torch
from torch import nn

import tiny
from logo import AdapterPool, LoGo, SelectionSettings
from logo.adapters.layout import linear_modules
from logo.mixing import Folder, GatedLoRA, Work, costs
from logo.mixing.folding import foldable
from test_engine import PROMPTS, engine, tokenizer, write_adapter
from test_mixing import Quantised, peft_model, save, stacks_of
from tolerances import same_tensor


@pytest.mark.parametrize("name", list(tiny.CONFIGS))
def test_folded_equals_gated(name: str, tmp_path: Path) -> None:
    base = tiny.model(name)
    config = peft.LoraConfig(r=3, target_modules="all-linear", fan_in_fan_out=name == "gpt2", task_type="CAUSAL_LM")
    adapters = save(peft_model(base, [config, config], seed=1), tmp_path)
    stacks, modules = stacks_of(base, adapters), dict(linear_modules(base))
    weights = torch.tensor([0.7, -0.2])
    ids, mask = tiny.padded(tiny.prompts([6, 4]))
    with torch.no_grad():
        plain = base(input_ids=ids, attention_mask=mask).logits
        with GatedLoRA(modules).active(stacks, weights[None]):
            gated = base(input_ids=ids, attention_mask=mask).logits
        with Folder(modules).active("both", lambda: stacks, weights):
            folded = base(input_ids=ids, attention_mask=mask).logits
        after = base(input_ids=ids, attention_mask=mask).logits
    same_tensor(folded, gated)
    assert not torch.allclose(folded, plain, atol=1e-4)
    assert torch.equal(plain, after)


def test_base_weights_are_never_written_to(tmp_path: Path) -> None:
    base = tiny.model("llama")
    config = peft.LoraConfig(r=2, target_modules="all-linear", task_type="CAUSAL_LM")
    stacks = stacks_of(base, save(peft_model(base, [config], 0), tmp_path))
    before = {name: (parameter, parameter.clone()) for name, parameter in base.named_parameters()}
    folder = Folder(dict(linear_modules(base)))
    with pytest.raises(KeyboardInterrupt), folder.active("one", lambda: stacks, torch.ones(1)):
        assert any(parameter is not before[name][0] for name, parameter in base.named_parameters())
        raise KeyboardInterrupt
    for name, parameter in base.named_parameters():
        assert parameter is before[name][0] and torch.equal(parameter, before[name][1])


def test_one_mixture_after_another(tmp_path: Path) -> None:
    """Memory is used again, so that nothing of the mixture before may be left in it."""
    base = tiny.model("llama")
    both, one = ["q_proj", "v_proj"], ["q_proj"]
    configs = [peft.LoraConfig(r=2, target_modules=t, task_type="CAUSAL_LM") for t in (both, one)]
    first, second = save(peft_model(base, configs, 0), tmp_path)
    modules = dict(linear_modules(base))
    folder = Folder(modules)
    ids, mask = tiny.padded(tiny.prompts([6]))

    def logits(adapter: Any, weight: float, by: Folder) -> torch.Tensor:
        with torch.no_grad(), by.active(adapter.name, lambda: stacks_of(base, [adapter]), torch.tensor([weight])):
            found: torch.Tensor = base(input_ids=ids, attention_mask=mask).logits
            return found

    for adapter, weight in ((first, 1.0), (first, 0.3), (second, 1.0), (first, 1.0)):
        assert torch.equal(logits(adapter, weight, folder), logits(adapter, weight, Folder(modules)))


def test_what_cannot_be_folded_keeps_its_gates(tmp_path: Path) -> None:
    base = tiny.model("llama")
    for i in range(3):
        write_adapter(tmp_path / f"t{i}", base, ("q_proj", "v_proj"), rank=2, seed=i)
    for layer in base.model.layers:
        layer.self_attn.q_proj = Quantised(layer.self_attn.q_proj)
    pool, settings = AdapterPool.open(tmp_path), SelectionSettings("norm", k=2)
    asked, gated = (LoGo(base, tokenizer(), pool, settings=settings, fold=fold) for fold in (True, False))
    for prompt in PROMPTS:
        assert asked.generate(prompt, max_new_tokens=6).token_ids == gated.generate(prompt, max_new_tokens=6).token_ids
    assert not foldable(base.model.layers[0].self_attn.q_proj)
    assert foldable(base.model.layers[0].self_attn.v_proj)


def test_generation_is_the_same_folded(tmp_path: Path, llama: nn.Module, adapters: Path) -> None:
    pool, settings = AdapterPool.open(adapters), SelectionSettings("norm", k=3)
    folded, gated = (LoGo(llama, tokenizer(), pool, settings=settings, fold=fold) for fold in (True, False))
    for prompt in PROMPTS:
        one, other = folded.generate(prompt, max_new_tokens=12), gated.generate(prompt, max_new_tokens=12)
        assert one.token_ids == other.token_ids
        assert "".join(folded.stream(prompt, max_new_tokens=12)) == one.text
    assert folded.generate(PROMPTS, max_new_tokens=6)  # different mixtures in one batch: gates


def test_folding_pays_for_long_answers_and_not_for_short_ones(llama: nn.Module, adapters: Path) -> None:
    logo = engine(llama, adapters)
    modules = dict(linear_modules(llama))
    stacks = stacks_of(llama, [logo.pool[name] for name in logo.names[:3]])
    ranks = {path: len(stack.A) for path, stack in stacks.items()}
    fold = sum(len(s.A) * s.A.shape[1] * s.B.shape[1] for s in stacks.values())
    gates = sum(len(s.A) * (s.A.shape[1] + s.B.shape[1]) for s in stacks.values())
    passes = fold / gates  # multiplications by the factors, for as many tokens, that folding takes
    read = costs.KINDS["cpu"].fold_read

    def pays(**work: float) -> bool:
        return costs.folding_pays(ranks, modules, Work(**work))  # type: ignore[arg-type]

    steps = (passes - 4 - read) / (1 + read)
    assert not pays(prompt=4, rows=1, steps=steps - 0.01) and pays(prompt=4, rows=1, steps=steps + 0.01)
    assert pays(prompt=math.ceil(passes), rows=1, steps=0)  # reading the prompt alone is worth it
    steps = (passes - 4 - read) / (8 + read)
    assert not pays(prompt=4, rows=8, steps=steps - 0.01) and pays(prompt=4, rows=8, steps=steps + 0.01)


@pytest.mark.slow
def test_nothing_folds_by_itself_in_half_precision(adapters: Path) -> None:
    """`W + ΔW` would be rounded to the weights' dtype, and other tokens might follow."""
    base = tiny.model("llama").to(torch.bfloat16)
    engines = {fold: engine(base, adapters, fold=fold) for fold in (None, False, True)}
    answers = {fold: [made.generate(p, max_new_tokens=60) for p in PROMPTS] for fold, made in engines.items()}
    assert {fold: {a.form for a in made} for fold, made in answers.items()} == {
        None: {"gated"},
        False: {"gated"},
        True: {"folded"},
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
        for length in (2, 8, 64):  # some of which fold in float32, and some of which do not
            found += logo.generate(asked, max_new_tokens=length, batch_size=1)
        found += logo.generate(asked, max_new_tokens=8, batch_size=4)
        return [(answer.form, answer.token_ids) for answer in found]

    short, long = {"max_new_tokens": 40, "eos_token_id": list(range(96))}, {"max_new_tokens": 90}
    fresh = answered([])
    assert answered([short] * 3) == answered([long, {**short, "batch_size": 2}]) == fresh
    assert {form for form, _ in fresh} == {"folded", "gated"}


def test_every_answer_says_how_its_mixture_acted(llama: nn.Module, adapters: Path) -> None:
    logo = engine(llama, adapters)
    assert logo.generate(PROMPTS[0], adapters={}, max_new_tokens=2).form == "base"
    assert {answer.form for answer in logo.generate(PROMPTS, max_new_tokens=60)} == {"gated"}  # of one batch
