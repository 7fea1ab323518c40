"""Scores to weights."""

from __future__ import annotations

import pickle
from dataclasses import replace

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from logo.core import Options, Selection
from logo.errors import ModelError, NotFinite, PoolError, Unsure
from logo.selection.selector import (
    BEST,
    EXAMPLES,
    HALVED,
    LEAST,
    RESPONSES,
    UNSURE,
    USUAL_SIZE,
    Evidence,
    Selector,
    relative_sizes,
)

SCORES = st.lists(st.floats(-30, 30, width=32), min_size=1, max_size=40)


def select(
    scores: list[float],
    k: int | None = None,
    evidence: Evidence | None = RESPONSES,
    sizes: dict[str, float] | None = None,
    **how: object,
) -> Selection:
    selector = Selector(tuple(f"a{i:02}" for i in range(len(scores))), 20, evidence, sizes or {})
    options = {"weighting": "linear", "when_unsure": "mix", "unsure_below": UNSURE, "candidates": None, **how}
    return selector(torch.tensor(scores), Options("calibrated", k, **options))  # type: ignore[arg-type]


@given(SCORES, st.integers(1, 45), st.sampled_from(["linear", "adaptive"]))
@settings(max_examples=150, deadline=None)
def test_any_scores_make_a_mixture(scores: list[float], k: int, weighting: str) -> None:
    whole = select(scores, k, weighting=weighting)
    sum_ = (
        1.0
        if weighting != "adaptive" or whole.confidence is None
        else RESPONSES.weight_sum(whole.confidence, USUAL_SIZE)
    )
    assert sum(whole.weights) == pytest.approx(sum_, abs=1e-4)
    assert all(0 <= weight <= 1 for weight in whole.weights)
    assert list(whole.weights) == sorted(whole.weights, reverse=True)
    if weighting == "adaptive":
        assert len(whole.adapters) <= min(k, len(scores)) and whole.weights[-1] >= LEAST * whole.weights[0] * (1 - 1e-5)
    else:
        assert len(whole.adapters) == min(k, len(scores))


def test_linear_weights_are_the_papers() -> None:
    assert select([1.0, 3.0, 0.0], k=2).weights == pytest.approx((0.75, 0.25))
    assert select([0.0, 0.0]).weights == (0.5, 0.5)
    assert select([-1.0, 2.0, 1.0]).weights == pytest.approx((2 / 3, 1 / 3, 0))


REST = [1.2, 1.0, 0.8, 0.5, 0.3, 0.0, -0.4]  # the mean of the first five: 0.76


def confidence(*ranked: float, evidence: Evidence = RESPONSES) -> float:
    return evidence.confidence(torch.tensor(ranked))


@pytest.mark.parametrize("evidence", [RESPONSES, EXAMPLES])
def test_confidence_follows_the_lead_and_the_best_score(evidence: Evidence) -> None:
    best = (0.76 + evidence.even) / (1 + BEST)
    assert confidence(best, *REST, evidence=evidence) == pytest.approx(0.5, abs=1e-4)
    raised = [score + 1 for score in (best, *REST)]  # the same lead
    assert confidence(*raised, evidence=evidence) > 0.5
    assert confidence(60.0, *REST, evidence=evidence) > 0.999
    assert confidence(1.2, *REST, evidence=evidence) < 0.5


@given(SCORES, st.floats(0, 5))
@settings(deadline=None)
def test_confidence_is_a_probability_that_grows_with_the_best_score(scores: list[float], more: float) -> None:
    ranked = sorted(scores, reverse=True)
    before, after = confidence(*ranked), confidence(ranked[0] + more, *ranked[1:])
    assert 0 <= before <= after <= 1


def test_sharp_when_sure_and_broad_when_not() -> None:
    temperature = Evidence(2.0, 1.0, ((0.25, 7.0), (0.4, 1.57), (0.75, 1.57), (0.8, 0.31))).temperature
    assert temperature(0.25) == temperature(0.0) == pytest.approx(3.5)
    assert temperature(0.4) == temperature(0.75) == pytest.approx(0.785)
    assert temperature(0.8) == temperature(1.0) == pytest.approx(0.155)
    assert temperature(0.325) == pytest.approx((0.785 * 3.5) ** 0.5, rel=1e-4)  # half-way on a scale of logarithms
    steeper = Evidence(4.0, 1.0, RESPONSES.temperatures)  # smaller differences of scores count
    assert steeper.temperature(0.5) == pytest.approx(0.3925)
    found = [temperature(confidence / 100) for confidence in range(101)]
    assert found == sorted(found, reverse=True)
    assert RESPONSES.temperature(0.4) == RESPONSES.temperature(1.0)  # they are sometimes sure of a related task
    assert EXAMPLES.temperature(0.4) > 4 * EXAMPLES.temperature(1.0)
    assert EXAMPLES.temperature(0.0) == EXAMPLES.temperature(0.05) > 4 * EXAMPLES.temperature(0.15)


def test_unsure_mixtures_are_weaker_the_larger_their_adapters_are() -> None:
    total, examples = RESPONSES.weight_sum, EXAMPLES.weight_sum
    assert examples(0.05, HALVED) == examples(0.0, HALVED) == pytest.approx(0.5)
    assert examples(0.1, HALVED) == pytest.approx(0.5**0.5)
    assert examples(0.15, HALVED) == 1
    assert total(0.9, 5.0) == total(0.4, 5.0) == total(0.0, 0.0) == 1
    assert total(0.25, HALVED) == total(0.0, HALVED) == pytest.approx(0.5)
    assert total(0.325, HALVED) == pytest.approx(0.5**0.5)
    assert total(0.0, 3 * HALVED) == pytest.approx(0.25)
    scores, how = [1.25, *REST], {"k": 2, "weighting": "adaptive"}
    alike = select(scores, sizes={f"a{i:02}": HALVED for i in range(8)}, **how)  # type: ignore[arg-type]
    assert sum(alike.weights) == pytest.approx(0.5, rel=1e-5)
    first, second = (weight / sum(alike.weights) for weight in alike.weights)
    sizes = {"a00": 0.0, "a01": HALVED, "a02": 9.0}  # one that is not selected does not count
    found = select(scores, sizes=sizes, **how)  # type: ignore[arg-type]
    assert found.weights == pytest.approx([w / (1 + second) for w in (first, second)], rel=1e-5)
    usual = select(scores, sizes={"a00": USUAL_SIZE}, **how)  # type: ignore[arg-type]
    assert usual == select(scores, **how)  # type: ignore[arg-type]


@pytest.mark.parametrize(("when", "adapters"), [("base", ()), ("mix", ("a00", "a01"))])
def test_what_answers_where_nothing_stands_out(when: str, adapters: tuple[str, ...]) -> None:
    found = select([1.21, *REST], 2, weighting="adaptive", when_unsure=when)
    assert found.adapters == adapters
    assert found.confidence is not None and found.confidence < UNSURE
    assert sum(found.weights) == pytest.approx(RESPONSES.weight_sum(0.0, USUAL_SIZE) if adapters else 0.0)
    sure = select([9.0, *REST], 2, weighting="adaptive", when_unsure=when)
    assert sure.adapters == ("a00",)  # the other one's weight is negligible


def test_an_unsure_selection_may_be_refused() -> None:
    with pytest.raises(Unsure, match=r"confidence 0\.\d\d, expected 0\.15 or more") as caught:
        select([1.21, *REST], when_unsure="refuse")
    same = pickle.loads(pickle.dumps(caught.value))
    assert (str(same), same.confidence) == (str(caught.value), caught.value.confidence) and same.confidence < UNSURE
    assert same.scores == caught.value.scores == select([1.21, *REST]).scores
    assert select([9.0, *REST], when_unsure="refuse").adapters


def test_what_is_unsure_can_be_said() -> None:
    between = select([1.8, *REST]).confidence
    assert between is not None and UNSURE < between < 0.9
    for below, adapters in ((between - 0.01, ("a00", "a01")), (between + 0.01, ())):
        found = select([1.8, *REST], 2, weighting="adaptive", when_unsure="base", unsure_below=below)
        assert found.adapters == adapters
    with pytest.raises(Unsure, match=r"expected 0\.9 or more"):
        select([1.8, *REST], when_unsure="refuse", unsure_below=0.9)


def test_scores_without_a_scale_have_no_confidence() -> None:
    assert select([1.3, *REST], evidence=None).confidence is None
    assert select([1.3, *REST], evidence=None, when_unsure="base").adapters  # nothing is known, so nothing is refused


def test_nothing_above_its_baseline_is_no_evidence() -> None:
    assert confidence(-0.1, -4.0, -5.0, -6.0) == 0.0
    assert confidence(3.0) == 0.5
    assert confidence(3.0, 3.0) < UNSURE


def test_ties_go_to_the_earlier_name() -> None:
    assert select([1.0, 2.0, 2.0, 2.0], k=2).adapters == ("a01", "a02")


def test_a_score_that_is_not_a_number_is_named() -> None:
    with pytest.raises(ModelError, match="'a01' is not finite"):
        select([1.0, float("nan")])
    assert select([1.0, float("nan")], candidates=frozenset({"a00"})).scores == {"a00": 1.0}
    selector, call = Selector(("a", "b"), 20, RESPONSES), Options("norm", None, "linear", "mix", 0.1, frozenset({"c"}))
    assert isinstance(selector.outcome(torch.tensor([1.0, torch.inf]), replace(call, candidates=None)), NotFinite)
    with pytest.raises(PoolError, match="none of the 1 candidates touches what the signal 'norm' reads"):
        selector(torch.tensor([1.0, 2.0]), call)


def test_an_unknown_size_is_the_usual_one() -> None:
    touched = torch.tensor([[True, True], [True, False], [False, True], [False, False]])
    updates = [torch.tensor([0.2, 0.4]), torch.tensor([0.1, 0.3])]
    assert relative_sizes(updates, [2.0, 1.0], touched).tolist() == pytest.approx([0.1, 0.2, 0.3, USUAL_SIZE])
    found = relative_sizes(updates, [2.0, float("nan")], touched).tolist()
    assert found == pytest.approx([0.1, 0.2, USUAL_SIZE, USUAL_SIZE])
