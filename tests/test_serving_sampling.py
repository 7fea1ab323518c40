"""Draws: greedy is the most likely token, a seed gives the same draws in any company, logprobs are the model's."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from logo.serving.sampling import Drawing, Sampling, next_tokens
from logo.serving.steps import NO_TOKEN
from make_adapters import calm
from tolerances import same_scores

VOCABULARY = 12
SAMPLING = st.builds(
    Sampling,
    max_tokens=st.just(4),
    temperature=st.sampled_from([0.0, 1e-7, 0.5, 1.0, 2.0]),
    top_p=st.sampled_from([0.1, 0.9, 1.0]),
    seed=st.integers(-(2**63), 2**63 - 1),
    logprobs=st.sampled_from([None, 0, 3, 20]),
)


def steps(seed: int, count: int, rows: int) -> torch.Tensor:
    return torch.randn(count, rows, VOCABULARY, generator=torch.Generator().manual_seed(seed)) * 2


@calm
@given(st.lists(SAMPLING, min_size=1, max_size=5), st.integers(0, 1000), st.data())
def test_a_sequence_draws_the_same_alone_as_in_company(ways: list[Sampling], seed: int, data: st.DataObject) -> None:
    scores = steps(seed, 4, len(ways))
    together = [Drawing(way) for way in ways]
    drawn = torch.stack([next_tokens(step, together)[0] for step in scores])
    row = data.draw(st.integers(0, len(ways) - 1))
    alone = Drawing(ways[row])
    assert [int(next_tokens(step[row : row + 1], [alone])[0]) for step in scores] == drawn[:, row].tolist()
    assert alone.logprobs == together[row].logprobs


@calm
@given(SAMPLING, st.integers(0, 1000))
def test_what_is_drawn_is_likely_enough(way: Sampling, seed: int) -> None:
    [[scores]] = steps(seed, 1, 1)
    token = int(next_tokens(scores[None], [Drawing(way)])[0])
    if way.greedy:
        assert token == int(scores.argmax())
        return
    probabilities = (scores / way.temperature).softmax(0)
    above = probabilities[probabilities > probabilities[token]].sum()
    assert above < way.top_p + 1e-5  # the smallest set of the most likely tokens that holds top_p


def test_draws_follow_the_probabilities() -> None:
    scores = torch.tensor([[0.0, 1.0, 2.0]])
    counts = torch.zeros(3)
    drawing = Drawing(Sampling(1, temperature=0.5, seed=7))
    for _ in range(4000):
        counts[next_tokens(scores, [drawing])[0]] += 1
    torch.testing.assert_close(counts / 4000, (scores[0] / 0.5).softmax(0), rtol=0, atol=0.03)


@calm
@given(SAMPLING.filter(lambda way: way.logprobs is not None), st.integers(0, 1000))
def test_logprobs_are_those_of_the_model_whatever_the_temperature(way: Sampling, seed: int) -> None:
    [[scores]] = steps(seed, 1, 1)
    drawing = Drawing(way)
    token = int(next_tokens(scores[None], [drawing])[0])
    [entry] = drawing.logprobs
    want = scores.log_softmax(0)
    assert entry.token == token
    assert entry.logprob == same_scores(float(want[token]))
    assert [value for _, value in entry.top] == same_scores(want.sort(descending=True).values[: way.logprobs].tolist())


def test_a_row_that_cannot_be_drawn_fails_alone(monkeypatch: pytest.MonkeyPatch) -> None:
    def fail(self: Drawing, scores: torch.Tensor) -> torch.Tensor:
        raise torch.OutOfMemoryError("no room to draw")

    monkeypatch.setattr(Drawing, "draw", fail)
    scores = torch.tensor([[0.0, 2.0], [0.0, 1.0]])
    ways = [Drawing(Sampling(1, temperature=1.0, seed=0)), Drawing(Sampling(1))]
    tokens, failed = next_tokens(scores, ways)
    assert list(failed) == [0]
    assert int(tokens[1]) == 1


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
    drawings = [Drawing(way) for way in ways]
    tokens, failed = next_tokens(spoilt, drawings)
    assert [row for row, token in enumerate(tokens.tolist()) if token == NO_TOKEN] == sorted(bad)
    assert not failed
    again, fresh = next_tokens(scores, drawings)[0], next_tokens(scores, [Drawing(way) for way in ways])[0]
    assert again.tolist() == fresh.tolist()
    assert all(len(drawing.logprobs) == (drawing.sampling.logprobs is not None) for drawing in drawings)


def test_tokens_that_a_model_rules_out_are_no_fault() -> None:
    scores = torch.tensor([[0.0, float("-inf")], [float("-inf"), 1.0]])
    ways = [Drawing(Sampling(1, temperature=1.0, seed=0)), Drawing(Sampling(1, logprobs=2))]
    tokens, failed = next_tokens(scores, ways)
    assert (tokens.tolist(), failed) == ([0, 1], {})
