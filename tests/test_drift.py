"""Levels of adapters in the traffic: bounded, in order, and what a running reference and a gauge make of them."""

from __future__ import annotations

import math

from hypothesis import given
from hypothesis import strategies as st

from logo.selection.drift import MOST, RATE, Drift

SCORES = st.floats(-30, 30)
TRAFFIC = st.lists(st.fixed_dictionaries({"a": SCORES, "b": SCORES, "c": SCORES}), max_size=60)


@given(TRAFFIC)
def test_no_prompt_moves_a_level_far_and_no_score_is_corrected_by_much(traffic: list[dict[str, float]]) -> None:
    drift = Drift()
    assert drift.corrections("abc") == {} and drift.middle == 0.0
    for scores in traffic:
        before = dict(drift.levels)
        drift.see(scores)
        for name, level in drift.levels.items():
            was = before.get(name, 0.0)
            assert abs(level - was) <= RATE * (1 + 1e-9)
            assert min(was, scores[name]) - 1e-9 <= level <= max(was, scores[name]) + 1e-9
    assert all(abs(taken) <= MOST for taken in drift.corrections("abc").values())
    assert math.isclose(sorted(drift.shifts.values())[1], 0.0) if traffic else not drift.shifts


@given(TRAFFIC, st.floats(-3, 3))
def test_what_all_adapters_have_in_common_is_left_out(traffic: list[dict[str, float]], more: float) -> None:
    """Adapters that respond alike are not told apart, however far from neutral text the traffic is."""
    drift = Drift()
    for scores in traffic:
        drift.see(dict.fromkeys("abc", scores["a"] + more))
    assert all(shift == 0 for shift in drift.shifts.values())


def test_an_adapter_with_less_than_half_of_the_traffic_keeps_most_of_its_lead() -> None:
    """Its own prompts count like any others: 6 standard deviations in each of them hardly move it."""
    drift = Drift()
    for i in range(3000):
        drift.see({"own": 6.0 if i % 10 < 3 else 0.0, "other": 0.0, "third": 0.0})
    assert 0.3 < drift.shifts["own"] < 0.5


def test_one_that_responds_to_everything_is_found_and_corrected() -> None:
    drift = Drift()
    for _ in range(1000):
        drift.see({"loud": 2.0, "a": 0.0, "b": 0.1})
    assert drift.shifts["loud"] > 1.8 and drift.corrections(drift.levels)["loud"] == MOST


def test_levels_go_on_from_others_and_forget() -> None:
    first = Drift()
    first.see({"a": 1.0, "b": 1.0})
    second = Drift(first.levels)
    second.see({"a": 1.0})
    assert second.levels["a"] > first.levels["a"] == first.levels["b"] == second.levels["b"]
    second.keep({"b"})
    assert set(second.levels) == {"b"} and set(first.levels) == {"a", "b"}


def test_one_that_is_new_is_as_usual_as_the_others() -> None:
    """Where all traffic is far from neutral text, it must neither gain nor lose by the levels of the others."""
    drift = Drift()
    for _ in range(1000):
        drift.see({"a": 2.0, "b": 2.0})
    drift.see({"a": 2.0, "b": 2.0, "new": 2.0})
    assert abs(drift.shifts["new"]) < RATE
