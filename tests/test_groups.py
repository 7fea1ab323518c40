"""Rows in groups: the same numbers as all rows with all factors, and the grouping that costs least."""

from __future__ import annotations

import itertools

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import nn

from logo.adapters.adapter import LoraWeights
from logo.mixing import AdapterStore, Gates, Work
from logo.mixing.gated import low_rank
from logo.mixing.groups import GroupedMixture, _grouped, cheapest
from logo.mixing.stacks import Copies, grouped, stacked
from logo.mixing.store import Hold, Source
from tolerances import same_tensor

MODULES = {"one": nn.Linear(7, 5), "two": nn.Linear(6, 4)}
PROMPT = Work(1000, 16, 0)
DECODE = Work(16, 16, 100)
READ = 4.0


def adapters(ranks: list[int], seed: int) -> list[dict[str, LoraWeights]]:
    """Adapter i has that rank on both modules; every third one lacks the second."""
    generator = torch.Generator().manual_seed(seed)

    def made(i: int, rank: int, path: str) -> LoraWeights:
        module = MODULES[path]
        a = torch.randn(rank, module.in_features, generator=generator)
        return LoraWeights(a, torch.randn(module.out_features, rank, generator=generator), 0.5 + i)

    return [{path: made(i, rank, path) for path in MODULES if path == "one" or i % 3} for i, rank in enumerate(ranks)]


def stored(tensors: list[dict[str, LoraWeights]]) -> tuple[AdapterStore, Hold]:
    store = AdapterStore(MODULES, torch.float32, 10**6)

    def source(number: int) -> Source:
        return Source(number, f"a{number}", lambda: tensors[number])

    return store, store.hold([source(number) for number in range(len(tensors))])


@given(data=st.data(), ranks=st.lists(st.integers(1, 5), min_size=1, max_size=7), rows=st.integers(1, 9))
@settings(max_examples=120, deadline=None)
def test_groups_change_no_number(data: st.DataObject, ranks: list[int], rows: int) -> None:
    used = data.draw(
        st.lists(st.lists(st.booleans(), min_size=len(ranks), max_size=len(ranks)), min_size=rows, max_size=rows)
    )
    m, copies, length = data.draw(st.integers(1, rows)), data.draw(st.integers(1, 2)), data.draw(st.integers(1, 3))
    weights = torch.tensor(used).float() * torch.rand(rows, len(ranks), generator=torch.Generator().manual_seed(rows))
    tensors = adapters(ranks, seed=rows)
    store, hold = stored(tensors)
    plain = stacked(store, hold)
    groups = _grouped(weights != 0, torch.tensor(ranks, dtype=torch.float64), m)
    mixture, stacks = GroupedMixture(groups, weights), grouped(store, hold, groups.adapters, Copies())
    assert stacks.keys() <= plain.keys()
    for path, stack in stacks.items():
        for shape in ((rows * copies, length), (rows * copies,)):
            x = torch.randn(*shape, MODULES[path].in_features, generator=torch.Generator().manual_seed(m))
            expected = low_rank(x, plain[path], Gates(weights))
            same_tensor(mixture.low_rank(x, stack), expected)
            tokens = torch.randint(0, MODULES[path].in_features, shape)  # of an embedding with so many
            x = torch.nn.functional.one_hot(tokens, MODULES[path].in_features).float()
            same_tensor(mixture.low_rank(tokens, stack), low_rank(x, plain[path], Gates(weights)))
            same_tensor(low_rank(tokens, plain[path], Gates(weights)), low_rank(x, plain[path], Gates(weights)))


@pytest.mark.parametrize("length", [1, 20])
def test_an_adapter_that_overflows_spoils_no_row_but_its_own(length: int) -> None:
    tensors, weights = adapters([2, 1, 3, 1], seed=0), torch.eye(4)
    tensors[1]["one"].A.fill_(torch.finfo(torch.float32).max)  # its response is not finite
    store, hold = stored(tensors)
    groups = _grouped(weights != 0, torch.ones(4, dtype=torch.float64), 2)
    x = torch.ones(4, length, 7)
    found = GroupedMixture(groups, weights).low_rank(x, grouped(store, hold, groups.adapters, Copies())["one"])
    others = torch.tensor([0, 2, 3])
    same_tensor(found[others], low_rank(x, stacked(store, hold)["one"], Gates(weights))[others])
    assert not found[1].isfinite().any()


@given(rows=st.integers(1, 20), m=st.integers(1, 20), seed=st.integers(0, 50))
@settings(max_examples=80, deadline=None)
def test_every_row_is_in_one_group_with_all_it_uses(rows: int, m: int, seed: int) -> None:
    used = torch.rand(rows, 12, generator=torch.Generator().manual_seed(seed)) < 0.3
    groups = _grouped(used, torch.ones(12, dtype=torch.float64), m)
    found = [row for row in groups.rows.flatten().tolist() if row >= 0]
    assert sorted(found) == list(range(rows)) and groups.rows.shape[1] == m
    for members, own in zip(groups.rows.tolist(), groups.adapters, strict=True):
        wanted = {i for row in members if row >= 0 for i in used[row].nonzero()[:, 0].tolist()}
        assert set(own) == wanted


def test_the_choice_is_the_cheapest_of_those_it_could_make() -> None:
    """Against the cost written out, for many random batches."""
    sizes = [float(1 + i % 3) for i in range(30)]
    for seed, work in itertools.product(range(20), (DECODE, PROMPT)):
        weights = (torch.rand(16, 30, generator=torch.Generator().manual_seed(seed)) < 0.2).float()
        weights[:, seed % 30] = 1

        def cost(m: int, weights: torch.Tensor = weights, work: Work = work) -> float:
            groups = _grouped(weights != 0, torch.tensor(sizes, dtype=torch.float64), m)
            largest = max(sum(sizes[i] for i in own) for own in groups.adapters)
            return largest * (4 * len(groups.adapters) * (1 + work.steps) + work.prompt + work.rows * work.steps)

        chosen = cheapest(weights, sizes, work, READ)
        assert cost(chosen.rows.shape[1]) == pytest.approx(min(cost(m) for m in (1, 2, 4, 8, 16)))


def test_a_batch_of_other_rows_is_refused() -> None:
    weights = torch.eye(3)
    groups = _grouped(weights != 0, torch.ones(3, dtype=torch.float64), 1)
    tensors = adapters([2, 2, 2], 0)
    with pytest.raises(ValueError, match="3 rows cannot serve a batch of 4 rows"):
        GroupedMixture(groups, weights).low_rank(
            torch.zeros(4, 7), grouped(*stored(tensors), groups.adapters, Copies())["one"]
        )
