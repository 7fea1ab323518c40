"""Paired comparisons against scipy, against closed forms, and against themselves with the runs swapped."""

from __future__ import annotations

import itertools
from dataclasses import astuple

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from scipy.stats import binomtest, permutation_test

from logo.evaluation.corpus import Corpus, corpora, mean_of
from logo.evaluation.paired import Pair, Record, bootstrap, mcnemar, randomisation, record, sign_test

VALUES = st.one_of(st.integers(0, 1), st.floats(0, 1, allow_subnormal=False, width=32))
RUNS = st.lists(st.tuples(VALUES, VALUES), min_size=1, max_size=12)
BINARY = st.lists(st.tuples(st.integers(0, 1), st.integers(0, 1)), max_size=40)
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
@settings(max_examples=50)
def test_swapping_the_runs_turns_every_number_around(runs: list[list[tuple[float, float]]]) -> None:
    pairs = [pair(values) for values in runs]
    there, back = bootstrap(pairs, draws=60), bootstrap([turned(one) for one in pairs], draws=60)
    expected = (there.b, there.a, -there.value, -there.high, -there.low, 1 - there.won)
    assert astuple(back) == pytest.approx(expected, abs=1e-12)
    assert randomisation(pairs, swaps=60) == randomisation([turned(one) for one in pairs], swaps=60)
    for one in pairs:
        wins, losses, ties = astuple(record(one))
        assert astuple(record(turned(one))) == (losses, wins, ties)
        assert wins + losses + ties == len(one.a.rows)


@given(st.lists(st.lists(VALUES, min_size=1, max_size=8), min_size=1, max_size=3))
@settings(max_examples=50)
def test_a_run_is_no_better_than_itself(runs: list[list[float]]) -> None:
    pairs = [pair([(value, value) for value in values]) for values in runs]
    found = bootstrap(pairs, draws=50)
    assert (found.value, found.low, found.high, found.won) == (0, 0, 0, 0.5)
    assert randomisation(pairs, swaps=50) == 1
    assert record(pairs[0]) == Record(0, 0, len(runs[0]))


@given(RUNS)
@settings(max_examples=50)
def test_what_it_says_holds_together(values: list[tuple[float, float]]) -> None:
    found = bootstrap([pair(values)], draws=80)
    assert found.low <= found.value <= found.high
    assert found.value == pytest.approx(np.mean([b - a for a, b in values]), abs=1e-12)
    assert 0 <= found.won <= 1
    if all(b > a for a, b in values):
        assert found.won == 1 and found.low > 0 and record(pair(values)).losses == 0
    assert 1 / 81 <= randomisation([pair(values)], swaps=80) <= 1


@given(RUNS, RUNS)
@settings(max_examples=30)
def test_over_datasets_it_is_the_mean_of_their_differences(
    one: list[tuple[float, float]], other: list[tuple[float, float]]
) -> None:
    both = bootstrap([pair(one), pair(other)], draws=10)
    each = [bootstrap([pair(values)], draws=10).value for values in (one, other)]
    assert both.value == pytest.approx(np.mean(each), abs=1e-12)
    twice = record(pair(one)) + record(pair(other))
    assert twice.wins == record(pair(one)).wins + record(pair(other)).wins


# -- known values ---------------------------------------------------------------------------------------------------


@given(st.integers(0, 300), st.integers(0, 300))
def test_the_sign_test_is_scipys(wins: int, losses: int) -> None:
    expected = binomtest(wins, wins + losses, 0.5).pvalue if wins + losses else 1.0
    assert sign_test(wins, losses) == pytest.approx(expected, rel=1e-9)


@pytest.mark.parametrize(
    ("wins", "losses", "p"),
    [(0, 0, 1), (1, 0, 1), (5, 0, 2 / 2**5), (0, 5, 2 / 2**5), (3, 3, 1), (8, 1, 2 * 10 / 2**9), (4000, 0, 0)],
)
def test_the_sign_test_by_hand(wins: int, losses: int, p: float) -> None:
    assert sign_test(wins, losses) == pytest.approx(p)


@given(BINARY)
def test_mcnemar_counts_where_just_one_run_is_right(values: list[tuple[int, int]]) -> None:
    wins, losses = values.count((0, 1)), values.count((1, 0))
    p = mcnemar([a for a, _ in values], [b for _, b in values])
    assert p == sign_test(wins, losses) and 0 < p <= 1
    if values:
        assert record(pair(values)) == Record(wins, losses, len(values) - wins - losses)


@pytest.mark.parametrize("shift", [0.0, 0.4, 0.8])
def test_randomisation_is_scipys_permutation_test(shift: float) -> None:
    one = normal(11, shift, seed=2)
    a, b = one.a.rows[:, 0], one.b.rows[:, 0]
    exact = permutation_test(  # all 2^11 swaps
        (a, b), lambda x, y, axis: (y - x).mean(axis=axis), permutation_type="samples", n_resamples=np.inf
    ).pvalue
    assert randomisation([one], swaps=40_000) == pytest.approx(exact, abs=0.01)


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
    assert randomisation([Pair(first, second)], swaps=20_000) == pytest.approx(exact, abs=0.02)


@given(st.lists(st.tuples(WORDS, WORDS), min_size=2, max_size=5))
@settings(max_examples=20)
def test_a_draw_of_corpus_measures_is_a_draw_of_texts(texts: list[tuple[str, str]]) -> None:
    """With one instance repeated, every draw is the whole again, for any measure."""
    golds = [["the cat sat on a mat"]] * len(texts)
    for name in ("bleu", "chrf"):
        a, b = (corpora("wmt16.x-y", [texts[0][i]] * len(texts), golds)[name] for i in (0, 1))
        found = bootstrap([Pair(a, b)], draws=20)
        assert (found.low, found.high) == pytest.approx((found.value, found.value), abs=1e-9)


def test_the_interval_is_as_wide_as_the_normal_one_and_pairing_makes_it_narrow() -> None:
    one = normal(400, 0.3)
    gap = one.b.rows[:, 0] - one.a.rows[:, 0]
    found = bootstrap([one], draws=4000)
    half = 1.96 * gap.std() / 20
    assert (found.low, found.high) == pytest.approx((gap.mean() - half, gap.mean() + half), abs=0.02)
    rows = np.random.default_rng(0).normal(size=400)
    alike = bootstrap([Pair(mean_of(list(rows)), mean_of(list(rows + 0.01)))], draws=400)
    assert alike.low == pytest.approx(0.01) and alike.high == pytest.approx(0.01) and alike.won == 1


def test_runs_that_are_alike_rarely_look_different() -> None:
    """Under the null, p-values are uniform: about a twentieth is below 0.05, and half is below one half."""
    p = np.array([randomisation([normal(20, 0.0, seed)], seed=seed, swaps=400) for seed in range(300)])
    assert 0.02 < (p < 0.05).mean() < 0.085
    assert 0.4 < (p < 0.5).mean() < 0.6


def test_draws_in_parts_and_seeds(monkeypatch: pytest.MonkeyPatch) -> None:
    one = normal(30, 0.1)
    whole = randomisation([one], seed=1, swaps=500)
    assert randomisation([one], seed=2, swaps=500) != whole
    assert bootstrap([one], seed=1) == bootstrap([one], seed=1) != bootstrap([one], seed=2)
    monkeypatch.setattr("logo.evaluation.paired._COUNTS", 30 * 64)
    assert randomisation([one], seed=1, swaps=500) == whole


# -- what cannot be compared ----------------------------------------------------------------------------------------


def test_what_cannot_be_compared_is_refused() -> None:
    short, long = mean_of([1.0]), mean_of([1.0, 0.0])
    empty = Corpus(np.empty((0, 2)), short.worth, 0.0)
    for pairs in ([], [Pair(short, long)], [Pair(empty, empty)]):
        with pytest.raises(ValueError, match="the same instances of each"):
            bootstrap(pairs)
        with pytest.raises(ValueError, match="the same instances of each"):
            randomisation(pairs)
    for a, b in (([0], [0, 1]), ([0], [2])):
        with pytest.raises(ValueError, match="each 0 or 1"):
            mcnemar(a, b)
    with pytest.raises(ValueError, match="found -1 and 2"):
        sign_test(-1, 2)
