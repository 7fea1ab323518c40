"""The adapter cache: content and budget whoever comes and goes, and that a failure leaves nothing half done."""

from __future__ import annotations

import os
import signal
import threading
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Any

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import nn
from torch.utils._python_dispatch import TorchDispatchMode

from logo.adapters.adapter import LoraWeights
from logo.errors import AdapterError, CacheFull, NotFinite
from logo.mixing.cache import AdapterCache, Hold
from tolerances import PATIENCE, same_tensor

WIDTH = 6
MODULES = {name: nn.Linear(WIDTH, WIDTH + 1) for name in ("one", "two", "three")}
COLUMN = 4 * (2 * WIDTH + 1)  # bytes of a rank in one module


def factors(number: int) -> dict[str, LoraWeights]:
    """Of a rank and on modules of its own; ranks may differ between modules."""
    generator = torch.Generator().manual_seed(number)
    touched = [name for i, name in enumerate(MODULES) if (number + 1) >> i & 1] or ["one"]
    weights = {}
    for place, name in enumerate(touched):
        rank = 1 + (number + place) % 3
        a, b = (torch.randn(shape, generator=generator) for shape in ((rank, WIDTH), (WIDTH + 1, rank)))
        weights[name] = LoraWeights(a, b, 0.5 + number)
    return weights


@dataclass(frozen=True)
class Made:
    """What the cache asks of an adapter."""

    name: str
    read: Callable[[], Mapping[str, LoraWeights]] = field(compare=False)

    @property
    def file(self) -> str:
        return self.name


def adapter(number: int) -> Any:
    return Made(f"a{number}", lambda: factors(number))


def single(number: int) -> Any:
    return Made(f"a{number}", lambda: {"one": LoraWeights(torch.ones(1, WIDTH), torch.ones(WIDTH + 1, 1), 1.0)})


def cache(columns: int = 1000) -> AdapterCache:
    """With room for so many ranks on all modules."""
    return AdapterCache(MODULES, torch.float32, 2 * columns * 3 * COLUMN)


def size(number: int) -> int:
    return sum(len(one.A) for one in factors(number).values()) * COLUMN


def settled(one: AdapterCache) -> None:
    """Waits for adapters that are on their way, also after a failure, and checks what is there."""
    for resident in list(one._residents.values()):
        resident.ready.exception(PATIENCE)
    assert one.bytes == sum(size(int(name[1:])) for name in one.names) <= one.budget // 2


def check(one: AdapterCache, hold: Hold) -> None:
    """Every held adapter has its factors, on its modules, and nowhere else."""
    for grows in (True, False):
        stacks = one.stacks(hold, grows=grows)
        assert stacks.residents[: len(hold)] == hold or grows
        for place, resident in enumerate(stacks.residents):
            expected = factors(int(resident.adapter.name[1:]))
            for path, stack in stacks.modules.items():
                mine = stack.owner == place
                assert bool(mine.any()) == (path in expected)
                if path in expected:
                    want = expected[path].scaled_b() @ expected[path].A
                    same_tensor(stack.B[mine].T @ stack.A[mine], want)
        bytes_ = sum(stack.A.nbytes + stack.B.nbytes for stack in stacks.modules.values())
        assert bytes_ <= one.budget // 2


NUMBERS = st.lists(st.integers(0, 11), max_size=5, unique=True)


@pytest.mark.slow
@given(st.lists(NUMBERS, min_size=1, max_size=8), st.integers(4, 40))
def test_whoever_comes_and_goes_all_have_their_factors_within_the_budget(
    batches: list[list[int]], columns: int
) -> None:
    one = cache(columns)
    for batch in batches:
        try:
            with one.held([adapter(number) for number in batch]) as hold:
                assert [resident.adapter.name for resident in hold] == [f"a{number}" for number in batch]
                check(one, hold)
        except CacheFull as full:
            assert "--adapter-memory-gb" in str(full)
        settled(one)


@pytest.mark.filterwarnings("ignore:.*fork:DeprecationWarning")
def test_a_forked_process_loads_what_its_parent_has_not() -> None:
    """Threads are not forked, so that nobody would load it."""
    one = cache()
    with one.held([adapter(0)]):  # which begins the thread
        child = os.fork()
        if not child:
            signal.alarm(int(PATIENCE))
            code = 1
            try:
                with one.held([adapter(0), adapter(1)]) as hold:
                    check(one, hold)
                    code = 0
            finally:
                os._exit(code)
        _, status = os.waitpid(child, 0)
    assert os.waitstatus_to_exitcode(status) == 0


def test_what_was_used_longest_ago_gives_way_and_never_what_is_held() -> None:
    one = AdapterCache({"one": MODULES["one"]}, torch.float32, 6 * COLUMN)  # three of rank 1, and their copies
    for number in (0, 1, 2, 0, 3):
        with one.held([single(number)]):
            pass
    assert one.names == ("a2", "a0", "a3")
    with one.held([single(2), single(0)]), one.held([single(4)]):
        assert one.names == ("a2", "a0", "a4")
        with pytest.raises(CacheFull, match=r"'a5'.*beside the 3 adapters in use"), one.held([single(5)]):
            pass
    with one.held([single(5)]):
        assert one.names == ("a0", "a4", "a5")


def test_what_left_the_pool_goes_once_nobody_holds_it() -> None:
    one = cache()
    with one.held([adapter(1), adapter(2)]) as hold:
        one.retain({"a2"})
        check(one, hold)
        assert one.names == ("a2",) and one.bytes == size(1) + size(2)
    settled(one)
    assert one.names == ("a2",)


def test_one_that_cannot_be_read_leaves_the_others_and_is_tried_again() -> None:
    one, broken = cache(), [True]

    def read() -> Mapping[str, LoraWeights]:
        if broken[0]:
            raise AdapterError("bad", "not there")
        return factors(3)

    bad: Any = Made("a3", read)
    with pytest.raises(AdapterError, match="not there"), one.held([adapter(1), bad, adapter(2)]):
        pass
    settled(one)
    assert set(one.names) == {"a1", "a2"}
    broken[0] = False
    with one.held([bad]) as hold:
        check(one, hold)


def test_one_that_overflows_the_dtype_is_refused() -> None:
    one = AdapterCache(MODULES, torch.float16, 10**6)
    large: Any = Made("large", lambda: {"one": LoraWeights(torch.full((1, WIDTH), 1e5), torch.ones(7, 1), 1.0)})
    with pytest.raises(NotFinite, match=r"'large'.*one.*overflows torch\.float16.*--dtype"), one.held([large]):
        pass
    assert one.names == () and one.bytes == 0


def test_a_finite_one_whose_sum_overflows_is_accepted() -> None:
    one = AdapterCache(MODULES, torch.float16, 10**6)
    large: Any = Made("large", lambda: {"one": LoraWeights(torch.full((2, WIDTH), 3e4), torch.ones(7, 2), 1.0)})
    with one.held([large]) as [resident]:
        assert resident.factors["one"][0].sum().isinf()


def test_what_is_loaded_is_scaled_in_float32_whatever_it_is_stored_in() -> None:
    for dtype in (torch.float64, torch.float32, torch.bfloat16):
        a, b = torch.randn(2, WIDTH).to(dtype), torch.randn(7, 2).to(dtype)
        one = AdapterCache(MODULES, torch.bfloat16, 10**6)
        made: Any = Made("made", lambda a=a, b=b: {"one": LoraWeights(a, b, 0.3)})  # type: ignore[misc]
        with one.held([made]) as [resident]:
            A, B = resident.factors["one"]
            assert A.equal(a.bfloat16()) and B.equal((b.float() * 0.3).bfloat16().T)


def test_loading_asks_the_device_one_question(monkeypatch: pytest.MonkeyPatch) -> None:
    """Each waits for whatever else the device has to compute."""
    asked: list[str] = []

    class Questions(TorchDispatchMode):
        def __torch_dispatch__(self, function: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
            asked.append(str(function))
            return function(*args, **(kwargs or {}))

    load = AdapterCache._load

    def watched(self: AdapterCache, resident: Any) -> None:
        with Questions():
            load(self, resident)

    monkeypatch.setattr(AdapterCache, "_load", watched)
    with cache().held([adapter(6)]) as [resident]:
        assert len(resident.factors) == 3
    assert sum("_local_scalar_dense" in name for name in asked) == 1


@pytest.mark.slow
@given(st.lists(NUMBERS, min_size=1, max_size=6), st.integers(1, 30))
def test_out_of_memory_at_any_allocation_leaves_nothing_half_done(batches: list[list[int]], nth: int) -> None:
    """Every n-th allocation of the cache fails."""
    one, count, real = cache(64), [0], torch.empty

    def allocate(*args: Any, **kwargs: Any) -> Any:
        count[0] += 1
        if count[0] % nth == 0:
            raise RuntimeError("out of memory")
        return real(*args, **kwargs)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(torch, "empty", allocate)
        for batch in batches:
            try:
                with one.held([adapter(number) for number in batch]) as hold:
                    check(one, hold)
            except RuntimeError:
                pass
            settled(one)
    for batch in batches:  # and with memory again, everything works
        with one.held([adapter(number) for number in batch]) as hold:
            check(one, hold)


def test_threads_that_hold_and_give_back_at_once_end_with_nothing_held() -> None:
    one, wrong = cache(12), list[BaseException]()

    def use(seed: int) -> None:
        generator = torch.Generator().manual_seed(seed)
        for _ in range(40):
            numbers = torch.randperm(12, generator=generator)[:2].tolist()
            try:
                with one.held([adapter(number) for number in numbers]) as hold:
                    for number, resident in zip(numbers, hold, strict=True):
                        assert resident.factors.keys() == factors(number).keys()
                if numbers[0] == 0:
                    one.retain({f"a{number}" for number in range(6)})
            except CacheFull:
                pass
            except BaseException as error:
                wrong.append(error)

    threads = [threading.Thread(target=use, args=(seed,)) for seed in range(6)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert not wrong and not any(resident.users for resident in one._residents.values())
    settled(one)
