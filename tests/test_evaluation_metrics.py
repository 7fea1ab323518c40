"""The metrics against nltk and rouge_score called directly, and against values worked out by hand; intervals and tests
against closed forms, against scipy, and by simulation."""

from __future__ import annotations

import itertools
import math
import sys
from statistics import NormalDist
from subprocess import run

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

import equal_runs
from logo.evaluation.metrics import Scale, answer_in, bleu, em, em_multi, extra, metric_kind, rouge, summary_line
from logo.evaluation.statistics import FEWEST, MCNEMAR, RANDOMISED, SWAPS, Values, holm, interval, of_mean, paired

pytestmark = pytest.mark.slow
WORDS = ["the", "cat", "cats", "sat", "running", "on", "a", "mat", ".", "Mat", "é"]
SENTENCES = st.lists(st.sampled_from(WORDS), max_size=12).map(" ".join)


def test_the_first_line_is_what_str_splitlines_takes_for_one() -> None:
    for text, line in {
        " \n\t": "",
        "\n\nTrue\nFalse": "True",
        "foo \nbar": "foo",
        "True  ": "True",
        "one\u2028two": "one",
        "one\ttwo": "one\ttwo",
    }.items():
        assert answer_in(text) == line
    assert answer_in("True  \nFalse", official=True) == "True  "  # as the official code leaves it
    assert answer_in("<think>\n\n</think>\n\n5\n6", front="<think>\n\n</think>\n\n") == "5"
    assert answer_in("hero END\nmore", end=" END\n") == "hero"  # a turn that ends with ordinary text
    assert answer_in("a\nhero END", whole=True, end=" END\n") == "a\nhero"


@given(st.text(), st.lists(st.text(), max_size=4))
def test_em_over_a_list_is_any_of_it(prediction: str, golds: list[str]) -> None:
    assert em_multi(prediction, golds) == em(prediction, tuple(golds)) == int(any(em(prediction, g) for g in golds))


def test_em() -> None:
    for prediction, gold, value in (
        ("True", "true.", 1),
        ("True", "False", 0),
        ("", "True", 0),
        ("", ".", 1),
        ("a b", "a  b", 0),  # inner blanks count
        (" .yes", "yes", 1),
        ("yes .", "yes", 0),  # stripping comes before the dots go
        ("Paris", ("London", "paris"), 1),
        ("Rome", ("London", "paris"), 0),
    ):
        assert em(prediction, gold) == em_multi(prediction, gold) == value, (prediction, gold)


def test_exact_match_of_squad_where_only_marks_are_left() -> None:
    found = extra("em", ["", "?", "(A)", "the"], [["?"], ["!"], ["a."], [""]])
    assert found == {"exact_match": 0.25, "f1": 0.25}


@given(SENTENCES, SENTENCES)
def test_bleu_is_nltk(prediction: str, gold: str) -> None:
    from nltk.translate.bleu_score import SmoothingFunction, sentence_bleu  # slow

    smoothing = SmoothingFunction().method1
    expected = sentence_bleu([gold.split()], prediction.split(), weights=(0.25,) * 4, smoothing_function=smoothing)
    assert bleu(prediction, gold) == expected
    assert bleu(prediction, (gold, "another reference")) == expected


def test_bleu_by_hand() -> None:
    # prediction: 5 words, 4 of them right; 2-grams 3 of 4, 3-grams 2 of 3, 4-grams 1 of 2; no brevity penalty
    assert bleu("a b c d x", "a b c d e") == pytest.approx((4 / 5 * 3 / 4 * 2 / 3 * 1 / 2) ** 0.25)
    # one word of four, all higher orders empty: 0.1 / 1 each; brevity e^(1 - 4/1)
    assert bleu("a", "a b c d") == pytest.approx(math.exp(-3) * (1 * 0.1**3) ** 0.25)
    assert bleu("a b c d", "a b c d") == 1.0
    for prediction, gold in (("", "a b c d"), ("", ""), ("a", ""), ("x y", "a b c d")):  # and without a warning
        assert bleu(prediction, gold) == 0.0


@given(SENTENCES, SENTENCES)
def test_rouge_is_rouge_score(prediction: str, gold: str) -> None:
    from rouge_score.rouge_scorer import RougeScorer  # slow

    scores = RougeScorer(["rouge1", "rouge2", "rougeL"], use_stemmer=True).score(gold, prediction)
    expected = {f"rouge-{name.removeprefix('rouge')}": score.fmeasure for name, score in scores.items()}
    assert rouge(prediction, gold) == rouge(prediction, (gold, "another")) == expected
    assert rouge("", "the cat") == {"rouge-1": 0.0, "rouge-2": 0.0, "rouge-L": 0.0}


def test_the_metric_of_a_dataset_is_that_of_the_first_part_of_its_name() -> None:
    named = {
        "em": "bbh.navigate ai2_arc.ARC-Easy anli.r1 glue.qnli mine.colours gemlike.x",
        "em_multi": "nq.natural-questions tqa.rc",
        "bleu": "wmt14.fr-en wmt16/en-ro code_x_glue.code_to_text_python",
        "rouge": "gem.dart",
    }
    for kind, datasets in named.items():
        assert {metric_kind(dataset) for dataset in datasets.split()} == {kind}


def test_summary_lines() -> None:
    assert summary_line("em", [1, 1, 0]) == "Accuracy: 66.67"
    assert summary_line("em_multi", [1]) == "Accuracy: 100.00"
    assert summary_line("bleu", [0.1, 0.1468]) == "BLEU: 12.34"
    values = [{"rouge-1": 0.4, "rouge-2": 0.2, "rouge-L": 0.4}, {"rouge-1": 0.502, "rouge-2": 0.2006, "rouge-L": 0.4}]
    assert summary_line("rouge", values) == "ROUGE-1: 45.10  ROUGE-2: 20.03  ROUGE-L: 40.00"
    for kind, nothing in (("em", []), ("rouge", [1]), ("bleu", [{"rouge-1": 1.0}])):
        with pytest.raises(ValueError):
            summary_line(kind, nothing)  # type: ignore[arg-type]


def test_what_needs_no_library_of_models_or_data_imports_none() -> None:
    for code, heavy in (
        ("import logo.evaluation.metrics, logo.evaluation.datasets", "nltk rouge_score sacrebleu numpy torch"),
        ("import logo.evaluation.results", "nltk rouge_score sacrebleu torch transformers"),  # intervals are numpy's
        ("import logo.cli.app; logo.cli.app.run(['data', 'list'])", "torch transformers datasets pyarrow"),
    ):
        checked = f"{code}; import sys; assert not set({heavy.split()}) & set(sys.modules)"
        run([sys.executable, "-c", checked], capture_output=True, check=True)


# -- intervals and tests -----------------------------------------------------------------------------------------------

# Differences that are smaller than rounding count as none, so values are a thousandth apart.
VALUES = st.one_of(st.integers(0, 1), st.integers(0, 1000).map(lambda n: n / 1000))
RUNS = st.lists(st.tuples(VALUES, VALUES), min_size=1, max_size=12)


def sides(values: list[tuple[float, float]]) -> tuple[Values, Values]:
    return np.array([a for a, _ in values], dtype=float), np.array([b for _, b in values], dtype=float)


def normal(rows: int, shift: float, seed: int = 0) -> tuple[Values, Values]:
    a, noise = np.random.default_rng(seed).normal(size=(2, rows))
    return a, a + noise + shift


@given(st.integers(1, 300).flatmap(lambda rows: st.tuples(st.integers(0, rows), st.just(rows))))
@settings(max_examples=60)
def test_wilson_by_its_formula(counts: tuple[int, int]) -> None:
    right, rows = counts
    share, z = right / rows, NormalDist().inv_cdf(0.975)
    middle = (share + z**2 / (2 * rows)) / (1 + z**2 / rows)
    half = z / (1 + z**2 / rows) * np.sqrt(share * (1 - share) / rows + z**2 / (4 * rows**2))
    found = interval([1.0] * right + [0.0] * (rows - right), "binary")
    assert found == pytest.approx((middle - half, middle + half), abs=1e-9) and found is not None
    assert found[0] < found[1]  # also where all rows are right


def test_the_interval_of_graded_rows() -> None:
    values = np.random.default_rng(1).random(400)
    half = NormalDist().inv_cdf(0.975) * values.std() / 20
    assert interval(values, "graded") == pytest.approx((values.mean() - half, values.mean() + half), abs=0.005)
    assert interval(values, "graded", 1) == interval(values, "graded", 1) != interval(values, "graded", 2)
    # nothing is known, nothing is said
    assert interval(values[: FEWEST - 1], "graded") is None and interval([0.5] * 50, "graded") is None


def test_means_over_datasets_are_covered() -> None:
    """Of datasets with 20 rows each, almost all of them right."""
    random, shares, held = np.random.default_rng(0), (0.97, 0.9, 0.6), 0
    for _ in range(400):
        rows = [(random.random(20) < share).astype(float) for share in shares]
        found = of_mean([float(one.mean()) for one in rows], [interval(one, "binary") for one in rows])
        held += found is not None and found[0] <= np.mean(shares) <= found[1]
    assert 0.92 <= held / 400 <= 0.99


@given(st.lists(RUNS, min_size=1, max_size=3), st.booleans())
@settings(max_examples=30)
def test_swapping_the_runs_turns_every_number_around(runs: list[list[tuple[float, float]]], binary: bool) -> None:
    scale: Scale = "binary" if binary else "graded"
    pairs = [sides([(round(a), round(b)) if binary else (a, b) for a, b in values]) for values in runs]
    there, back = paired(pairs, scale), paired([(b, a) for a, b in pairs], scale)
    assert (back.a, back.b, back.difference) == pytest.approx((there.b, there.a, -there.difference))
    assert (back.better, back.worse, back.p, back.test) == (there.worse, there.better, there.p, there.test)
    assert (there.interval is None) == (back.interval is None)
    if there.interval is not None and back.interval is not None:
        assert back.interval == pytest.approx((-there.interval[1], -there.interval[0]), abs=1e-9)
    same = paired([(a, a) for a, _ in pairs], scale)
    assert (same.difference, same.p, same.better, same.worse) == (0, 1, 0, 0)


@pytest.mark.parametrize(("better", "worse", "p"), [(0, 0, 1), (1, 0, 1), (5, 0, 1 / 16), (3, 3, 1), (8, 1, 5 / 128)])
def test_mcnemar_by_hand(better: int, worse: int, p: float) -> None:
    """Ties, of which there are five here, say nothing; swapping them as graded rows is the same test."""
    rows = [(0.0, 1.0)] * better + [(1.0, 0.0)] * worse + [(1.0, 1.0)] * 5
    found, swapped = (paired([sides(rows)], scale) for scale in ("binary", "graded"))
    assert (found.test, found.p) == (MCNEMAR, pytest.approx(p))
    assert (swapped.test, swapped.p) == (RANDOMISED, pytest.approx(p))


def test_many_rows_are_swapped_at_random_as_scipy_does() -> None:
    from scipy.stats import permutation_test  # slow

    a, b = normal(40, 0.4, seed=2)
    how = {"permutation_type": "samples", "n_resamples": 20_000, "rng": np.random.default_rng(5)}
    expected = permutation_test((a, b), lambda x, y, axis: np.mean(x - y, axis=axis), **how).pvalue
    found = paired([(a, b)], "graded")
    assert found.p == pytest.approx(expected, abs=0.01) and (found.p * (SWAPS + 1)) % 1 == pytest.approx(0, abs=1e-6)
    assert paired([(a, b)], "graded", 1) == paired([(a, b)], "graded", 1) != paired([(a, b)], "graded", 2)
    assert paired([normal(60, 3.0)], "graded").p == 1 / (SWAPS + 1)  # never 0


def test_over_datasets_it_is_the_mean_of_their_differences() -> None:
    long, short = normal(300, 0.5), normal(20, -0.1, seed=1)
    found, alone = paired([long, short], "graded"), [paired([one], "graded").difference for one in (long, short)]
    assert found.difference == pytest.approx(np.mean(alone)) and found.rows == 320
    for pairs in ([], [(long[0], short[0])], [(long[0][:0], long[0][:0])]):
        with pytest.raises(ValueError, match="the same rows of each"):
            paired(pairs, "graded")


@given(st.lists(st.floats(1e-6, 1), max_size=8))
def test_holm_rejects_step_by_step(p: list[float]) -> None:
    """The smallest is tested at a/m, the next at a/(m-1), ... until one fails."""
    corrected = holm(p)
    for level in (0.01, 0.05, 0.3):
        steps = (value * (len(p) - number) <= level for number, value in enumerate(sorted(p)))
        assert sum(value <= level for value in corrected) == len(list(itertools.takewhile(bool, steps)))
    assert holm([0.01, 0.04, 0.03]) == pytest.approx([0.03, 0.06, 0.06])  # as statsmodels' multipletests


def test_equal_runs_rarely_look_different() -> None:
    """At most one comparison in twenty may mark anything; `benchmarks/equal_runs.py` repeats it 1,000 times."""
    assert sum(equal_runs.marks_anything(seed, rows=12) for seed in range(25)) <= 2
