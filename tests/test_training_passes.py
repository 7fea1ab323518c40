"""Passes: every row once, within limits, cheap; and losses and gradients that do not depend on how rows are cut."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from itertools import chain, pairwise

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from logo.training.factors import Bank
from torch import Tensor, nn

import tiny
from learning import ATTENTION, CPU, examples, factors
from logo.training.examples import Example
from logo.training.passes import Limits, Owned, checkpointing, cut, laid_out, logits_at, losses
from logo.training.recipe import Recipe
from tolerances import same_tensor

rows = st.lists(
    st.builds(
        lambda owner, prompt, completion: Owned(owner, Example((3,) * (prompt + completion), prompt)),
        st.integers(0, 3),
        st.integers(1, 40),
        st.integers(1, 8),
    ),
    max_size=24,
)
limits = st.builds(Limits, st.integers(1, 200), st.integers(1, 40), st.integers(0, 300))


def cost(passes: Sequence[Sequence[Owned]], limits: Limits) -> int:
    """As `Limits` has it: tokens with padding, and something for each pass."""
    return sum(limits.per_pass + len(part) * max(len(row.example) for row in part) for part in passes)


def allowed(part: Sequence[Owned], limits: Limits) -> bool:
    tokens = len(part) * max(len(row.example) for row in part)
    return tokens <= limits.tokens and sum(row.example.completion for row in part) <= limits.positions


def greedy(rows: Sequence[Owned], limits: Limits) -> list[list[Owned]]:
    """As many rows into each pass as may be, the longest first."""
    passes: list[list[Owned]] = []
    for row in sorted(rows, key=lambda one: -len(one.example)):
        if passes and allowed([*passes[-1], row], limits):
            passes[-1].append(row)
        else:
            passes.append([row])
    return passes


@given(rows=rows, limits=limits)
def test_every_row_is_in_one_pass_within_limits_and_cheaply(rows: list[Owned], limits: Limits) -> None:
    found = cut(rows, limits)
    assert sorted(map(id, chain.from_iterable(found))) == sorted(map(id, rows))
    assert all(part and (len(part) == 1 or allowed(part, limits)) for part in found)
    assert cost(found, limits) <= cost(greedy(rows, limits), limits)


@settings(max_examples=40)
@given(rows=st.lists(rows.filter(bool).map(lambda some: some[0]), min_size=1, max_size=7), limits=limits)
def test_no_way_of_cutting_the_sorted_rows_is_cheaper(rows: list[Owned], limits: Limits) -> None:
    ordered = sorted(rows, key=lambda one: -len(one.example))
    ways = []
    for bits in range(2 ** (len(ordered) - 1)):
        bounds = [0, *(place + 1 for place in range(len(ordered) - 1) if bits >> place & 1), len(ordered)]
        parts = [ordered[start:stop] for start, stop in pairwise(bounds)]
        if all(len(part) == 1 or allowed(part, limits) for part in parts):
            ways.append(cost(parts, limits))
    assert cost(cut(rows, limits), limits) == min(ways)


def test_limits_follow_from_the_vocabulary_and_the_device() -> None:
    assert Limits.of(100, 262_144, CPU).positions * 262_144 * 4 <= 2**30 // 2
    assert Limits.of(100, 10**12, CPU).positions == 1
    assert Limits.of(100, 50, CPU).per_pass < Limits.of(100, 50, torch.device("cuda")).per_pass


# -- what is computed in a pass ---------------------------------------------------------------------------------------


KINDS = ("llama", "gpt2", "qwen2")
RECIPES = [Recipe(r=2, alpha=4), Recipe(r=3, alpha=9, rslora=True), Recipe(r=1, alpha=2)]


def bank_of(kind: str, dtype: torch.dtype = torch.float32) -> tuple[Bank, list[nn.Parameter]]:
    """Three adapters whose B is not zero, of other ranks and targets."""
    targets = [ATTENTION[kind], ("all-linear",), ATTENTION[kind][:1]]
    made = []
    for number, recipe in enumerate(RECIPES):
        one = factors(kind, Recipe(r=recipe.r, targets=targets[number], seed=number), str(number))
        generator = torch.Generator().manual_seed(number)
        for B in one.B.values():
            B.data.normal_(0, 0.3, generator=generator)
        for parameter in one.parameters:
            parameter.data = parameter.data.to(dtype)
        made.append(one)
    return Bank(made), [parameter for one in made for parameter in one.parameters]


def owned(count: int, seed: int) -> list[Owned]:
    return [Owned(number % 3, example) for number, example in enumerate(examples(count, seed, longest=20))]


def total(
    model: nn.Module, bank: Bank, parameters: Sequence[nn.Parameter], parts: Sequence[Sequence[Owned]]
) -> tuple[dict[int, list[float]], list[Tensor]]:
    """The losses of every row in these passes, by the row, and the gradients of their weighted sum."""
    scales = [recipe.scaling for recipe in RECIPES]
    bank.clear()
    found: dict[int, list[float]] = {}
    for part in parts:
        read = laid_out(part, scales, 2, CPU)
        values = losses(model, bank, read, (read.owners + 1.0) / 7)
        sizes = [row.example.completion for row in part]
        for row, some in zip(part, values.split(sizes), strict=True):
            found[id(row)] = some.tolist()
    bank.collect()
    return found, [parameter.grad.clone() for parameter in parameters if parameter.grad is not None]


def flat(found: Mapping[int, list[float]], rows: Sequence[Owned]) -> Tensor:
    """The losses of these rows, one behind the other."""
    return torch.tensor([loss for row in rows for loss in found[id(row)]])


@pytest.mark.parametrize("kind", KINDS)
@settings(max_examples=4)
@given(seed=st.integers(0, 99), tokens=st.integers(1, 120))
def test_losses_and_gradients_do_not_depend_on_how_rows_are_cut(kind: str, seed: int, tokens: int) -> None:
    """In float64, since a layer may make rounding a hundred times larger."""
    model = tiny.model(kind).double()
    bank, parameters = bank_of(kind, torch.float64)
    some = owned(9, seed)
    whole = total(model, bank, parameters, [some])
    for parts in (cut(some, Limits(tokens, 10**6, 0)), [[row] for row in some]):
        losses_, gradients = total(model, bank, parameters, parts)
        for row, values in whole[0].items():
            same_tensor(torch.tensor(losses_[row]), torch.tensor(values))
        for found, expected in zip(gradients, whole[1], strict=True):
            torch.testing.assert_close(found, expected, rtol=1e-4, atol=1e-5 * float(expected.abs().max()))


@pytest.mark.parametrize("kind", KINDS)
def test_a_row_has_the_loss_that_its_adapter_gives_it_folded_into_the_weights(kind: str) -> None:
    """Against a model whose weights are changed by `s B A`, and logits of whole rows."""
    bank, parameters = bank_of(kind)
    some = owned(6, 5)
    found, _ = total(tiny.model(kind), bank, parameters, [some])
    for owner in range(3):
        folded = tiny.model(kind)
        for path, stack in bank.stacks.items():
            own = stack.owner == owner
            delta = RECIPES[owner].scaling * stack.B[own].T.detach() @ stack.A[own].detach()  # (d_out, d_in)
            weight = folded.get_submodule(path).weight
            weight.data += delta.T if kind == "gpt2" else delta
        for row in (row for row in some if row.owner == owner):
            ids = torch.tensor([row.example.ids])
            logits = folded(input_ids=ids).logits[0, row.example.prompt - 1 : -1]
            expected = nn.functional.cross_entropy(logits, ids[0, row.example.prompt :], reduction="none")
            same_tensor(torch.tensor(found[id(row)]), expected)


@pytest.mark.parametrize("kind", KINDS)
def test_logits_at_some_positions_are_those_of_whole_rows(kind: str) -> None:
    model = tiny.model(kind)
    ids, mask = tiny.padded(tiny.prompts([5, 9, 2], seed=1))
    whole = model(input_ids=ids, attention_mask=mask).logits.reshape(-1, 96)
    positions = torch.tensor([0, 4, 9, 17, 18])
    with logits_at(model, positions):
        same_tensor(model(input_ids=ids, attention_mask=mask).logits, whole[positions])
    assert model(input_ids=ids, attention_mask=mask).logits.shape == (3, 9, 96)  # afterwards as before


@pytest.mark.parametrize("kind", KINDS)
def test_activations_that_are_computed_again_give_the_same_gradients(kind: str) -> None:
    model = tiny.model(kind)
    calls = 0

    def count(module: nn.Module, inputs: object) -> None:
        nonlocal calls
        calls += 1

    bank, parameters = bank_of(kind)
    model.get_submodule(next(iter(bank.stacks))).register_forward_pre_hook(count)
    kept = total(model, bank, parameters, [owned(6, 2)])
    assert calls == 1
    with checkpointing(model, True):
        again = total(model, bank, parameters, [owned(6, 2)])
    assert calls == 3  # once more in the backward pass
    assert not any(module.training for module in model.modules()) and not model.is_gradient_checkpointing
    assert list(again[0].values()) == list(kept[0].values())
    for found, expected in zip(again[1], kept[1], strict=True):
        assert float((found - expected).norm()) < 1e-5 * float(expected.norm())


def test_no_gradient_reaches_the_base_model_and_none_another_adapter(llama: nn.Module) -> None:
    before = {name: parameter.clone() for name, parameter in llama.named_parameters()}
    bank, parameters = bank_of("llama")
    total(llama, bank, parameters, [[row for row in owned(9, 4) if row.owner == 1]])
    assert all(parameter.grad is None and not parameter.requires_grad for parameter in llama.parameters())
    assert all(torch.equal(parameter, before[name]) for name, parameter in llama.named_parameters())
    for stack in bank.stacks.values():
        assert stack.A.grad is not None and stack.B.grad is not None
        assert not stack.A.grad[stack.owner != 1].any() and not stack.B.grad[stack.owner != 1].any()
        assert stack.A.grad[stack.owner == 1].any() or not (stack.owner == 1).any()


def test_a_loss_that_is_not_finite_leaves_no_gradient(llama: nn.Module) -> None:
    bank, _ = bank_of("llama")
    next(iter(bank.stacks.values())).A.data[0] = math.inf
    read = laid_out(owned(3, 0), [recipe.scaling for recipe in RECIPES], 2, CPU)
    found = losses(llama, bank, read, torch.ones(len(read.targets)))
    assert not found[read.owners == 0].isfinite().any() and found[read.owners != 0].isfinite().all()
    assert all(stack.A.grad is None for stack in bank.stacks.values())
