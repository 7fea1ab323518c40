"""Spectra from factors against torch's own decompositions of the whole product."""

from __future__ import annotations

import math

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from logo.adapters.adapter import LoraWeights
from logo.adapters.publish import effective_rank, singular_values
from make_adapters import calm


def dense(weights: LoraWeights) -> torch.Tensor:
    return weights.scaling * weights.B.double() @ weights.A.double()


@st.composite
def updates(draw: st.DrawFn) -> LoraWeights:
    """Any rank, also above a side; now and then columns of zeros, doubled rows, a scale of 0 or below."""
    into, out = draw(st.integers(1, 9)), draw(st.integers(1, 9))
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
def test_singular_values_are_those_of_the_product(weights: LoraWeights) -> None:
    values, found = torch.linalg.svdvals(dense(weights)), singular_values(weights)
    kept = min(len(values), len(found))
    torch.testing.assert_close(found[:kept], values[:kept], rtol=1e-9, atol=1e-10)
    assert float(values[kept:].abs().sum()) < 1e-9


def test_effective_rank_counts_equal_directions() -> None:
    assert effective_rank(torch.tensor([2.0, 2.0, 2.0, 0.0])) == pytest.approx(3.0)
    assert effective_rank(torch.tensor([5.0])) == pytest.approx(1.0)
    assert effective_rank(torch.zeros(4)) == 0.0
    one, two = 0.9, 0.1  # of the energy
    entropy = -(one * math.log(one) + two * math.log(two))
    assert effective_rank(torch.tensor([3.0, 1.0])) == pytest.approx(math.exp(entropy))
