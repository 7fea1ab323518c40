"""Routing: Arrow against PEFT's implementation, all kinds against their formulas, and as ways to combine adapters."""

from __future__ import annotations

import copy
from dataclasses import replace
from pathlib import Path
from typing import Any

import peft
import pytest
import torch
from hypothesis import given
from hypothesis import settings as budget
from hypothesis import strategies as st
from torch import Tensor, nn

import tiny
from logo import AdapterPool, LoGo, SelectionSettings
from logo.mixing import Merge, Stack
from logo.mixing.routing import Experts, Moments, Routing, direction, reduced, routed
from test_engine import PROMPTS, engine, hooks, tokenizer, write_adapter
from tolerances import SCORES, same_scores, same_tensor

ALL = ("q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj")


@st.composite
def stacks(draw: Any) -> Stack:
    """A few adapters of any ranks on one module; not every adapter of the working set is on it."""
    ranks = draw(st.dictionaries(st.integers(0, 5), st.integers(1, 4), min_size=1, max_size=4))
    random = torch.Generator().manual_seed(draw(st.integers(0, 999)))
    owner = torch.tensor([i for i, rank in sorted(ranks.items()) for _ in range(rank)])
    return Stack(torch.randn(len(owner), 7, generator=random), torch.randn(len(owner), 5, generator=random), owner)


def by_hand(x: Tensor, stack: Stack, routing: Routing, allowed: set[int], moments: Moments | None) -> Tensor:
    """One token (d_in,), the long way: ΔW in full, its singular value decomposition, a dictionary of coefficients."""
    deltas = {int(i): stack.B[stack.owner == i].T @ stack.A[stack.owner == i] for i in stack.owner.unique()}
    similarity: dict[int, float] = {}
    for place, (i, delta) in enumerate(deltas.items()):
        _, values, right = torch.linalg.svd(delta.double(), full_matrices=False)
        if routing.kind == "arrow":
            similarity[i] = abs(float(x.double() @ right[0]))
        else:  # SpectR's own formula: the singular values times the right singular vectors
            similarity[i] = float((values * (right @ x.double())).norm())
        if moments is not None:
            similarity[i] = (similarity[i] - float(moments.mean[place])) / float(moments.deviation[place])
    best = sorted((i for i in similarity if i in allowed), key=lambda i: -similarity[i])[: routing.top_k]
    if not best:
        return torch.zeros(5)
    shares = (torch.tensor([similarity[i] for i in best]) / routing.temperature).softmax(0)
    return torch.stack([c * deltas[i] @ x for c, i in zip(shares, best, strict=True)]).sum(dim=0)


@budget(deadline=None)
@given(
    stacks(),
    st.sampled_from(["arrow", "spectr", "seqr"]),
    st.integers(1, 6),
    st.sampled_from([0.3, 1.0, 4.0]),
    st.lists(st.sets(st.integers(0, 5)), min_size=1, max_size=3),
    st.integers(1, 2),
)
def test_every_token_is_routed_as_the_formula_says(
    stack: Stack, kind: Any, top_k: int, temperature: float, rows: list[set[int]], copies: int
) -> None:
    routing = Routing(top_k, temperature, kind)
    experts, moments = Experts.made(stack, kind), None
    if kind == "seqr":
        random = torch.Generator().manual_seed(copies)
        moments = Moments(*(torch.rand(2, len(experts), generator=random) + 0.5))
        experts = replace(experts, moments=moments)
    allowed = torch.tensor([[i in row for i in range(6)] for row in rows])
    x = torch.randn(len(rows) * copies, 3, 7, generator=torch.Generator().manual_seed(top_k))
    found = routed(x, stack, experts, routing, allowed)
    for r, row in enumerate(x):
        for t, token in enumerate(row):
            expected = by_hand(token, stack, routing, rows[r // copies], moments)
            torch.testing.assert_close(found[r, t], expected, rtol=1e-3, atol=1e-4)
    flat = routed(x.reshape(-1, 7), stack, experts, routing, allowed)  # OPT's MLP flattens its batch
    same_tensor(flat.view_as(found), found)
    free = routed(x, stack, experts, routing)
    everyone = routed(x, stack, experts, routing, torch.ones(1, 6, dtype=torch.bool))
    same_tensor(free, everyone)


@budget(deadline=None)
@given(rank=st.integers(1, 6), inside=st.integers(2, 9), out=st.integers(2, 9), seed=st.integers(0, 999))
def test_reduced_factors_are_as_long_as_what_they_stand_for(rank: int, inside: int, out: int, seed: int) -> None:
    random = torch.Generator().manual_seed(seed)
    a, b = torch.randn(rank, inside, generator=random), torch.randn(out, rank, generator=random)
    x = torch.randn(inside, generator=random)
    found = reduced(a, b)
    assert found.shape == (min(rank, out), inside)
    assert float((found @ x).norm()) == same_scores(float((b @ (a @ x)).norm()))


@budget(deadline=None)
@given(rank=st.integers(1, 6), inside=st.integers(2, 9), out=st.integers(2, 9), seed=st.integers(0, 999))
def test_directions_are_first_right_singular_vectors(rank: int, inside: int, out: int, seed: int) -> None:
    random = torch.Generator().manual_seed(seed)
    a, b = torch.randn(rank, inside, generator=random), torch.randn(out, rank, generator=random)
    found = direction(a, b)
    values = torch.linalg.svdvals(b.double() @ a.double())
    assert float(found.norm()) == same_scores(1)
    assert float((b @ a @ found).norm()) == same_scores(float(values[0]))


def test_an_adapter_of_zeros_has_no_direction() -> None:
    assert torch.equal(direction(torch.ones(2, 4), torch.zeros(3, 2)), torch.zeros(4))


def test_rows_that_do_not_fit_the_batch_are_refused() -> None:
    stack = Stack(torch.randn(2, 4), torch.randn(2, 3), torch.tensor([0, 1]))
    allowed = torch.ones(2, 2, dtype=torch.bool)
    with pytest.raises(ValueError, match="routes for 2 rows cannot serve a batch of 5 rows"):
        routed(torch.randn(5, 1, 4), stack, Experts.made(stack), Routing(), allowed)


@pytest.mark.parametrize("kind", ["arrow", "spectr"])
def test_an_adapter_that_overflows_is_no_affair_of_tokens_that_do_not_use_it(kind: Any) -> None:
    random = torch.Generator().manual_seed(1)
    owner = torch.tensor([0, 0, 1])
    stack = Stack(torch.randn(3, 4, generator=random), torch.randn(3, 5, generator=random), owner)
    experts, x = Experts.made(stack, kind), torch.randn(2, 3, 4, generator=random)
    allowed = torch.tensor([[True, False], [True, False]])
    huge = replace(stack, A=torch.where(owner[:, None] == 1, torch.inf, stack.A))
    same_tensor(
        routed(x, huge, experts, Routing(2, 1.0, kind), allowed),
        routed(x, stack, experts, Routing(2, 1.0, kind), allowed),
    )


# -- against PEFT -----------------------------------------------------------------------------------------------


def trained(folder: Path, model: nn.Module, count: int, gap: float) -> list[str]:
    """Adapters of rank 3 on every linear module as PEFT saves them, each singular value `gap` times the one before."""
    config = peft.LoraConfig(r=3, lora_alpha=5, target_modules=list(ALL), task_type="CAUSAL_LM")
    made = peft.get_peft_model(copy.deepcopy(model), config, "t0")
    for i in range(1, count):
        made.add_adapter(f"t{i}", config)
    random = torch.Generator().manual_seed(count)
    for name, parameter in made.named_parameters():
        if ".lora_" in name:
            columns = parameter if "lora_B" in name else parameter.T
            values = torch.linalg.qr(torch.randn(columns.shape, generator=random))[0]
            columns.data.copy_(values * torch.tensor([1.0, gap, gap**2]) ** 0.5)
    made.save_pretrained(str(folder))
    return [str(folder / f"t{i}") for i in range(count)]


def peft_arrow(model: nn.Module, folders: list[str], top_k: int, temperature: float) -> nn.Module:
    config = peft.ArrowConfig(top_k=top_k, router_temperature=temperature, rng_seed=0)
    return peft.create_arrow_model(copy.deepcopy(model), folders, config).eval()


@pytest.mark.parametrize("gap", [0.5, 0.95])
@pytest.mark.parametrize(("top_k", "temperature"), [(1, 1.0), (2, 0.5), (3, 1.0), (4, 3.0)])
def test_equals_peft(top_k: int, temperature: float, gap: float, tmp_path: Path) -> None:
    """To rounding, where PEFT's fifteen steps of power iteration find the directions, or where it is given them."""
    model = tiny.model("llama")
    folders = trained(tmp_path, model, 4, gap)
    oracle = peft_arrow(model, folders, top_k, temperature)
    merge = Merge("arrow", arrow_top_k=top_k, arrow_temperature=temperature)
    settings = SelectionSettings("norm", k=1)
    logo = LoGo(model, tokenizer(), AdapterPool.from_directory(tmp_path), settings=settings, merge=merge)
    ids, mask = tiny.padded(tiny.prompts([7, 5, 3]))
    real = mask.bool()
    with torch.no_grad():
        theirs = oracle(input_ids=ids, attention_mask=mask).logits[real]
        with logo._mixer.active(logo._fitted, [dict.fromkeys(logo.names, 0.25)]):
            ours = model(input_ids=ids, attention_mask=mask).logits[real]
            for path, experts in logo._mixer._router._held[2].items():
                [router] = oracle.get_base_model().get_submodule(path).lora_arrow.values()
                router.prototypes.copy_(experts.factors)
            converged = oracle(input_ids=ids, attention_mask=mask).logits[real]
        plain = model(input_ids=ids, attention_mask=mask).logits[real]
    unit = float(theirs.abs().max())
    assert float((plain - theirs).abs().max()) > 0.05 * unit  # the adapters do something
    if gap == 0.5:  # (σ₂/σ₁)³⁰ is nothing; at 0.95 it is a fifth, and PEFT routes some tokens elsewhere
        difference = float((ours - theirs).abs().max())
        assert difference <= SCORES * unit, f"maximal difference {difference:.2e} of {unit:.2f}"
    difference = float((ours - converged).abs().max())
    assert difference <= SCORES * unit, f"given the directions: maximal difference {difference:.2e} of {unit:.2f}"


@pytest.fixture(autouse=True)
def neutral(monkeypatch: pytest.MonkeyPatch) -> tuple[str, ...]:
    """Neutral texts in the tiny model's words: of ours it knows none, and all its hidden vectors would be one."""
    texts = tuple(" ".join(f"w{3 + (7 * i + 5 * i * j + j) % 80}" for j in range(6)) for i in range(12))
    monkeypatch.setattr("logo.engine.NEUTRAL", texts)
    return texts


# -- in the engine ----------------------------------------------------------------------------------------------


@pytest.mark.parametrize("kind", ["arrow", "spectr", "seqr"])
def test_a_batch_equals_one_by_one(kind: str, llama: nn.Module, adapters: Path) -> None:
    """Rows that may use other adapters than their neighbours, and one that may use none."""
    logo = engine(llama, adapters)
    logo.merge = Merge(kind, arrow_top_k=2)
    names = logo.names
    mixes = [dict.fromkeys(names, 1.0), {names[1]: 0.5}, {}, {names[0]: 1.0, names[3]: 2.0}, {names[2]: 0.0}]
    before, there = llama(input_ids=torch.tensor([[5, 6, 7]])).logits, hooks(llama)
    batched = logo.generate(PROMPTS, adapters=mixes, max_new_tokens=8, batch_size=5)
    for prompt, mix, answer in zip(PROMPTS, mixes, batched, strict=True):
        assert logo.generate(prompt, adapters=mix, max_new_tokens=8).token_ids == answer.token_ids
    base = [logo.generate(prompt, adapters={}, max_new_tokens=8).token_ids for prompt in PROMPTS]
    assert [batched[i].token_ids == base[i] for i in range(5)][2::2] == [True, True]
    assert batched[0].token_ids != base[0]
    assert torch.equal(before, llama(input_ids=torch.tensor([[5, 6, 7]])).logits)
    assert hooks(llama) == there


@pytest.mark.parametrize("kind", ["arrow", "spectr", "seqr"])
def test_one_adapter_is_itself(kind: str, llama: nn.Module, adapters: Path) -> None:
    """Whatever its weight: a softmax over one is 1. Never folded, though all rows share it."""
    logo = engine(llama, adapters)
    logo._mixer._fold = True
    name = logo.names[0]
    exact = logo.score(PROMPTS[0], "w50", [{name: 1.0}])[0].nll
    logo.merge = kind
    assert logo.score(PROMPTS[0], "w50", [{name: 0.3}])[0].nll == same_scores(exact)


def test_seqr_knows_what_is_usual_from_neutral_text(llama: nn.Module, adapters: Path, neutral: tuple[str, ...]) -> None:
    """Mean and deviation of `‖ΔW_i h‖` over the tokens of the neutral texts, each adapter by itself, whoever else is
    there; without the first tokens."""
    logo = engine(llama, adapters)
    logo.merge = "seqr"
    inputs: dict[str, list[Tensor]] = {}
    logo.score(PROMPTS[0], "w50", [dict.fromkeys(logo.names, 1.0)])
    found = logo._mixer._router._held[2]
    paths = {path: llama.get_submodule(path) for path in found}
    with torch.no_grad():
        for row in logo.prompts.texts(neutral):
            hooked = [
                module.register_forward_pre_hook(
                    lambda module, args, path=path: inputs.setdefault(path, []).append(args[0][0, 1:])
                )
                for path, module in paths.items()
            ]
            llama(input_ids=torch.tensor([row]))
            for hook in hooked:
                hook.remove()
    for path, experts in found.items():
        x = torch.cat(inputs[path])
        for place, member in enumerate(experts.members.tolist()):
            delta = logo.fitted[logo.names[member]].read()[path]
            norms = (x @ delta.A.float().T @ delta.scaled_b().T).norm(dim=-1)
            assert float(experts.moments.mean[place]) == same_scores(float(norms.mean()))
            assert float(experts.moments.deviation[place]) == same_scores(float(norms.std(correction=0)))
    one = logo.names[1]
    both = {path: experts.moments.mean for path, experts in found.items()}
    logo.score(PROMPTS[0], "w50", [{one: 1.0}])
    for path, experts in logo._mixer._router._held[2].items():
        [place] = (found[path].members == 1).nonzero()[0].tolist()
        assert float(experts.moments.mean[0]) == float(both[path][place])  # known, and not measured again


@pytest.mark.parametrize("kind", ["spectr", "seqr"])
def test_an_untrained_adapter_never_wins(kind: str, llama: nn.Module, tmp_path: Path) -> None:
    """B is zero: whatever the token, it goes to the adapter that does something."""
    for name, scale in (("idle", 0.0), ("busy", 0.4)):
        write_adapter(tmp_path / name, llama, ("q_proj", "v_proj"), rank=2, seed=1, scale=scale)
    logo = engine(llama, tmp_path, k=1)
    logo.merge = Merge(kind, arrow_top_k=1)
    both, busy = ([logo.score(PROMPTS[0], "w50", [mix])[0].nll] for mix in ({"idle": 1.0, "busy": 1.0}, {"busy": 1.0}))
    assert both == same_scores(busy)
    assert logo.score(PROMPTS[0], "w50", [{}])[0].nll != same_scores(busy[0])
    assert logo.score(PROMPTS[0], "w50", [{"idle": 1.0}])[0].nll == same_scores(
        logo.score(PROMPTS[0], "w50", [{}])[0].nll
    )


def test_beams_and_a_pool_that_changes(llama: nn.Module, adapters: Path, tmp_path: Path) -> None:
    logo = engine(llama, adapters)
    logo.merge = "arrow"
    pools = [dict.fromkeys(logo.names, 1.0), {logo.names[1]: 1.0}]
    beams = {"max_new_tokens": 6, "num_beams": 3}
    both = logo.generate(PROMPTS[:2], adapters=pools, batch_size=2, **beams)
    alone = [logo.generate(p, adapters=a, **beams) for p, a in zip(PROMPTS[:2], pools, strict=True)]
    assert [answer.token_ids for answer in both] == [answer.token_ids for answer in alone]
    write_adapter(tmp_path / "late", llama, ("q_proj",), rank=2, seed=9, scale=1.0)
    before = logo.score(PROMPTS[0], "w50", [dict.fromkeys(logo.names, 1.0)])
    logo.pool.add(tmp_path / "late")
    assert "late" in logo.names
    assert logo.score(PROMPTS[0], "w50", [dict.fromkeys(logo.names, 1.0)]) != before
