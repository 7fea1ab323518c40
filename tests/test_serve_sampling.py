"""Draws: greedy is the most likely token, a seed gives the same draws in any company."""

from __future__ import annotations

import torch
from hypothesis import given
from hypothesis import strategies as st
from transformers import TemperatureLogitsWarper, TopPLogitsWarper

from logo.serve.sampling import NO_TOKEN, Draw, Sampling, next_tokens
from make_adapters import calm

VOCABULARY = 12
SAMPLING = st.builds(
    Sampling,
    max_tokens=st.just(4),
    temperature=st.sampled_from([0.0, 1e-7, 0.5, 1.0, 2.0]),
    top_p=st.sampled_from([0.1, 0.9, 1.0]),
    seed=st.integers(-(2**63), 2**63 - 1),
)


def draw(scores: torch.Tensor, ways: list[Sampling], number: int = 0) -> list[int]:
    tokens: list[int] = next_tokens(scores, [Draw(way, number) for way in ways]).tolist()
    return tokens


def steps(seed: int, count: int, rows: int) -> torch.Tensor:
    return torch.randn(count, rows, VOCABULARY, generator=torch.Generator().manual_seed(seed)) * 2


@calm
@given(st.lists(SAMPLING, min_size=1, max_size=5), st.integers(0, 1000), st.data())
def test_a_sequence_draws_the_same_alone_as_in_company(ways: list[Sampling], seed: int, data: st.DataObject) -> None:
    scores = steps(seed, 4, len(ways))
    drawn = [draw(step, ways, number) for number, step in enumerate(scores)]
    row = data.draw(st.integers(0, len(ways) - 1))
    alone = [draw(step[row : row + 1], [ways[row]], number)[0] for number, step in enumerate(scores)]
    assert alone == [tokens[row] for tokens in drawn]


def test_draws_follow_the_probabilities() -> None:
    scores = torch.tensor([[0.0, 1.0, 2.0]])
    counts = torch.zeros(3)
    for number in range(4000):
        counts[draw(scores, [Sampling(1, temperature=0.5, seed=7)], number)] += 1
    torch.testing.assert_close(counts / 4000, (scores[0] / 0.5).softmax(0), rtol=0, atol=0.03)


@calm
@given(st.lists(SAMPLING.filter(lambda way: not way.greedy), min_size=1, max_size=5), st.integers(0, 1000))
def test_the_nucleus_is_the_one_of_transformers(ways: list[Sampling], seed: int) -> None:
    [scores] = steps(seed, 1, len(ways))
    for row, way in zip(scores, ways, strict=True):
        warped = TemperatureLogitsWarper(way.temperature)(None, row[None])
        warped = TopPLogitsWarper(way.top_p)(None, warped) if way.top_p < 1 else warped
        noise = torch.empty(VOCABULARY)
        Draw(way, 0).add_noise(noise)
        assert draw(row[None], [way]) == [int((warped[0].softmax(0) / noise).argmax())]


@calm
@given(
    st.lists(SAMPLING, min_size=1, max_size=5),
    st.sampled_from([float("nan"), float("inf")]),
    st.integers(0, VOCABULARY - 1),
    st.integers(0, 1000),
    st.data(),
)
def test_rows_that_are_not_finite_are_told_and_nothing_is_drawn_beside_them(
    ways: list[Sampling], value: float, place: int, seed: int, data: st.DataObject
) -> None:
    """The step is computed again without them, and then the others draw what they would have drawn without it."""
    [scores] = steps(seed, 1, len(ways))
    bad = data.draw(st.sets(st.integers(0, len(ways) - 1), min_size=1))
    spoilt = scores.clone()
    spoilt[sorted(bad), place] = value
    tokens = draw(spoilt, ways)
    assert [row for row, token in enumerate(tokens) if token == NO_TOKEN] == sorted(bad)
    want = draw(scores, ways)
    assert all(tokens[row] == want[row] for row in range(len(ways)) if row not in bad)
