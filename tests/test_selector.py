"""Scores to weights."""

from __future__ import annotations

import math
import pickle
from dataclasses import replace

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from logo.core import Options, Selection
from logo.errors import ModelError, NotFinite, PoolError, Unsure
from logo.selection.selector import (
    APART,
    EXAMPLES,
    HALVED,
    LEAST,
    PRIOR,
    RESPONSES,
    UNSURE,
    USUAL_COUNT,
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
    options = {
        "weighting": "linear",
        "when_unsure": "mix",
        "unsure_below": UNSURE,
        "prior": PRIOR,
        "candidates": None,
        **how,
    }
    return selector(torch.tensor(scores), Options("calibrated", k, **options))  # type: ignore[arg-type]


@given(SCORES, st.integers(1, 45), st.sampled_from(["linear", "adaptive"]))
@settings(max_examples=150, deadline=None)
def test_any_scores_make_a_mixture(scores: list[float], k: int, weighting: str) -> None:
    whole = select(scores, k, weighting=weighting)
    assert all(0 <= weight <= 1 + 1e-6 for weight in whole.weights)
    assert list(whole.weights) == sorted(whole.weights, reverse=True)
    if weighting == "adaptive":
        least = 1 / (1 + USUAL_SIZE / HALVED)
        assert whole.confidence is not None
        share = whole.confidence
        assert sum(whole.weights) == pytest.approx(share + (1 - share) * least, abs=1e-4)
        assert len(whole.adapters) <= min(k, len(scores)) and whole.weights[-1] >= LEAST * whole.weights[0] * 0.8
    else:
        assert sum(whole.weights) == pytest.approx(1, abs=1e-4)
        assert len(whole.adapters) == min(k, len(scores))


def test_linear_weights_are_the_papers() -> None:
    assert select([1.0, 3.0, 0.0], k=2).weights == pytest.approx((0.75, 0.25))
    assert select([0.0, 0.0]).weights == (0.5, 0.5)
    assert select([-1.0, 2.0, 1.0]).weights == pytest.approx((2 / 3, 1 / 3, 0))


REST = [1.2, 1.0, 0.8, 0.5, 0.3, 0.0, -0.4]


def confidence(*ranked: float, evidence: Evidence = RESPONSES, prior: float = PRIOR) -> float:
    return evidence.confidence(ranked, prior)


@pytest.mark.parametrize("evidence", [RESPONSES, EXAMPLES])
def test_the_confidence_is_the_formula(evidence: Evidence) -> None:
    others = REST[1:]  # the best two do not count
    predictive = math.sqrt((6 * np.var(others) + USUAL_COUNT * APART**2) / (6 + USUAL_COUNT) * (1 + 1 / 6))
    spread = predictive if evidence.spreads else 1.0
    mean = sum(others) / 6
    assert confidence(mean + evidence.even * spread, *REST, evidence=evidence) == pytest.approx(0.5)
    odds = evidence.steepness * (2.5 - evidence.even)
    assert confidence(mean + 2.5 * spread, *REST, evidence=evidence) == pytest.approx(1 / (1 + math.exp(-odds)))
    lower = [score - 30 for score in (2.0, *REST)]  # the same margin
    assert confidence(*lower, evidence=evidence) == pytest.approx(confidence(2.0, *REST, evidence=evidence))
    only_two = (confidence(2.0, 1.0, evidence=evidence), confidence(2.0, 1.9, evidence=evidence))
    assert only_two[0] > only_two[1]


def test_scores_in_other_words_are_as_sure_if_example_prompts_contribute() -> None:
    """All their scores fall. But scores that are no further apart than by chance are no evidence."""
    usual = [100.0, *(20 * score for score in REST)]
    for times in (2, 4, 8):
        louder = [times * score for score in usual]
        assert confidence(*louder, evidence=EXAMPLES) == pytest.approx(confidence(*usual, evidence=EXAMPLES), abs=0.05)
    for evidence in (RESPONSES, EXAMPLES):
        quiet = [0.01 * score for score in usual]
        assert confidence(*quiet, evidence=evidence) < 0.25 < confidence(*usual, evidence=evidence)


@pytest.mark.parametrize("evidence", [RESPONSES, EXAMPLES])
def test_a_margin_means_the_same_in_pools_of_any_size(evidence: Evidence) -> None:
    """Also of two or three adapters, whose scores may lie close together by chance."""
    others = [1.2, -1.2, *[0.6, -0.6] * 20]
    sure = evidence.even + 4
    for count in (1, 2, 4, 8, 40):
        ranked = sorted(others[:count], reverse=True)
        assert confidence(0.8, *ranked, evidence=evidence) < 0.3
        assert confidence(3 * sure, 0.0, *ranked, evidence=evidence) > 0.9


@pytest.mark.parametrize("evidence", [RESPONSES, EXAMPLES])
def test_two_versions_of_one_adapter_do_not_make_each_other_unsure(evidence: Evidence) -> None:
    for best in (4.0, 6.0, 8.0):
        alone = confidence(best, *REST, evidence=evidence)
        assert confidence(best, best, *REST, evidence=evidence) == pytest.approx(alone, abs=0.06)


@given(SCORES, st.floats(0, 5), st.floats(0.01, 0.99), st.sampled_from([RESPONSES, EXAMPLES]))
def test_confidence_is_a_probability_that_grows_with_the_best_score_and_the_prior(
    scores: list[float], more: float, prior: float, evidence: Evidence
) -> None:
    ranked = sorted(scores, reverse=True)
    before = confidence(*ranked, evidence=evidence, prior=prior)
    after = confidence(ranked[0] + more, *ranked[1:], evidence=evidence, prior=prior)
    assert 0 <= before <= after <= 1
    assert confidence(*ranked, evidence=evidence, prior=(1 + prior) / 2) >= before


def test_the_prior_moves_the_confidence_as_bayes_rule_does() -> None:
    def odds(p: float) -> float:
        return p / (1 - p)

    for prior in (0.05, 0.5, 0.95):
        found, usual = confidence(2.0, *REST, prior=prior), confidence(2.0, *REST)
        assert odds(found) / odds(usual) == pytest.approx(odds(prior) / odds(PRIOR))
        assert confidence(2.0, prior=prior) == prior  # of one adapter, scores say nothing
        assert select([2.0, *REST], prior=prior).confidence == pytest.approx(found, rel=1e-5)


@pytest.mark.parametrize("evidence", [RESPONSES, EXAMPLES])
def test_weights_are_those_of_a_sharp_and_a_broad_mixture_as_the_confidence_says(evidence: Evidence) -> None:
    scores = [2.9, 2.8, *REST]
    p = confidence(*scores, evidence=evidence)
    q = evidence.boldness * p / (evidence.boldness * p + 1 - p)
    ranked = np.array(scores[:5]) / evidence.spread(scores)
    assert 0.05 < p < 0.95
    sharp, broad = np.exp(ranked / evidence.sharpness), np.exp(ranked / evidence.breadth)
    sharp, broad = sharp / sharp.sum(), broad / broad.sum()
    sizes = {f"a{i:02}": HALVED * (i + 1) for i in range(8)}
    size = sum(weight * HALVED * (i + 1) for i, weight in enumerate(broad))
    found = select(scores, 5, evidence, weighting="adaptive", sizes=sizes)
    assert found.adapters == tuple(f"a{i:02}" for i in range(5))
    assert found.weights == pytest.approx(q * sharp + (1 - q) * broad / (1 + size / HALVED), rel=1e-5)
    halved = select(scores, 5, evidence, weighting="adaptive", sizes=dict.fromkeys(sizes, HALVED), prior=1e-9)
    assert sum(halved.weights) == pytest.approx(0.5, rel=1e-5)  # nothing but the broad mixture
    usual = select(scores, 5, evidence, weighting="adaptive", sizes={"a00": USUAL_SIZE})
    assert usual == select(scores, 5, evidence, weighting="adaptive")


def test_what_is_left_out_is_the_best_ones() -> None:
    scores = [4.5, *REST]
    every, p = select(scores, weighting="adaptive", sizes={"a00": 0.0, "a01": 0.0}), confidence(*scores)
    assert p > 0.9 and every.adapters == ("a00",) and p < every.weights[0] <= 1


@pytest.mark.parametrize(("when", "adapters"), [("base", ()), ("mix", ("a00", "a01"))])
def test_what_answers_where_nothing_stands_out(when: str, adapters: tuple[str, ...]) -> None:
    found = select([1.21, *REST], 2, weighting="adaptive", when_unsure=when)
    assert found.adapters == adapters
    assert found.confidence is not None and found.confidence < UNSURE
    sure = select([9.0, *REST], 2, weighting="adaptive", when_unsure=when)
    assert sure.adapters == ("a00",)  # the other one's weight is negligible


def test_an_unsure_selection_may_be_refused() -> None:
    with pytest.raises(Unsure, match=r"confidence 0\.\d\d, expected 0\.5 or more") as caught:
        select([1.21, *REST], when_unsure="refuse")
    same = pickle.loads(pickle.dumps(caught.value))
    assert (str(same), same.confidence) == (str(caught.value), caught.value.confidence) and same.confidence < UNSURE
    assert same.scores == caught.value.scores == select([1.21, *REST]).scores
    assert select([9.0, *REST], when_unsure="refuse").adapters


def test_what_is_unsure_can_be_said() -> None:
    between = select([3.5, *REST]).confidence
    assert between is not None and UNSURE < between < 0.9
    for below, adapters in ((between - 0.01, ("a00", "a01")), (between + 0.01, ())):
        found = select([3.5, *REST], 2, weighting="adaptive", when_unsure="base", unsure_below=below)
        assert found.adapters == adapters
    with pytest.raises(Unsure, match=r"expected 0\.9 or more"):
        select([3.5, *REST], when_unsure="refuse", unsure_below=0.9)


def test_scores_without_a_scale_have_no_confidence() -> None:
    assert select([1.3, *REST], evidence=None).confidence is None
    assert select([1.3, *REST], evidence=None, when_unsure="base").adapters  # nothing is known, so nothing is refused


def test_equal_scores_are_no_evidence() -> None:
    assert confidence(3.0, 3.0) == confidence(*[3.0] * 9) < UNSURE


def test_ties_go_to_the_earlier_name() -> None:
    assert select([1.0, 2.0, 2.0, 2.0], k=2).adapters == ("a01", "a02")


def test_a_score_that_is_not_a_number_is_named() -> None:
    with pytest.raises(ModelError, match="'a01' is not finite"):
        select([1.0, float("nan")])
    assert select([1.0, float("nan")], candidates=frozenset({"a00"})).scores == {"a00": 1.0}
    selector = Selector(("a", "b"), 20, RESPONSES)
    call = Options("norm", None, "linear", "mix", 0.1, 0.8, frozenset({"c"}))
    assert isinstance(selector.outcome(torch.tensor([1.0, torch.inf]), replace(call, candidates=None)), NotFinite)
    with pytest.raises(PoolError, match="none of the 1 candidates touches what the signal 'norm' reads"):
        selector(torch.tensor([1.0, 2.0]), call)


def test_an_unknown_size_is_the_usual_one() -> None:
    touched = torch.tensor([[True, True], [True, False], [False, True], [False, False]])
    updates = [torch.tensor([0.2, 0.4]), torch.tensor([0.1, 0.3])]
    assert relative_sizes(updates, [2.0, 1.0], touched).tolist() == pytest.approx([0.1, 0.2, 0.3, USUAL_SIZE])
    found = relative_sizes(updates, [2.0, float("nan")], touched).tolist()
    assert found == pytest.approx([0.1, 0.2, USUAL_SIZE, USUAL_SIZE])
