"""Mixtures against PEFT and their own formula: as gates, and merged, where base weights are never written to."""

from __future__ import annotations

import copy
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import peft
import pytest
import torch
from hypothesis import Phase, given, settings
from hypothesis import strategies as st
from safetensors.torch import save_file
from torch import Tensor, nn

import tiny
from logo import AdapterPool, LoGo, SelectionSettings
from logo.adapters.layout import BaseLayout
from logo.mixing.cache import AdapterCache, Stack
from logo.mixing.gates import Gates, added
from logo.mixing.merge import mergeable
from logo.mixing.mixer import Mixer, Mixture
from test_engine import PROMPTS, engine, tokenizer, write_adapter
from tolerances import same_tensor

TARGETS = ["q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj"]


@st.composite
def lora_configs(draw: Any) -> peft.LoraConfig:
    """Any plain LoRA that PEFT can train on a small Llama."""
    targets = draw(st.lists(st.sampled_from(TARGETS), min_size=1, max_size=4, unique=True))
    # PEFT warns of keys that match nothing, and saves patterns sorted by key whatever order they were trained in.
    keys = st.sampled_from(sorted([*targets, r"layers\.1\..*", r"layers\.[02]\..*"]))
    return peft.LoraConfig(
        r=draw(st.integers(1, 6)),
        lora_alpha=draw(st.integers(1, 16)),
        use_rslora=draw(st.booleans()),
        target_modules=targets,
        rank_pattern=dict(sorted(draw(st.dictionaries(keys, st.integers(1, 5), max_size=2)).items())),
        alpha_pattern=dict(sorted(draw(st.dictionaries(keys, st.integers(1, 16), max_size=2)).items())),
        task_type="CAUSAL_LM",
    )


def peft_model(base: nn.Module, configs: list[peft.LoraConfig], seed: int) -> peft.PeftMixedModel:
    """All adapters on a copy of the base, with random B."""
    made = peft.PeftMixedModel(copy.deepcopy(base), configs[0], "a0")
    for i, config in enumerate(configs[1:], start=1):
        made.add_adapter(f"a{i}", config)
    generator = torch.Generator().manual_seed(seed)
    for name, parameter in made.named_parameters():
        if ".lora_" in name:
            parameter.data = torch.randn(parameter.shape, generator=generator) * 0.1
    return made.eval()


def save(model: peft.PeftMixedModel, folder: Path) -> AdapterPool:
    """Writes every adapter as PEFT does, and opens them."""
    for name, config in model.peft_config.items():
        state = peft.get_peft_model_state_dict(model, adapter_name=name, save_embedding_layers=False)
        path = folder / name
        path.mkdir(parents=True)
        save_file({k: v.contiguous() for k, v in state.items()}, path / "adapter_model.safetensors")
        config.save_pretrained(str(path))
    return AdapterPool.open(folder)


def peft_logits(model: peft.PeftMixedModel, weights: dict[str, float], ids: Tensor, mask: Tensor) -> Tensor:
    """PEFT's own forward with each adapter's scaling multiplied by its weight."""
    from peft.tuners.lora import LoraLayer

    model.set_adapter(list(weights))
    layers = [m for m in model.modules() if isinstance(m, LoraLayer)]
    saved = [dict(layer.scaling) for layer in layers]
    for layer in layers:
        layer.scaling = {k: s * weights.get(k, 0.0) for k, s in layer.scaling.items()}
    with torch.no_grad():
        logits: Tensor = model(input_ids=ids, attention_mask=mask).logits
    for layer, scaling in zip(layers, saved, strict=True):
        layer.scaling = scaling
    return logits


class Mixed:
    """A base model and a pool that is fitted to it."""

    def __init__(self, base: Any, pool: AdapterPool, merge: bool | None = False) -> None:
        self.base, self.pool = base, pool.fit(BaseLayout.of(base), model=base)
        self.mixer = Mixer(base, AdapterCache.of(base, BaseLayout.of(base), 1.0), merge)

    def logits(self, rows: Sequence[Mapping[str, float]], ids: Tensor, mask: Tensor | None = None) -> Tensor:
        """Of prompts, each under its own mixture, or all under one."""
        with torch.no_grad(), self.mixer.active(self.pool, [Mixture(row) for row in rows]):
            found: Tensor = self.base(input_ids=ids, attention_mask=mask).logits
        return found


@pytest.mark.slow
@settings(max_examples=40, phases=[Phase.explicit, Phase.reuse, Phase.generate])
@given(data=st.data(), configs=st.lists(lora_configs(), min_size=1, max_size=4), seed=st.integers(0, 1000))
def test_equals_peft(data: Any, configs: list[peft.LoraConfig], seed: int, tmp_path_factory: Any) -> None:
    """Any ranks, alphas, rsLoRA, patterns, targets and gates, a different mixture in every row."""
    base = tiny.model("llama")
    oracle = peft_model(base, configs, seed)
    pool = save(oracle, tmp_path_factory.mktemp("peft"))
    weights = st.floats(-0.5, 1, width=32)
    rows = data.draw(st.lists(st.fixed_dictionaries(dict.fromkeys(pool.names, weights)), min_size=1, max_size=3))
    ids, mask = tiny.padded(tiny.prompts([7, 5, 3][: len(rows)], seed))
    ours = Mixed(base, pool).logits(rows, ids, mask)
    for i, row in enumerate(rows):
        theirs = peft_logits(oracle, row, ids, mask)
        length = int(mask[i].sum())
        same_tensor(ours[i, :length], theirs[i, :length])


@pytest.mark.parametrize("name", list(tiny.CONFIGS))
def test_equals_peft_on_every_architecture(name: str, tmp_path: Path) -> None:
    base = tiny.model(name)
    config = peft.LoraConfig(
        r=3, lora_alpha=7, target_modules="all-linear", fan_in_fan_out=name == "gpt2", task_type="CAUSAL_LM"
    )
    oracle = peft_model(base, [config, config], seed=1)
    rows = [{"a0": 0.7, "a1": -0.2}, {"a1": 1.0}]
    ids, mask = tiny.padded(tiny.prompts([6, 6]))
    pool = save(oracle, tmp_path)
    with torch.no_grad():
        plain = base(input_ids=ids, attention_mask=mask).logits
    ours, merged = Mixed(base, pool).logits(rows, ids, mask), Mixed(base, pool, merge=True)
    for i, weights in enumerate(rows):
        theirs = peft_logits(oracle, weights, ids, mask)
        same_tensor(ours[i], theirs[i])
        same_tensor(merged.logits([weights], ids, mask), theirs)
        assert not torch.allclose(theirs, plain, atol=1e-4)
    with torch.no_grad():
        assert torch.equal(base(input_ids=ids, attention_mask=mask).logits, plain)


class Quantised(nn.Module):
    """A linear layer as quantisers make them: int8 weights, no `weight` in float, only sizes and a call."""

    def __init__(self, linear: nn.Linear) -> None:
        super().__init__()
        self.in_features, self.out_features = linear.in_features, linear.out_features
        self.scale = float(linear.weight.abs().max()) / 127
        self.register_buffer("packed", (linear.weight / self.scale).round().to(torch.int8))

    def forward(self, x: Tensor) -> Tensor:
        return x @ (self.packed.float() * self.scale).T


def test_a_row_without_a_mixture_beside_another_is_the_base_models_and_no_hook_stays(tmp_path: Path) -> None:
    base = tiny.model("llama")
    mixed = Mixed(base, pool_of(base, tmp_path, "all-linear"))
    ids, mask = tiny.padded(tiny.prompts([6, 4]))
    plain = base(input_ids=ids, attention_mask=mask).logits
    found = mixed.logits([{"a0": 1.0}, {}], ids, mask)
    assert not torch.allclose(plain[0], found[0])
    same_tensor(found[1], plain[1])
    assert torch.equal(plain, base(input_ids=ids, attention_mask=mask).logits)
    assert not any(module._forward_hooks or module._forward_pre_hooks for module in base.modules())


def low_rank(x: torch.Tensor, stack: Stack, gates: Gates, shape: tuple[int, ...] | None = None) -> torch.Tensor:
    """What the hook adds to an output of zeros, of this shape if it is an embedding's."""
    return added(stack, gates, nn.Identity(), (x,), torch.zeros(shape or (*x.shape[:-1], stack.B.shape[1])))


@pytest.mark.parametrize("tokens", [1, 20, 300])
def test_an_adapter_that_overflows_spoils_no_row_but_its_own(tokens: int) -> None:
    stack = Stack(torch.randn(2, 4), torch.randn(2, 3), torch.tensor([0, 1]))
    stack.A[1] = torch.finfo(torch.float32).max  # its response is not finite for most inputs
    x = torch.ones(2, tokens, 4)
    found = low_rank(x, stack, Gates(torch.tensor([[0.5, 0.0], [0.0, 1.0]])))
    same_tensor(found[0], (0.5 * x[0] @ stack.A[:1].T) @ stack.B[:1])
    assert not found[1].isfinite().any()


@pytest.mark.parametrize("per_token", [False, True])
def test_gates_that_do_not_fit_the_batch_are_refused(per_token: bool) -> None:
    stack = Stack(torch.randn(1, 4), torch.randn(1, 3), torch.tensor([0]))
    with pytest.raises(ValueError, match="cannot serve a batch of 5"):
        low_rank(torch.randn(5, 1, 4), stack, Gates(torch.ones(2, 1), per_token=per_token))


@settings(max_examples=80, deadline=None)
@given(data=st.data(), rows=st.integers(1, 5), copies=st.integers(1, 2), length=st.sampled_from([1, 3, 20, 90]))
def test_every_way_of_multiplying_is_the_formula(data: Any, rows: int, copies: int, length: int) -> None:
    """Few tokens and many, rows that share adapters and rows that have their own, whatever the shape of the input."""
    ranks = data.draw(st.lists(st.integers(1, 4), min_size=1, max_size=7))
    generator = torch.Generator().manual_seed(data.draw(st.integers(0, 99)))
    chosen = data.draw(st.lists(st.sets(st.integers(0, len(ranks) - 1), max_size=3), min_size=rows, max_size=rows))
    weights = torch.zeros(rows, len(ranks))
    for r, adapters in enumerate(chosen):
        weights[r, list(adapters)] = torch.rand(len(adapters), generator=generator) + 0.1
    total = sum(ranks)
    owner = torch.repeat_interleave(torch.arange(len(ranks)), torch.tensor(ranks))
    stack = Stack(torch.randn(total, 6, generator=generator), torch.randn(total, 5, generator=generator), owner)
    x = torch.randn(rows * copies, length, 6, generator=generator)
    gate = weights[:, owner].repeat_interleave(copies, dim=0)[:, None]
    expected = ((x @ stack.A.T) * gate) @ stack.B
    same_tensor(low_rank(x, stack, Gates(weights)), expected)
    per_token = Gates(weights.repeat_interleave(copies * length, dim=0), per_token=True)
    same_tensor(low_rank(x, stack, per_token), expected)
    flat = low_rank(x.view(-1, 6), stack, per_token)
    same_tensor(flat, expected.view(-1, 5))
    tokens = torch.randint(6, (rows * copies, length), generator=generator)
    of_tokens = ((stack.A.T[tokens]) * gate) @ stack.B
    same_tensor(low_rank(tokens, stack, Gates(weights), (*tokens.shape, 5)), of_tokens)
    one = Gates(weights[:1])
    expected = ((x @ stack.A.T) * weights[:1, owner]) @ stack.B
    same_tensor(low_rank(x, stack, one), expected)


# -- merged ------------------------------------------------------------------------------------------------------------


def pool_of(base: nn.Module, folder: Path, *targets: Any, **how: Any) -> AdapterPool:
    configs = [peft.LoraConfig(r=3, target_modules=some, task_type="CAUSAL_LM", **how) for some in targets]
    return save(peft_model(base, configs, seed=1), folder)


@pytest.mark.parametrize("merge", [True, False])
def test_base_weights_are_never_written_to(merge: bool, tmp_path: Path) -> None:
    base = tiny.model("llama")
    before = {name: (parameter, parameter.clone()) for name, parameter in base.named_parameters()}
    mixed = Mixed(base, pool_of(base, tmp_path, "all-linear"), merge=merge)
    with pytest.raises(KeyboardInterrupt), mixed.mixer.active(mixed.pool, [Mixture({"a0": 1.0})]) as form:
        assert form == ("merged" if merge else "gated")
        assert any(parameter is not before[name][0] for name, parameter in base.named_parameters()) == merge
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
    for merge, made in answers.items():
        assert {answer.form for answer in made} == {"merged" if merge else "gated"}
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
