"""Packed sequences: each token depends on its own mixture alone, while other sequences join, leave or fail."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator
from typing import Any

import pytest
import torch
from hypothesis import settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, invariant, precondition, rule
from torch import Tensor, nn
from torch.overrides import TorchFunctionMode

from logo.errors import CacheFull
from logo.mixing.cache import AdapterCache
from logo.mixing.mixer import Mixture
from logo.serving.packed import Packed, PackedMixture
from make_adapters import calm
from test_adapter_cache import COLUMN, MODULES, WIDTH, adapter, factors, settled
from tolerances import PATIENCE

MIXTURES = st.dictionaries(st.integers(0, 11), st.floats(-2, 2, width=16), max_size=4)


def term(mixture: dict[int, float], module: str, x: Tensor) -> Tensor:
    """`Σ w s B A x` of one token."""
    total = torch.zeros(WIDTH + 1)
    for number, weight in mixture.items():
        own = factors(number).get(module)
        if own is not None:
            total = total + weight * own.scaling * (own.B @ (own.A @ x))
    return total


def joined(cache: AdapterCache, mixture: dict[int, float], **begins: int) -> PackedMixture:
    hold = cache.reserve([adapter(number) for number in mixture])
    failures = [resident.ready.exception(PATIENCE) for resident in hold]
    for failure in failures:
        if failure is not None:
            cache.release(hold)
            raise failure
    return PackedMixture(hold, Mixture({f"a{number}": weight for number, weight in mixture.items()}, begins))


class Failing(TorchFunctionMode):
    """Out of memory at the n-th thing that torch is asked for; never, if there are fewer."""

    def __init__(self, at: int) -> None:
        super().__init__()
        self.left = at

    def __torch_function__(self, function: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        self.left -= 1
        if not self.left:
            raise torch.OutOfMemoryError(f"no room for {function.__name__}")
        return function(*args, **(kwargs or {}))


@contextlib.contextmanager
def failing(cache: AdapterCache, at: int) -> Iterator[None]:
    """In the thread that loads adapters."""
    mode = Failing(at)
    cache.release(cache.reserve([adapter(0)]))  # begins that thread
    assert cache._loader is not None
    cache._loader.submit(mode.__enter__).result()
    try:
        yield
    finally:
        cache._loader.submit(mode.__exit__, None, None, None).result()


class Trouble(RuleBasedStateMachine):
    """Sequences come and go in little memory, and memory runs out at any place."""

    def __init__(self) -> None:
        super().__init__()
        self.cache = AdapterCache(MODULES, torch.float32, 2 * 3 * 30 * COLUMN)
        self.packed = Packed(self.cache, head="three")
        self.present: list[tuple[dict[int, float], PackedMixture]] = []

    @rule(mixture=MIXTURES)
    def join(self, mixture: dict[int, float]) -> None:
        with contextlib.suppress(CacheFull):
            self.present.append((mixture, joined(self.cache, mixture)))

    @rule(mixture=MIXTURES, at=st.integers(1, 60))
    def join_where_memory_runs_out(self, mixture: dict[int, float], at: int) -> None:
        with contextlib.suppress(CacheFull, torch.OutOfMemoryError), failing(self.cache, at):
            self.present.append((mixture, joined(self.cache, mixture)))

    @precondition(lambda self: self.present)
    @rule(place=st.integers(0, 20))
    def leave(self, place: int) -> None:
        self.cache.release(self.present.pop(place % len(self.present))[1].hold)

    @rule(kept=st.sets(st.integers(0, 11)))
    def the_pool_changes(self, kept: set[int]) -> None:
        self.cache.retain(kept)

    @invariant()
    def memory_is_counted(self) -> None:
        held = {resident for _, mixture in self.present for resident in mixture.hold}
        gone = {resident.bytes for resident in held if resident not in set(self.cache._residents.values())}
        if not gone:
            settled(self.cache)

    @invariant()
    def users_are_counted(self) -> None:
        users = [number for mixture, _ in self.present for number in mixture]
        held = {one for _, mixture in self.present for one in mixture.hold}
        assert sum(one.users for one in held) == len(users)
        assert not any(one.users for one in self.cache._residents.values() if one not in held)

    @invariant()
    def mixtures_are_what_they_are_when_computed_afresh(self) -> None:
        step = [(mixture, 1 + i % 2, i % 3 > 0, i) for i, (_, mixture) in enumerate(self.present)]
        assert self.packed.gate(step) == any(mixture for mixture, _ in self.present)
        tokens = [i for i, (_, count, *_) in enumerate(step) for _ in range(count)]
        heads = sorted(range(len(step)), key=lambda i: not step[i][2])
        with self.packed.hooks(), torch.no_grad():
            for name, module in MODULES.items():
                rows = heads if name == "three" else tokens
                x = torch.randn(1, len(rows), WIDTH, generator=torch.Generator().manual_seed(len(rows)))
                terms = [term(self.present[i][0], name, row) for i, row in zip(rows, x[0], strict=True)]
                base = nn.functional.linear(x[0], module.weight, module.bias)
                want = base + torch.stack(terms) if terms else base
                torch.testing.assert_close(module(x)[0], want, rtol=1e-4, atol=1e-4)


TestTrouble = pytest.mark.slow(Trouble.TestCase)
TestTrouble.settings = settings(calm, max_examples=60, stateful_step_count=25)


def test_without_a_mixture_outputs_are_bit_equal_to_the_base_model() -> None:
    module = nn.Linear(WIDTH, WIDTH + 1)
    cache = AdapterCache({"one": module}, torch.float32, 10**6)
    packed = Packed(cache)
    x = torch.randn(1, 3, WIDTH)
    before = module(x)
    with packed.hooks():
        mixture = joined(cache, {0: 1.0})
        assert not packed.gate([]) and not packed.gate([(None, 3, True, 0)])
        assert torch.equal(module(x), before)
        assert packed.gate([(mixture, 3, True, 0)])
        assert not torch.equal(module(x), before)
    assert torch.equal(module(x), before)


def test_gates_open_where_each_adapter_begins() -> None:
    """Of a sequence that is read from its token 3 on, one adapter acts at once and the other from token 5 on."""
    module = nn.Linear(WIDTH, WIDTH + 1)
    cache = AdapterCache({"one": module}, torch.float32, 10**6)
    packed = Packed(cache)
    whole = joined(cache, {0: 0.5, 8: -1.0})
    late = joined(cache, {0: 0.5, 8: -1.0}, a0=2, a8=5)
    x = torch.randn(1, 5, WIDTH)
    with packed.hooks(), torch.no_grad():
        packed.gate([(late, 4, True, 3), (whole, 1, True, 0)])
        rows = [{0: 0.5}, {0: 0.5}, {0: 0.5, 8: -1.0}, {0: 0.5, 8: -1.0}, {0: 0.5, 8: -1.0}]
        want = [module.weight @ row + module.bias + term(m, "one", row) for m, row in zip(rows, x[0], strict=True)]
        torch.testing.assert_close(module(x)[0], torch.stack(want), rtol=1e-4, atol=1e-4)


def test_one_file_under_two_names_acts_with_the_sum_of_their_weights() -> None:
    module = nn.Linear(WIDTH, WIDTH + 1)
    cache = AdapterCache({"one": module}, torch.float32, 10**6)
    packed, hold = Packed(cache), cache.reserve([adapter(0), adapter(0)])
    assert [resident.ready.result(PATIENCE) for resident in hold] == [None, None]
    x = torch.randn(1, 1, WIDTH)
    with packed.hooks(), torch.no_grad():
        packed.gate([(PackedMixture(hold, Mixture({"a": 0.5, "b": 0.25})), 1, True, 0)])
        want = module.weight @ x[0, 0] + module.bias + term({0: 0.75}, "one", x[0, 0])
        torch.testing.assert_close(module(x)[0, 0], want, rtol=1e-4, atol=1e-4)
