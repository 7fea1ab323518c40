"""Columns that adapters get and give back: every token is what its own mixture makes of it, whoever came and went."""

from __future__ import annotations

from typing import Any

import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor, nn

from logo.adapters.format import LoraWeights
from logo.mixing.resident import Part, Resident, Share
from make_adapters import calm

WIDTH = 6
MODULES = ("one", "two", "three")


def adapter(number: int) -> dict[str, LoraWeights]:
    """Of a rank and on modules of its own; ranks may differ between modules."""
    generator = torch.Generator().manual_seed(number)
    touched = [name for i, name in enumerate(MODULES) if (number + 1) >> i & 1] or ["one"]
    weights = {}
    for place, name in enumerate(touched):
        rank = 1 + (number + place) % 3
        a, b = (torch.randn(shape, generator=generator) for shape in ((rank, WIDTH), (WIDTH + 1, rank)))
        weights[name] = LoraWeights(a, b, 0.5 + number)
    return weights


def term(mixture: dict[int, float], module: str, x: Tensor) -> Tensor:
    """`Σ w s B A x` of one token."""
    total = torch.zeros(WIDTH + 1)
    for number, weight in mixture.items():
        factors = adapter(number).get(module)
        if factors is not None:
            total = total + weight * factors.scaling * (factors.B @ (factors.A @ x))
    return total


MIXTURES = st.dictionaries(st.integers(0, 11), st.floats(-2, 2, width=16), max_size=4)
# A sequence joins with a mixture, or the n-th of those that are there leaves; then a step with so many tokens each.
EVENTS = st.lists(st.one_of(MIXTURES, st.integers(0, 5)), min_size=1, max_size=14)


@calm
@given(EVENTS, st.lists(st.integers(1, 5), min_size=1, max_size=6), st.integers(0, 100))
def test_every_token_gets_its_own_mixture_whoever_joins_and_leaves(
    events: list[Any], lengths: list[int], seed: int
) -> None:
    modules = {name: nn.Linear(WIDTH, WIDTH + 1) for name in MODULES}
    resident = Resident(modules, torch.float32)
    present: list[tuple[dict[int, float], Share]] = []
    generator = torch.Generator().manual_seed(seed)
    with resident.hooks():
        for event in events:
            if isinstance(event, dict):
                parts = [Part(number, adapter(number), weight) for number, weight in event.items()]
                present.append((event, resident.join(parts)))
            elif present:
                resident.leave(present.pop(event % len(present))[1])
            step = [(share, lengths[i % len(lengths)]) for i, (_, share) in enumerate(present)]
            mixed = resident.gate(step)
            assert mixed == any(weight for mixture, _ in present for weight in mixture.values())
            tokens = [mixture for (mixture, _), (_, count) in zip(present, step, strict=True) for _ in range(count)]
            if not tokens:
                continue
            x = torch.randn(1, len(tokens), WIDTH, generator=generator)
            for name, module in modules.items():
                base = nn.functional.linear(x, module.weight, module.bias)[0]
                want = torch.stack([b + term(m, name, row) for b, m, row in zip(base, tokens, x[0], strict=True)])
                torch.testing.assert_close(module(x)[0], want, rtol=1e-4, atol=1e-4)


def test_without_a_mixture_outputs_are_bit_equal_to_the_base_model() -> None:
    module = nn.Linear(WIDTH, WIDTH + 1)
    resident = Resident({"one": module}, torch.float32)
    x = torch.randn(1, 3, WIDTH)
    before = module(x)
    with resident.hooks():
        share = resident.join([Part(0, adapter(0), 1.0)])
        assert not resident.gate([])
        assert torch.equal(module(x), before)
        resident.gate([(share, 3)])
        assert not torch.equal(module(x), before)
    assert torch.equal(module(x), before)


def test_what_nobody_uses_does_not_pile_up() -> None:
    resident = Resident({name: nn.Linear(WIDTH, WIDTH + 1) for name in MODULES}, torch.float32)
    for number in range(2000):
        resident.leave(resident.join([Part(number, adapter(number % 12), 1.0)]))
    assert resident.adapters <= 257  # one column at least for each
    assert resident.columns <= 2 * 256


def test_an_adapter_of_another_key_is_another_adapter() -> None:
    """A name that is used again for other tensors must not find the old ones."""
    module = nn.Linear(WIDTH, WIDTH + 1)
    resident = Resident({"one": module}, torch.float32)
    x = torch.randn(1, 1, WIDTH)
    with resident.hooks():
        results = []
        for key, number in (("a", 0), ("b", 8)):
            resident.gate([(resident.join([Part(key, adapter(number), 1.0)]), 1)])
            results.append(module(x)[0, 0])
    for number, result in zip((0, 8), results, strict=True):
        want = nn.functional.linear(x, module.weight, module.bias)[0, 0] + term({number: 1.0}, "one", x[0, 0])
        torch.testing.assert_close(result, want, rtol=1e-4, atol=1e-4)
