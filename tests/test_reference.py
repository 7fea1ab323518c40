"""What responses are compared with, contrast and choice of points, weights of tokens, and the unit of scores."""

from __future__ import annotations

import math

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from logo.selection.points import LEAST_POINTS
from logo.selection.reference import (
    FADING,
    FEW,
    USUAL,
    Reference,
    both_means,
    choose,
    contrast,
    emphasis,
    factors,
    row_means,
)
from tolerances import same_tensor

SIZES = st.tuples(st.integers(1, 6), st.integers(1, 5), st.integers(2, 12))


def responses(size: tuple[int, ...], seed: int = 0) -> torch.Tensor:
    return torch.randn(size, generator=torch.Generator().manual_seed(seed))


@given(SIZES, st.integers(0, 99))
@settings(max_examples=60, deadline=None)
def test_a_neutral_text_scores_nothing_on_average(size: tuple[int, int, int], seed: int) -> None:
    neutral = responses(size, seed)
    scores = Reference.of(neutral).compare(neutral)  # (texts, adapters)
    assert scores.shape == (size[2], size[0])
    torch.testing.assert_close(scores.mean(dim=0), torch.zeros(size[0]), atol=2e-4, rtol=0)


@given(SIZES, st.integers(0, 99), st.floats(-20, 20), st.floats(0.5, 50))
@settings(max_examples=60, deadline=None)
def test_size_does_not_count(size: tuple[int, int, int], seed: int, shift: float, stretch: float) -> None:
    """An adapter's scores do not change when all its log responses are moved, as by scaling its weights."""
    neutral, prompts = responses(size, seed), responses((*size[:2], 4), seed + 100)
    plain = Reference.of(neutral).compare(prompts)
    moved = torch.zeros(size[0], 1, 1)
    moved[0] = shift
    torch.testing.assert_close(Reference.of(neutral + moved).compare(prompts + moved), plain, atol=2e-3, rtol=1e-3)


@given(SIZES.filter(lambda size: size[2] > 2), st.integers(0, 99))
@settings(max_examples=60, deadline=None)
def test_trust_only_takes_away(size: tuple[int, int, int], seed: int) -> None:
    """Nobody gains by having been quiet; at least half of the adapters keep their scores."""
    trust = Reference.of(responses(size, seed), responses((*size[:2], 9), seed + 100)).trust
    assert ((trust > 0) & (trust <= 1)).all()
    assert 2 * int((trust == 1).sum()) >= size[0]


def test_what_most_requests_excite_has_to_stand_out_further() -> None:
    """An adapter whose z is higher for every request loses that lead, but no more than one standard deviation of it."""
    neutral, requests, prompts = responses((5, 4, 60)), responses((5, 4, 81), 1), responses((5, 4, 6), 2)
    plain = Reference.of(neutral, requests)
    for more in (0.5, 30.0):
        shift = torch.zeros(5, 1, 1)
        shift[0] = more
        found = Reference.of(neutral, requests + shift)
        assert (found.excess.abs() <= 1).all()
        assert float(found.excess[0] - plain.excess[0]) == pytest.approx(min(more, 1 - float(plain.excess[0])), abs=0.2)
        torch.testing.assert_close(found.excess[1:], plain.excess[1:], atol=0.1, rtol=0)
        want = (found.z(prompts).mean(dim=1) - found.excess[:, None]) * found.trust[:, None]
        same_tensor(found.compare(prompts), want.T)
    same_tensor(Reference.of(neutral).excess, torch.zeros(5))
    same_tensor(Reference.of(neutral, requests[..., :0]).excess, torch.zeros(5))


def test_a_request_that_overflowed_silences_its_adapter_and_no_other() -> None:
    neutral, requests, prompts = responses((4, 2, 30)), responses((4, 2, 20), 1), responses((4, 2, 5), 2)
    requests[3, :, 7] = torch.nan
    scores = Reference.of(neutral, requests).compare(prompts)
    assert scores.isfinite().all()
    assert (scores[:, 3] <= scores[:, :3].min(dim=1).values).all()


@pytest.mark.parametrize("nothing", [-torch.inf, torch.nan])
def test_an_adapter_scores_over_the_points_it_has(nothing: float) -> None:
    neutral, prompts = responses((4, 3, 60)), responses((4, 3, 8), 1)
    whole = Reference.of(neutral)
    neutral[1, 0], prompts[1, 0] = nothing, nothing
    baseline = Reference.of(neutral)
    scores = baseline.compare(prompts)
    assert scores.isfinite().all()
    others = [0, 2, 3]
    trusted = whole.trust[others] / baseline.trust[others]  # what is usual depends on all adapters
    same_tensor(scores[:, others] * trusted, whole.compare(prompts)[:, others])
    z = (prompts[1, 1:] - neutral[1, 1:].mean(1, keepdim=True)) / neutral[1, 1:].std(1, keepdim=True)
    same_tensor(scores[:, 1], z.mean(dim=0) * baseline.trust[1])
    assert 0 < baseline.trust[1] < 1  # two points swing more than three


def test_an_adapter_of_one_point_does_not_win_by_noise() -> None:
    """With responses that say nothing, an adapter heard at one of twenty points wins about as often as any other."""
    neutral, prompts = responses((10, 20, 96)), responses((10, 20, 4000), 1)
    neutral[0, 1:] = prompts[0, 1:] = torch.nan
    wins = Reference.of(neutral).compare(prompts).argmax(dim=1).bincount(minlength=10) / 4000
    assert wins[0] < 0.2  # 0.1 would be its share; without scaling it is above 0.5


def test_a_silent_adapter_never_wins() -> None:
    """Nor does one that another alone competes with, whose names come in any order."""
    neutral, prompts = responses((3, 2, 30)), responses((3, 2, 40), 1) - 3  # all below their baselines
    neutral[0] = prompts[0] = -torch.inf
    for count in (2, 3):
        reference = Reference.of(neutral[:count])
        scores = reference.compare(prompts[:count]) * factors(torch.tensor([2] * 40))[:, None]
        assert scores.isfinite().all()
        assert (scores[:, 0] < scores[:, 1:].min(dim=1).values).all()
    alone = Reference.of(neutral[:1]).compare(prompts[:1])
    assert (alone == 0).all()


def test_contrast_finds_the_point_where_adapters_differ() -> None:
    neutral, requests = responses((6, 3, 50)), responses((6, 3, 36), 1)
    for i in range(36):
        requests[i % 6, 1, i] += 5  # at point 1 every request excites one adapter
    requests[:, 2] += 5 * responses((36,), 2)  # at point 2 some requests excite all of them, which tells nothing
    values = contrast(neutral, requests)
    assert values.argmax() == 1
    assert float(values[2]) == pytest.approx(float(values[0]), abs=0.3)
    assert choose(neutral, requests, most=1, enough=1.0) == [1]


def test_fewer_points_are_enough_where_they_agree() -> None:
    signal = 3 * responses((6, 1, 40), 3)
    neutral, requests = responses((6, 8, 50)), responses((6, 8, 40), 1) + signal
    most = choose(neutral, requests, most=8, enough=1.0)
    few = choose(neutral, requests, most=8, enough=0.97, each=1)
    assert sorted(most) == list(range(8))
    assert len(few) < 8
    assert most[: len(few)] == few
    z = Reference.of(neutral).z(requests)[:, most]
    agreement = torch.corrcoef(z.cumsum(dim=1).transpose(0, 1).flatten(1))[-1]
    assert agreement[len(few) - 1] >= 0.97 > agreement[len(few) - 2]
    assert len(few) < LEAST_POINTS and choose(neutral, requests, most=8, enough=0.97) == most[:LEAST_POINTS]


def test_every_adapter_is_heard_at_some_chosen_point() -> None:
    neutral, requests = responses((5, 10, 50)), 3 * responses((5, 10, 40), 1)
    neutral[4, :7] = requests[4, :7] = torch.nan  # touches the last three points only
    requests[:4, 7:] = neutral[:4, 7:] = torch.nan
    chosen = choose(neutral, requests, most=4, enough=1.0)
    assert {7, 8, 9} <= set(chosen)
    assert len(chosen) == 7


@pytest.mark.slow
@given(st.integers(0, 999), st.integers(1, 12))
@settings(max_examples=60, deadline=None)
def test_the_order_of_adapters_does_not_matter_and_each_is_read_at_four_points(seed: int, most: int) -> None:
    size, generator = (6, 10), torch.Generator().manual_seed(seed)
    neutral = torch.randn(*size, 40, generator=generator)
    # What all points say alike, so that few of them agree with many.
    requests = torch.randn(*size, 30, generator=generator) / 4 + 4 * torch.randn(6, 1, 30, generator=generator)
    touched = torch.rand(size, generator=generator) < 0.5
    touched[:3] = True
    neutral[~touched] = requests[~touched] = torch.nan
    chosen = choose(neutral, requests, most, enough=0.985)
    assert set(choose(neutral.flip(0), requests.flip(0), most, enough=0.985)) == set(chosen)
    assert (touched[:, chosen].sum(dim=1) >= touched.sum(dim=1).clamp(max=min(most, LEAST_POINTS))).all()


@given(st.lists(st.integers(1, 40), min_size=1, max_size=9))
def test_few_tokens_count_less_than_many(tokens: list[int]) -> None:
    read = torch.tensor(sorted(tokens))
    found = factors(read)
    assert (found[1:] >= found[:-1]).all()
    assert ((found < 1 - 1e-6) == (read < USUAL)).all()


def test_scores_by_chance_lie_as_far_apart_for_every_length() -> None:
    """A part of each token's response belongs to the token alone, and the rest to the whole prompt."""

    def drawn(texts: int, tokens: int) -> torch.Tensor:
        own = responses((texts, 30, tokens), tokens).mean(dim=2) * math.sqrt(FEW)
        return responses((texts, 30), 99) + own + responses((texts, 1), 98)

    pool = Reference.of(drawn(200, USUAL).T[:, None])
    usual = float(pool.compare(drawn(200, USUAL).T[:, None]).var(dim=1).mean().sqrt())
    for tokens in (1, 3, USUAL):
        scores = factors(torch.tensor([tokens])) * pool.compare(drawn(400, tokens).T[:, None])
        assert float(scores.var(dim=1).mean().sqrt()) == pytest.approx(usual, rel=0.1)


@given(st.lists(st.integers(0, 3), min_size=1, max_size=40))
def test_late_weights_fall_towards_the_beginning_of_each_row(owners: list[int]) -> None:
    want = [FADING ** owners[i + 1 :].count(owner) for i, owner in enumerate(owners)]
    weights, sums = emphasis(torch.tensor(owners), 5)
    assert weights.tolist() == [[1.0, pytest.approx(one)] for one in want]
    for row in range(5):
        assert sums[row].tolist() == pytest.approx(weights[torch.tensor(owners) == row].sum(dim=0).tolist())


def test_late_means_follow_the_end_and_even_means_do_not() -> None:
    values, owners = torch.tensor([[8.0], [0.0], [0.0], [4.0]]), torch.tensor([0, 0, 0, 1])
    same_tensor(row_means(values, owners, 2).flatten(), torch.tensor([8 / 3, 4.0]))
    even, late = both_means(values, owners, *emphasis(owners, 2))[:, :, 0].T
    same_tensor(even, torch.tensor([8 / 3, 4.0]))
    same_tensor(late, torch.tensor([8 * FADING**2 / (1 + FADING + FADING**2), 4.0]))
