"""Intervals: how often they hold the true value, that none has zero width, and those of means over datasets."""

from __future__ import annotations

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from scipy.stats import norm

from logo.evaluation.corpus import mean_of
from logo.evaluation.intervals import FEWEST, Interval, bootstrap, of_mean, proportion
from logo.evaluation.paired import Pair, difference

COUNTS = st.integers(1, 300).flatmap(lambda rows: st.tuples(st.integers(0, rows), st.just(rows)))
GRADES = st.lists(st.floats(0, 1, width=32), min_size=1, max_size=30)


@given(COUNTS)
@settings(max_examples=60, deadline=None)
def test_wilson_by_its_formula(counts: tuple[int, int]) -> None:
    right, rows = counts
    share, z = right / rows, norm.ppf(0.975)
    middle = (share + z**2 / (2 * rows)) / (1 + z**2 / rows)
    half = z / (1 + z**2 / rows) * np.sqrt(share * (1 - share) / rows + z**2 / (4 * rows**2))
    found = proportion(right, rows)
    assert found == pytest.approx((middle - half, middle + half), abs=1e-9)
    assert 0 <= found.low <= share <= found.high <= 1 and found.low < found.high


@pytest.mark.parametrize("rows", [1, 2, 8, 150])
def test_all_right_is_not_certain(rows: int) -> None:
    """Two right answers of two were `100.00 to 100.00`."""
    interval = mean_of([1.0] * rows).interval()
    assert interval is not None and interval.high == 1 and interval.low < 1 - 1 / (rows + 2)
    assert mean_of([0.0] * rows).interval() == pytest.approx((1 - interval.high, 1 - interval.low))


@given(GRADES)
@settings(max_examples=60, deadline=None)
def test_no_interval_is_of_no_width(values: list[float]) -> None:
    measure = mean_of(values)
    found = measure.interval()
    graded = any(value not in (0, 1) for value in values)
    if graded and (len(values) < FEWEST or len(set(values)) == 1):
        assert found is None  # nothing is known, and nothing is said
    elif found is not None:
        assert found.low < found.high and found.low <= measure.value <= found.high
    assert found == mean_of(values).interval()


def test_drawn_intervals_have_seeds_and_the_width_that_statistics_says() -> None:
    values = np.random.default_rng(1).random(400)
    measure = mean_of(values)
    found = measure.interval(seed=[1])
    half = 1.96 * values.std() / 20
    assert found == pytest.approx((values.mean() - half, values.mean() + half), abs=0.005)
    assert found == measure.interval(seed=[1]) != measure.interval(seed=[2])


def test_drawing_in_parts_draws_as_well(monkeypatch: pytest.MonkeyPatch) -> None:
    measure = mean_of(np.random.default_rng(1).random(60))
    whole = measure.interval()
    monkeypatch.setattr("logo.evaluation.intervals.BATCH", 60 * 2 * 7)
    assert measure.interval() == pytest.approx(whole)


@given(st.lists(st.tuples(st.floats(-1, 1), st.floats(0, 1), st.floats(0, 1)), min_size=1, max_size=6))
def test_the_interval_of_a_mean(parts: list[tuple[float, float, float]]) -> None:
    values = [value for value, _, _ in parts]
    intervals = [Interval(value - below, value + above) for value, below, above in parts]
    found = of_mean(values, intervals)
    assert found is not None and found.low <= np.mean(values) + 1e-12 and found.high >= np.mean(values) - 1e-12
    widths = [high - low for low, high in intervals]
    assert found.high - found.low <= np.mean(widths) + 1e-9  # a mean is known better than its parts are on average
    if len(parts) == 1:
        assert found == pytest.approx(intervals[0])
    assert of_mean(values, [*intervals[:-1], None]) is None


def test_what_has_no_interval_is_refused() -> None:
    for values, intervals in (([], []), ([0.5], [])):
        with pytest.raises(ValueError, match="at least one"):
            of_mean(values, intervals)
    with pytest.raises(ValueError):
        proportion(0, 0)
    assert bootstrap(np.ones((FEWEST - 1, 1)), lambda sums: sums[..., 0], seed=[0]) is None


# -- how often they hold the truth ----------------------------------------------------------------------------------


def coverage(held: list[bool]) -> float:
    return float(np.mean(held))


def test_means_of_shares_are_covered() -> None:
    """Of datasets with 20 rows each, almost all of them right."""
    random, shares = np.random.default_rng(0), (0.97, 0.9, 0.6)
    held = []
    for _ in range(400):
        found = [mean_of((random.random(20) < share).astype(float)) for share in shares]
        interval = of_mean([one.value for one in found], [one.interval() for one in found])
        assert interval is not None
        held.append(interval.low <= np.mean(shares) <= interval.high)
    assert 0.92 <= coverage(held) <= 0.99


@pytest.mark.parametrize(("only_a", "only_b"), [(0.02, 0.05), (0.0, 0.04), (0.2, 0.2), (0.05, 0.6)])
def test_differences_of_shares_are_covered(only_a: float, only_b: float) -> None:
    random, held = np.random.default_rng(1), []
    for _ in range(400):
        draws = random.random(48)
        a, b = draws < only_a, (only_a <= draws) & (draws < only_a + only_b)
        interval = difference([Pair(mean_of(a.astype(float)), mean_of(b.astype(float)))]).interval
        assert interval is not None
        held.append(interval.low <= only_b - only_a <= interval.high)
    assert 0.92 <= coverage(held) <= 1.0


def test_drawn_differences_are_covered() -> None:
    random, held = np.random.default_rng(2), []
    for _ in range(150):
        a = random.beta(2, 3, 60)
        b = np.clip(a + random.normal(0.05, 0.1, 60), -1, 2)
        interval = difference([Pair(mean_of(a), mean_of(b))]).interval
        assert interval is not None
        held.append(interval.low <= 0.05 <= interval.high)
    assert 0.88 <= coverage(held) <= 0.99
