"""The adapter store: owners and content of columns, and that a failure leaves nothing half done."""

from __future__ import annotations

import threading
from collections.abc import Collection, Mapping

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import nn

from logo.adapters.adapter import LoraWeights
from logo.errors import AdapterError, NotFinite, StoreFull
from logo.mixing.columns import Columns
from logo.mixing.store import AdapterStore, Source
from make_adapters import calm

WIDTH = 6
MODULES = {name: nn.Linear(WIDTH, WIDTH + 1) for name in ("one", "two", "three")}
COLUMN = 4 * (2 * WIDTH + 1)  # bytes of a column in one module


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


def source(number: int) -> Source:
    return Source(number, f"a{number}", lambda: factors(number))


def store(columns: int = 1000) -> AdapterStore:
    return AdapterStore(MODULES, torch.float32, columns * 3 * COLUMN)


def consistent(store: AdapterStore) -> None:
    """Every column is a resident's, or free, or the one that is nobody's and zero."""
    if store._writer is not None:
        store._writer.submit(int).result()  # whoever failed to hold all may have others still on their way
    keys = store.keys
    for part in store.parts:
        assert set(part.placed) <= set(keys)
        taken = [column for columns in part.placed.values() for column in columns]
        assert len(taken) == len(set(taken)) and 0 not in taken
        assert sorted([0, *taken, *part._free]) == list(range(part.capacity)) or not part.capacity
        assert not part.capacity or not any(tensor[0].any() for pair in part.factors.values() for tensor in pair)


def check(store: AdapterStore) -> None:
    """And every resident has its factors in its columns, in each of its modules, and nowhere else."""
    consistent(store)
    for key in store.keys:
        assert isinstance(key, int)
        expected: Mapping[str, LoraWeights] = factors(key)
        found = {path: part for part in store.parts for path in part.factors if key in part.placed}
        assert found.keys() == expected.keys()
        for path, part in found.items():
            A, B = part.factors[path]
            place = list(part.placed[key])
            torch.testing.assert_close(B[place].T @ A[place], expected[path].scaled_b() @ expected[path].A)


NUMBERS = st.lists(st.integers(0, 11), max_size=5, unique=True)


@calm
@given(st.lists(NUMBERS, min_size=1, max_size=8), st.integers(4, 40))
def test_whoever_comes_and_goes_everybody_has_columns_of_their_own_within_the_budget(
    batches: list[list[int]], columns: int
) -> None:
    one = store(columns)
    for batch in batches:
        try:
            with one.held([source(number) for number in batch]) as hold:
                assert hold.keys == tuple(batch) and set(batch) <= set(one.keys)
                check(one)
        except StoreFull as full:
            assert "--adapter-memory-gb" in str(full)
        assert one.bytes <= one.budget
        check(one)


def test_what_was_used_longest_ago_gives_way_and_never_what_is_held() -> None:
    one = AdapterStore({"one": MODULES["one"]}, torch.float32, 4 * COLUMN)  # column 0 and three more

    def single(number: int) -> Source:
        return Source(number, f"a{number}", lambda: {"one": LoraWeights(torch.ones(1, WIDTH), torch.ones(7, 1), 1.0)})

    for number in (0, 1, 2, 0, 3):
        one.release(one.hold([single(number)]))
    assert one.keys == (2, 0, 3)
    hold = one.hold([single(2), single(0)])
    one.release(one.hold([single(4)]))
    assert one.keys == (2, 0, 4)
    more = one.hold([single(4)])
    with pytest.raises(StoreFull, match="beside the 3 adapters in use"):
        one.hold([single(5)])
    one.release(more)
    one.release(hold)
    one.release(one.hold([single(5)]))
    check_users(one)


def check_users(one: AdapterStore) -> None:
    assert not any(resident.users for resident in one._residents.values())


def test_one_that_cannot_be_read_leaves_the_others_and_is_tried_again() -> None:
    one = store()
    broken = [True]

    def read() -> dict[str, LoraWeights]:
        if broken[0]:
            raise AdapterError("bad", "not there")
        return factors(3)

    with pytest.raises(AdapterError, match="not there"):
        one.hold([source(1), Source(3, "bad", read), source(2)])
    check_users(one)
    check(one)
    assert set(one.keys) == {1, 2}
    broken[0] = False
    one.release(one.hold([Source(3, "bad", read)]))
    check(one)


def test_one_that_overflows_the_dtype_is_refused() -> None:
    one = AdapterStore(MODULES, torch.float16, 10**6)
    large = {"one": LoraWeights(torch.full((1, WIDTH), 1e5), torch.ones(7, 1), 1.0)}
    with pytest.raises(NotFinite, match=r"'large'.*one.*overflows torch\.float16.*--dtype"):
        one.hold([Source("large", "large", lambda: large)])
    assert one.keys == () and all(not part.placed for part in one.parts)


@calm
@given(st.lists(NUMBERS, min_size=1, max_size=6), st.integers(1, 30))
def test_out_of_memory_at_any_allocation_leaves_nothing_half_done(batches: list[list[int]], nth: int) -> None:
    """Every n-th allocation of the store fails."""
    one = store(64)
    count = [0]
    real = torch.Tensor.new_zeros, torch.zeros

    def failing(which: int):  # type: ignore[no-untyped-def]
        def allocate(*args, **kwargs):  # type: ignore[no-untyped-def]
            count[0] += 1
            if count[0] % nth == 0:
                raise RuntimeError("out of memory")
            return real[which](*args, **kwargs)

        return allocate

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(torch.Tensor, "new_zeros", failing(0))
        patch.setattr(torch, "zeros", failing(1))
        for batch in batches:
            try:
                with one.held([source(number) for number in batch]):
                    check(one)
            except (RuntimeError, StoreFull):
                pass
            check_users(one)
            check(one)
    for batch in batches:  # and with memory again, everything works
        with one.held([source(number) for number in batch]):
            check(one)


def test_columns_that_are_given_back_while_parts_are_cut_are_free(monkeypatch: pytest.MonkeyPatch) -> None:
    """Another thread gives an adapter back in the middle of making room for one that cuts the modules in two."""
    one = store()
    hold = one.hold([source(6)])  # touches all modules
    split, threads = Columns.split, list[threading.Thread]()

    def cut(part: Columns, paths: Collection[str]) -> tuple[Columns, Columns]:
        made = split(part, paths)
        threads.append(threading.Thread(target=lambda: (one.retain({104}), one.release(hold))))
        threads[-1].start()
        threads[-1].join(0.5)
        return made

    monkeypatch.setattr(Columns, "split", cut)
    with one.held([source(104)]):  # touches the first one alone
        for thread in threads:
            thread.join()
        assert threads and one.keys == (104,)
        consistent(one)
