"""Adapters in memory: within the budget, read once, read ahead, and never another's tensors."""

from __future__ import annotations

import threading
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import nn

from logo import AdapterPool, LoGo, SelectionSettings
from logo.adapters.format import Adapter, open_adapter
from logo.adapters.layout import BaseLayout
from logo.errors import AdapterError
from logo.mixing import AdapterCache
from make_adapters import calm
from test_engine import PROMPTS, tokenizer, write_adapter


@pytest.fixture(scope="module")
def four(llama: nn.Module, tmp_path_factory: pytest.TempPathFactory) -> list[Adapter]:
    folder = tmp_path_factory.mktemp("four")
    for i in range(4):
        write_adapter(folder / f"a{i}", llama, ("q_proj",), rank=2, seed=i)
    return [open_adapter(folder / f"a{i}") for i in range(4)]


@pytest.fixture
def reads(monkeypatch: pytest.MonkeyPatch) -> list[tuple[str, str]]:
    """Which adapters are read from here on, and in which thread."""
    found: list[tuple[str, str]] = []
    whole = Adapter.read

    def read(adapter: Adapter, modules: Any = None) -> Any:
        found.append((adapter.name, threading.current_thread().name))
        return whole(adapter, modules)

    monkeypatch.setattr(Adapter, "read", read)
    return found


@calm
@given(st.lists(st.tuples(st.integers(0, 3), st.sampled_from(["read", "prefetch", "drop"])), max_size=20), st.data())
def test_whatever_is_asked_in_whatever_order(four: list[Adapter], asked: list[tuple[int, str]], data: Any) -> None:
    sizes = [sum(w.A.nbytes + w.B.nbytes for w in adapter.read().values()) for adapter in four]
    cache = AdapterCache(data.draw(st.integers(0, 5)) * sizes[0])
    for number, what in asked:
        if what == "prefetch":
            cache.prefetch([four[number]])
        elif what == "drop":
            cache.drop(f"a{number}")
        else:
            found, expected = cache.read(four[number]), four[number].read()
            assert found.keys() == expected.keys()
            assert all(torch.equal(found[path].A, expected[path].A) for path in found)
            assert cache.names[-1] == f"a{number}"
        assert cache.bytes == sum(sizes[int(name[1])] for name in cache.names)
        assert cache.bytes <= max(cache.budget, sizes[0])  # one alone is kept even if it is larger


def test_what_is_read_ahead_is_not_read_again(four: list[Adapter], reads: list[tuple[str, str]]) -> None:
    cache = AdapterCache(10**9)
    cache.prefetch(four[:2])
    cache.prefetch(four[:2])
    for adapter in four[:3]:
        cache.read(adapter)
    cache.prefetch(four[:3])
    assert [name for name, _ in reads] == ["a0", "a1", "a2"]
    assert reads[0][1].startswith("logo-prefetch") and not reads[2][1].startswith("logo-prefetch")


def test_no_more_is_read_ahead_than_fits(four: list[Adapter], reads: list[tuple[str, str]]) -> None:
    cache = AdapterCache(2 * four[0].size)
    cache.prefetch(four)
    cache.read(four[1])
    assert sorted(name for name, _ in reads) == ["a0", "a1"]


def test_an_adapter_of_the_same_name_is_not_taken_for_it(four: list[Adapter], llama: nn.Module, tmp_path: Path) -> None:
    write_adapter(tmp_path / "a0", llama, ("q_proj",), rank=2, seed=77)
    other = open_adapter(tmp_path / "a0")
    cache = AdapterCache(10**9)
    cache.prefetch([four[0]])
    assert all(torch.equal(w.A, four[0].read()[p].A) for p, w in cache.read(four[0]).items())
    cache.prefetch([other])
    assert all(torch.equal(w.A, other.read()[p].A) for p, w in cache.read(other).items())
    cache.prefetch([four[0]])
    assert all(torch.equal(w.A, other.read()[p].A) for p, w in cache.read(other).items())


def test_a_pool_fitted_again_finds_what_it_had(
    four: list[Adapter], llama: nn.Module, reads: list[tuple[str, str]]
) -> None:
    cache, layout = AdapterCache(10**9), BaseLayout.of(llama)
    cache.read(four[0].fit(layout))
    assert cache.read(four[0].fit(layout)) is cache.read(four[0].fit(layout))
    assert len(reads) == 1


def test_what_fails_ahead_fails_when_asked(four: list[Adapter], tmp_path: Path) -> None:
    (tmp_path / "broken.safetensors").write_bytes(b"no tensors")
    broken = replace(four[0], file=type(four[0].file)(tmp_path / "broken.safetensors"))  # type: ignore[call-arg]
    cache = AdapterCache(10**9)
    cache.prefetch([broken])
    with pytest.raises(AdapterError, match="cannot be read"):
        cache.read(broken)
    assert cache.names == () and cache.read(four[0])


def test_selected_adapters_are_read_while_the_next_batch_is_probed(
    llama: nn.Module, adapters: Path, reads: list[tuple[str, str]]
) -> None:
    logo = LoGo(llama, tokenizer(), AdapterPool.from_directory(adapters), settings=SelectionSettings("norm", k=2))
    logo.calibrate()
    reads.clear()
    logo.select(PROMPTS)
    assert reads == []  # nobody asked for an answer
    answers = logo.generate(PROMPTS, max_new_tokens=2, batch_size=2)
    used = {name for answer in answers for name in answer.selection.adapters}
    assert {name for name, _ in reads} == used and len(reads) == len(used)
    assert all(thread.startswith("logo-prefetch") for _, thread in reads)
