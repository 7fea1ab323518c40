"""Paired comparisons against scipy, against closed forms, and against themselves with the runs swapped."""

from __future__ import annotations

import itertools
from dataclasses import astuple

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from logo.evaluation.corpus import Corpus, corpora, mean_of
from logo.evaluation.paired import SWAPS, Pair, Record, difference, holm, record, significance

# Differences that are smaller than rounding count as none, so values are a thousandth apart.
VALUES = st.one_of(st.integers(0, 1), st.integers(0, 1000).map(lambda n: n / 1000))
RUNS = st.lists(st.tuples(VALUES, VALUES), min_size=1, max_size=12)
BINARY = st.lists(st.tuples(st.integers(0, 1), st.integers(0, 1)), min_size=1, max_size=40)
WORDS = st.lists(st.sampled_from(["the", "cat", "sat", "on", "a", "mat"]), max_size=8).map(" ".join)


def pair(values: list[tuple[float, float]]) -> Pair:
    return Pair(mean_of([a for a, _ in values]), mean_of([b for _, b in values]))


def turned(one: Pair) -> Pair:
    return Pair(one.b, one.a)


def normal(size: int, shift: float, seed: int = 0) -> Pair:
    """Two runs with unit noise between them and a difference of `shift`."""
    a, noise = np.random.default_rng(seed).normal(size=(2, size))
    return Pair(mean_of(list(a)), mean_of(list(a + noise + shift)))


# -- swapping the runs ----------------------------------------------------------------------------------------------


@given(st.lists(RUNS, min_size=1, max_size=3))
@settings(max_examples=30, deadline=None)
def test_swapping_the_runs_turns_every_number_around(runs: list[list[tuple[float, float]]]) -> None:
    pairs = [pair(values) for values in runs]
    there, back = difference(pairs), difference([turned(one) for one in pairs])
    assert (back.a, back.b, back.value) == pytest.approx((there.b, there.a, -there.value))
    assert (there.interval is None) == (back.interval is None)
    if there.interval is not None and back.interval is not None:
        assert back.interval == pytest.approx((-there.interval.high, -there.interval.low), abs=1e-9)
    assert significance(pairs) == significance([turned(one) for one in pairs])
    for one in pairs:
        wins, losses, ties = astuple(record(one))
        assert astuple(record(turned(one))) == (losses, wins, ties)
        assert wins + losses + ties == len(one.a.rows)


@given(st.lists(st.lists(VALUES, min_size=1, max_size=8), min_size=1, max_size=3))
@settings(max_examples=30, deadline=None)
def test_a_run_is_no_better_than_itself(runs: list[list[float]]) -> None:
    pairs = [pair([(value, value) for value in values]) for values in runs]
    found = difference(pairs)
    assert found.value == 0 and (found.interval is None or found.interval.low < 0 < found.interval.high)
    assert significance(pairs).p == 1
    assert record(pairs[0]) == Record(0, 0, len(runs[0]))


@given(RUNS)
@settings(max_examples=50, deadline=None)
def test_what_it_says_holds_together(values: list[tuple[float, float]]) -> None:
    found = difference([pair(values)])
    assert found.value == pytest.approx(np.mean([b - a for a, b in values]), abs=1e-12)
    assert found.interval is None or found.interval.low <= found.value <= found.interval.high
    tested = significance([pair(values)])
    assert 0 < tested.p <= 1
    right_or_wrong = all(value in (0, 1) for both in values for value in both)
    assert tested.test == ("mcnemar" if right_or_wrong else "randomisation")
    if all(b > a for a, b in values):  # only one way in 2^n, and its opposite, is as extreme
        assert tested.p == pytest.approx(2 / 2 ** len(values)) and record(pair(values)).losses == 0


@given(RUNS, RUNS)
@settings(max_examples=30, deadline=None)
def test_over_datasets_it_is_the_mean_of_their_differences(
    one: list[tuple[float, float]], other: list[tuple[float, float]]
) -> None:
    both = difference([pair(one), pair(other)])
    each = [difference([pair(values)]).value for values in (one, other)]
    assert both.value == pytest.approx(np.mean(each), abs=1e-12)
    assert significance([pair(one), pair(other)]).test == "randomisation"
    twice = record(pair(one)) + record(pair(other))
    assert twice.wins == record(pair(one)).wins + record(pair(other)).wins


# -- known values ---------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("wins", "losses", "p"),
    [(0, 0, 1), (1, 0, 1), (5, 0, 2 / 2**5), (0, 5, 2 / 2**5), (3, 3, 1), (8, 1, 2 * 10 / 2**9)],
)
def test_mcnemar_by_hand(wins: int, losses: int, p: float) -> None:
    """Ties, of which there are five here, say nothing."""
    found = significance([pair([(0, 1)] * wins + [(1, 0)] * losses + [(1, 1)] * 5)])
    assert (found.test, found.p) == ("mcnemar", pytest.approx(p))


@given(BINARY)
@settings(max_examples=40, deadline=None)
def test_mcnemar_and_randomisation_agree_where_both_could_be_used(values: list[tuple[int, int]]) -> None:
    """Swapping right and wrong answers at random is McNemar's test. Half of each is graded, which is not."""
    exact = significance([pair(values)])
    swapped = significance([pair([(a / 2, b / 2) for a, b in values])])
    assert swapped.p == pytest.approx(exact.p, abs=0.02)


@pytest.mark.parametrize("shift", [0.0, 0.4, 0.8])
def test_a_few_instances_are_swapped_in_every_way(shift: float) -> None:
    one = normal(11, shift, seed=2)
    gaps = one.b.rows[:, 0] - one.a.rows[:, 0]
    all_ways = [abs(np.dot(signs, gaps)) for signs in itertools.product((-1, 1), repeat=11)]
    exact = np.mean(np.array(all_ways) >= abs(gaps.sum()) - 1e-9)
    assert significance([one]).p == pytest.approx(exact)


def test_many_instances_are_swapped_at_random() -> None:
    one = normal(40, 0.4, seed=2)
    gaps = one.b.rows[:, 0] - one.a.rows[:, 0]
    signs = np.random.default_rng(5).choice((-1.0, 1.0), (50_000, 40))
    expected = np.mean(np.abs(signs @ gaps) >= abs(gaps.sum()))
    found = significance([one])
    assert found.p == pytest.approx(expected, abs=0.01) and (found.p * (SWAPS + 1)) % 1 == pytest.approx(0, abs=1e-6)
    assert significance([normal(60, 3.0)]).p == 1 / (SWAPS + 1)  # never 0


def test_randomisation_of_corpus_bleu_is_the_share_of_all_swaps() -> None:
    golds = [["the cat sat on a mat"], ["a cat sat on the mat"], ["the mat sat on"], ["a cat on a mat"]]
    answers = (
        ["the cat sat on a mat", "a cat sat on the mat", "the cat", "a mat"],
        ["the cat on a mat", "a cat sat on a mat", "the mat sat", "a cat on a mat"],
    )
    first, second = (corpora("wmt16.x-y", list(texts), golds)["bleu"] for texts in answers)
    assert first.value != second.value
    gaps = []
    for swaps in itertools.product((0, 1), repeat=4):
        mixed = [[answers[swap ^ side][i] for i, swap in enumerate(swaps)] for side in (0, 1)]
        values = [corpora("wmt16.x-y", texts, golds)["bleu"].value for texts in mixed]
        gaps.append(abs(values[1] - values[0]))
    exact = np.mean([gap >= abs(second.value - first.value) - 1e-9 for gap in gaps])
    assert significance([Pair(first, second)]).p == pytest.approx(exact)


@given(st.lists(st.tuples(WORDS, WORDS), min_size=2, max_size=5))
@settings(max_examples=20, deadline=None)
def test_differences_that_never_vary_have_no_interval(texts: list[tuple[str, str]]) -> None:
    """With one instance repeated, every draw is the whole again, for any measure."""
    golds = [["the cat sat on a mat"]] * 12
    for name in ("bleu", "chrf"):
        a, b = (corpora("wmt16.x-y", [texts[0][i]] * 12, golds)[name] for i in (0, 1))
        assert difference([Pair(a, b)]).interval is None


def test_the_interval_is_as_wide_as_the_normal_one() -> None:
    one = normal(400, 0.3)
    gap = one.b.rows[:, 0] - one.a.rows[:, 0]
    half = 1.96 * gap.std() / 20
    assert difference([one]).interval == pytest.approx((gap.mean() - half, gap.mean() + half), abs=0.02)


def test_pairing_makes_it_narrow() -> None:
    random = np.random.default_rng(0)
    rows, noise = random.normal(size=(2, 400))
    alike = difference([Pair(mean_of(rows), mean_of(rows + 0.01 + noise / 1000))]).interval
    assert alike == pytest.approx((0.01, 0.01), abs=0.001)


@pytest.mark.slow
def test_runs_that_are_alike_rarely_look_different() -> None:
    """Under the null, p-values are uniform: about a twentieth is below 0.05, and half is below one half."""
    p = np.array([significance([normal(12, 0.0, seed)]).p for seed in range(300)])
    assert 0.02 < (p < 0.05).mean() < 0.085
    assert 0.4 < (p < 0.5).mean() < 0.6


def test_draws_in_parts_and_seeds(monkeypatch: pytest.MonkeyPatch) -> None:
    one = normal(30, 0.1)
    assert significance([one], seed=1) == significance([one], seed=1) != significance([one], seed=2)
    assert difference([one], seed=1) == difference([one], seed=1) != difference([one], seed=2)
    whole = significance([one], seed=1)
    monkeypatch.setattr("logo.evaluation.paired.BATCH", 30 * 64)
    assert significance([one], seed=1).p == pytest.approx(whole.p, abs=0.03)


# -- many tests -----------------------------------------------------------------------------------------------------


@given(st.lists(st.floats(1e-6, 1), max_size=8))
def test_holm(p: list[float]) -> None:
    """Testing the smallest at a/m, the next at a/(m-1), ... until one fails rejects what is corrected to a or less."""
    corrected = holm(p)
    assert all(after >= before and after <= 1 for before, after in zip(p, corrected, strict=True))
    for level in (0.01, 0.05, 0.3):
        rejected = 0
        for number, value in enumerate(sorted(p)):
            if value * (len(p) - number) > level:
                break
            rejected += 1
        assert sum(value <= level for value in corrected) >= rejected
        assert sorted(corrected)[:rejected] == [value for value in sorted(corrected) if value <= level][:rejected]
        assert sum(value <= level for value in corrected) == rejected


def test_holm_by_hand() -> None:
    assert holm([0.01, 0.04, 0.03]) == pytest.approx([0.03, 0.06, 0.06])
    assert holm([0.2]) == [0.2] and holm([]) == []


# -- what cannot be compared ----------------------------------------------------------------------------------------


def test_what_cannot_be_compared_is_refused() -> None:
    short, long = mean_of([1.0]), mean_of([1.0, 0.0])
    empty = Corpus(np.empty((0, 2)), short.worth, 0.0)
    for pairs in ([], [Pair(short, long)], [Pair(empty, empty)]):
        for asked in (difference, significance):
            with pytest.raises(ValueError, match="the same instances of each"):
                asked(pairs)
