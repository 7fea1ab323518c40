"""Columns that adapters get and give back: every token is what its own mixture makes of it, whoever came and went."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, invariant, precondition, rule
from torch import Tensor, nn
from torch.overrides import TorchFunctionMode

from logo.adapters.format import LoraWeights
from logo.errors import NotFinite
from logo.mixing.resident import Part, Resident, Share
from make_adapters import calm
from tolerances import same_tensor

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
            step = [(share, lengths[i % len(lengths)], True) for i, (_, share) in enumerate(present)]
            mixed = resident.gate(step)
            assert mixed == any(weight for mixture, _ in present for weight in mixture.values())
            tokens = [mixture for (mixture, _), (_, count, _) in zip(present, step, strict=True) for _ in range(count)]
            if not tokens:
                continue
            x = torch.randn(1, len(tokens), WIDTH, generator=generator)
            for name, module in modules.items():
                base = nn.functional.linear(x, module.weight, module.bias)[0]
                want = torch.stack([b + term(m, name, row) for b, m, row in zip(base, tokens, x[0], strict=True)])
                same_tensor(module(x)[0], want)


def test_without_a_mixture_outputs_are_bit_equal_to_the_base_model() -> None:
    module = nn.Linear(WIDTH, WIDTH + 1)
    resident = Resident({"one": module}, torch.float32)
    x = torch.randn(1, 3, WIDTH)
    before = module(x)
    with resident.hooks():
        share = resident.join([Part(0, adapter(0), 1.0)])
        assert not resident.gate([])
        assert torch.equal(module(x), before)
        resident.gate([(share, 3, True)])
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
            resident.gate([(resident.join([Part(key, adapter(number), 1.0)]), 1, True)])
            results.append(module(x)[0, 0])
    for number, result in zip((0, 8), results, strict=True):
        want = nn.functional.linear(x, module.weight, module.bias)[0, 0] + term({number: 1.0}, "one", x[0, 0])
        same_tensor(result, want)


def test_what_the_dtype_cannot_hold_is_refused_and_nothing_has_changed() -> None:
    """0 times infinity is NaN, so no gate would keep it from the tokens of others."""
    resident = Resident({name: nn.Linear(WIDTH, WIDTH + 1) for name in MODULES}, torch.float16)
    resident.join([Part(0, adapter(0), 1.0)])
    before = books(resident)
    large = {"one": LoraWeights(torch.ones(2, WIDTH), torch.full((WIDTH + 1, 2), 7e4), 1.0)}
    with pytest.raises(NotFinite, match=r"one.*float16.*--dtype"):
        resident.join([Part(1, adapter(1), 1.0), Part(2, large, 1.0)])
    assert books(resident) == before


def books(resident: Resident) -> Any:
    """Everything that a join changes, but for what stands in columns that nobody has."""
    held = {key: (list(own.columns), own.users) for key, own in resident._held.items()}
    used = sorted(column for columns, _ in held.values() for column in columns)
    written = {path: (A.shape, A[used].tolist(), B[used].tolist()) for path, (A, B) in resident._stacks.items()}
    return held, list(resident._idle), sorted(resident._free), resident._capacity, written


class Failing(TorchFunctionMode):
    """Out of memory at the n-th thing that torch is asked for inside the block; never, if there are fewer."""

    def __init__(self, at: int) -> None:
        super().__init__()
        self.left = at

    def __torch_function__(self, function: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        self.left -= 1
        if not self.left:
            raise torch.OutOfMemoryError(f"no room for {function.__name__}")
        return function(*args, **(kwargs or {}))


class Trouble(RuleBasedStateMachine):
    """Sequences come and go while memory runs out at any place."""

    def __init__(self) -> None:
        super().__init__()
        self.modules = {name: nn.Linear(WIDTH, WIDTH + 1).requires_grad_(False) for name in MODULES}
        self.resident = Resident(self.modules, torch.float32, head="three")
        self.present: list[tuple[dict[int, float], Share]] = []

    @rule(mixture=MIXTURES, at=st.integers(1, 150))
    def join(self, mixture: dict[int, float], at: int) -> None:
        parts = [Part(number, adapter(number), weight) for number, weight in mixture.items()]
        before = books(self.resident)
        try:
            with Failing(at):
                share = self.resident.join(parts)
        except torch.OutOfMemoryError:
            assert books(self.resident) == before
        else:
            self.present.append((mixture, share))

    @precondition(lambda self: self.present)
    @rule(place=st.integers(0, 20))
    def leave(self, place: int) -> None:
        self.resident.leave(self.present.pop(place % len(self.present))[1])

    @precondition(lambda self: self.present)
    @rule(at=st.integers(1, 30))
    def gate(self, at: int) -> None:
        before = books(self.resident)
        try:
            with Failing(at):
                self.resident.gate([(share, 1, True) for _, share in self.present])
        except torch.OutOfMemoryError:
            assert books(self.resident) == before

    @invariant()
    def every_column_belongs_to_one_adapter_or_to_none(self) -> None:
        held = [column for own in self.resident._held.values() for column in own.columns]
        assert sorted(held + self.resident._free) == list(range(self.resident._capacity))
        assert all(len(A) == len(B) == self.resident._capacity for A, B in self.resident._stacks.values())

    @invariant()
    def users_are_counted(self) -> None:
        users = [key for _, share in self.present for key in share.keys]
        assert {key: own.users for key, own in self.resident._held.items() if own.users} == {
            key: users.count(key) for key in users
        }
        assert set(self.resident._idle) == {key for key, own in self.resident._held.items() if not own.users}

    @invariant()
    def mixtures_are_what_they_are_when_computed_afresh(self) -> None:
        step = [(share, 1 + i % 2, i % 3 > 0) for i, (_, share) in enumerate(self.present)]
        self.resident.gate(step)
        if not step:
            return
        tokens = [i for i, (_, count, _) in enumerate(step) for _ in range(count)]
        heads = sorted(range(len(step)), key=lambda i: not step[i][2])
        with self.resident.hooks():
            for name, module in self.modules.items():
                rows = heads if name == "three" else tokens
                x = torch.randn(1, len(rows), WIDTH, generator=torch.Generator().manual_seed(len(rows)))
                terms = [term(self.present[i][0], name, row) for i, row in zip(rows, x[0], strict=True)]
                base = nn.functional.linear(x[0], module.weight, module.bias)
                want = base + torch.stack(terms)
                same_tensor(module(x)[0], want)


TestTrouble = pytest.mark.slow(Trouble.TestCase)
TestTrouble.settings = settings(calm, max_examples=60, stateful_step_count=25)
