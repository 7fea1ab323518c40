"""Spectra from factors against torch's own decompositions of the whole product."""

from __future__ import annotations

import math

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from logo.adapters.format import LoraWeights
from logo.adapters.upkeep.spectra import difference, effective_rank, inner, norm, rank_for, spectrum
from make_adapters import calm

CLOSE = {"rtol": 1e-9, "atol": 1e-10}


def dense(weights: LoraWeights) -> torch.Tensor:
    return weights.scaling * weights.B.double() @ weights.A.double()


@st.composite
def updates(draw: st.DrawFn, shape: tuple[int, int] | None = None) -> LoraWeights:
    """Any rank, also above a side; now and then columns of zeros, doubled rows, a scale of 0 or below."""
    into, out = shape or (draw(st.integers(1, 9)), draw(st.integers(1, 9)))
    rank = draw(st.integers(1, 6))
    generator = torch.Generator().manual_seed(draw(st.integers(0, 2**31)))
    a, b = torch.randn(rank, into, generator=generator), torch.randn(out, rank, generator=generator)
    for column in draw(st.sets(st.integers(0, rank - 1))):
        b[:, column] = 0.0
    if rank > 1 and draw(st.booleans()):
        a[1] = a[0]
    dtype = draw(st.sampled_from([torch.float32, torch.bfloat16, torch.float16]))
    return LoraWeights(a.to(dtype), b.to(dtype), draw(st.sampled_from([2.0, 0.5, -1.5, 0.0, 1e-4])))


@calm
@given(updates())
def test_singular_values_and_vectors_are_those_of_the_product(weights: LoraWeights) -> None:
    whole, found = dense(weights), spectrum(weights)
    values = torch.linalg.svdvals(whole)
    kept = min(len(values), len(found.values))
    torch.testing.assert_close(found.values[:kept], values[:kept], **CLOSE)
    assert float(values[kept:].abs().sum()) < 1e-9
    torch.testing.assert_close(found.left * found.values @ found.right, whole, **CLOSE)
    assert found.norm == pytest.approx(float(whole.norm()), abs=1e-10)
    assert norm(weights) == pytest.approx(float(whole.norm()), abs=1e-10)


@calm
@given(updates(), st.integers(1, 7))
def test_truncation_is_the_best_of_its_rank(weights: LoraWeights, rank: int) -> None:
    """No matrix of that rank is nearer than the truncated decomposition of the whole product (Eckart and Young)."""
    whole = dense(weights)
    left, values, right = torch.linalg.svd(whole, full_matrices=False)
    best = left[:, :rank] * values[:rank] @ right[:rank]
    made = spectrum(weights).truncated(rank)
    assert len(made.A) == made.B.shape[1] <= rank and made.scaling == 1.0
    assert float((whole - dense(made)).norm()) == pytest.approx(float((whole - best).norm()), rel=1e-7, abs=1e-9)


@calm
@given(st.data())
def test_differences_and_inner_products(data: st.DataObject) -> None:
    shape = data.draw(st.tuples(st.integers(1, 9), st.integers(1, 9)))
    one, other = data.draw(updates(shape)), data.draw(updates(shape))
    torch.testing.assert_close(dense(difference(one, other)), dense(one) - dense(other), **CLOSE)
    assert inner(one, other) == pytest.approx(float((dense(one) * dense(other)).sum()), rel=1e-9, abs=1e-9)
    assert norm(difference(one, one)) <= 1e-14 * norm(one) * 10


def test_effective_rank_counts_equal_directions() -> None:
    assert effective_rank(torch.tensor([2.0, 2.0, 2.0, 0.0])) == pytest.approx(3.0)
    assert effective_rank(torch.tensor([5.0])) == pytest.approx(1.0)
    assert effective_rank(torch.zeros(4)) == 0.0
    one, two = 0.9, 0.1  # of the energy
    entropy = -(one * math.log(one) + two * math.log(two))
    assert effective_rank(torch.tensor([3.0, 1.0])) == pytest.approx(math.exp(entropy))


@calm
@given(updates(), st.floats(0.01, 1.0))
def test_the_rank_for_an_energy_is_the_smallest(weights: LoraWeights, energy: float) -> None:
    values = spectrum(weights).values
    rank, squares = rank_for(values, energy), values**2
    assert 1 <= rank <= len(values)
    assert float(squares[:rank].sum()) >= energy * float(squares.sum()) * (1 - 1e-12)
    if rank > 1:
        assert float(squares[: rank - 1].sum()) < energy * float(squares.sum())


def test_all_of_the_energy_leaves_directions_of_rounding_errors_out() -> None:
    generator = torch.Generator().manual_seed(0)
    a, b = torch.randn(3, 8, generator=generator), torch.randn(8, 3, generator=generator)
    twice = LoraWeights(torch.cat([a, a]), torch.cat([b, b], dim=1), 1.0)
    assert rank_for(spectrum(twice).values, 1.0) == 3
    assert rank_for(torch.zeros(5), 0.5) == 1
