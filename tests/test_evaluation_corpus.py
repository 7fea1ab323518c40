"""Corpus measures against sacrebleu and rouge_score called directly, and against values worked out by hand."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from rouge_score.rouge_scorer import RougeScorer
from sacrebleu import BLEU, CHRF

from logo.evaluation.corpus import (
    bleu_worth,
    chrf_worth,
    corpora,
    extra_metrics,
    normalised,
    same,
    token_f1,
    tokenizer_for,
)
from logo.evaluation.intervals import proportion

WORDS = ["the", "cat", "cats", "sat", "on", "a", "mat.", "Mat", "é", "(B)", "日本"]
SENTENCES = st.lists(st.sampled_from(WORDS), max_size=9).map(" ".join)
GOLDS = st.lists(st.lists(st.sampled_from(WORDS), min_size=1, max_size=9).map(" ".join), min_size=1, max_size=3)
PAIRS = st.lists(st.tuples(SENTENCES, GOLDS), min_size=1, max_size=5)
TEXTS = st.text(alphabet=st.sampled_from("ab A.,!'-\u00e9\t the"), max_size=20)


def streams(golds: Sequence[Sequence[str]]) -> list[list[str | None]]:
    return [[texts[i] if i < len(texts) else None for texts in golds] for i in range(max(map(len, golds)))]


# -- BLEU and chrF --------------------------------------------------------------------------------------------------


@given(PAIRS)
def test_bleu_and_chrf_are_sacrebleus_and_so_is_what_our_sums_are_worth(pairs: list[tuple[str, list[str]]]) -> None:
    predictions, golds = [answer for answer, _ in pairs], [texts for _, texts in pairs]
    found = corpora("wmt16.en-de", predictions, golds)
    for name, metric in (("bleu", BLEU(tokenize=tokenizer_for(golds))), ("chrf", CHRF())):
        corpus = found[name]
        expected = metric.corpus_score(predictions, streams(golds)).score
        assert corpus.value == expected
        assert corpus.worth(corpus.rows.sum(axis=0)) == pytest.approx(expected, abs=1e-9)
        assert corpus.signature == str(metric.get_signature())


@given(PAIRS, st.data())
@settings(max_examples=40)
def test_a_draw_is_worth_what_sacrebleu_says_of_the_drawn_texts(
    pairs: list[tuple[str, list[str]]], data: st.DataObject
) -> None:
    drawn = data.draw(st.lists(st.integers(0, len(pairs) - 1), min_size=1, max_size=6))
    found = corpora("wmt16.en-de", [answer for answer, _ in pairs], [texts for _, texts in pairs])
    golds = [pairs[i][1] for i in drawn]
    tokenizer = tokenizer_for([texts for _, texts in pairs])  # a draw keeps it
    for name, metric in (("bleu", BLEU(tokenize=tokenizer, force=True)), ("chrf", CHRF())):
        expected = metric.corpus_score([pairs[i][0] for i in drawn], streams(golds)).score
        corpus = found[name]
        assert corpus.worth(corpus.rows[drawn].sum(axis=0)) == pytest.approx(expected, abs=1e-9)


def test_many_sums_at_once_are_worth_what_they_are_worth_alone() -> None:
    random = np.random.default_rng(0)
    total = random.integers(0, 9, (200, 4))
    bleu = np.concatenate([random.integers(0, 30, (200, 2)), random.integers(0, total + 1), total], axis=1).astype(
        float
    )
    ours, theirs = random.integers(0, 5, (2, 200, 6))
    both = random.integers(0, np.minimum(ours, theirs) + 1)
    chrf = np.stack([ours, theirs, both], axis=2).reshape(200, 18).astype(float)
    for worth, sums in ((bleu_worth, bleu), (chrf_worth, chrf)):
        values = worth(sums)
        assert ((values >= 0) & (values <= 100 + 1e-9)).all() and (values > 0).any()
        np.testing.assert_array_equal(values, [worth(each) for each in sums])
    for sums in bleu:
        expected = BLEU.compute_bleu(
            [int(n) for n in sums[2:6]], [int(n) for n in sums[6:]], int(sums[0]), int(sums[1]), smooth_method="exp"
        )
        assert bleu_worth(sums) == pytest.approx(expected.score, abs=1e-9)


def test_bleu_and_chrf_by_hand() -> None:
    # One sentence: 5 of 6 words, 3 of 5 pairs, 1 of 4 triples, no quadruple: half of 1 in 3.
    found = corpora("wmt16.de-en", ["the cat sat on a mat"], [["the cat lay on a mat"]])
    assert found["bleu"].value == pytest.approx(100 * (5 / 6 * 3 / 5 * 1 / 4 * 1 / 6) ** 0.25)
    # "abcd" and "abce": 3 of 4 letters, 2 of 3 pairs, 1 of 2 triples, 0 of 1; precision and recall alike.
    assert corpora("wmt16.de-en", ["ab cd"], [["abce"]])["chrf"].value == pytest.approx(
        100 * (3 / 4 + 2 / 3 + 1 / 2 + 0) / 4
    )


def test_chrf_takes_the_reference_that_is_best_for_the_answer() -> None:
    several, one = (corpora("wmt16.de-en", ["abcd"], [golds])["chrf"] for golds in (["wxyz", "abcd", "abc"], ["abcd"]))
    np.testing.assert_array_equal(several.rows, one.rows)


@pytest.mark.parametrize("dataset", ["wmt14.en-fr", "gem.dart", "tqa.rc", "bbh.navigate", "code_x_glue.x", "mine.x"])
def test_answers_that_are_all_empty_are_worth_nothing(dataset: str) -> None:
    extra = extra_metrics(dataset, ["", ""], [["(A)"], ["the cat sat on the mat", "hello"]])
    assert extra.values and set(extra.values.values()) == {0.0}
    assert all(low == 0 < high for low, high in extra.intervals.values())  # two rows say little


def test_right_answers_are_worth_everything() -> None:
    golds = [["the cat sat on the mat"], ["hello there old friend", "hi"]]
    right = [texts[0] for texts in golds]
    assert extra_metrics("gem.dart", right, golds).values == pytest.approx(
        {"rouge-1": 1, "rouge-2": 1, "rouge-L": 1, "bleu": 100, "chrf": 100}
    )
    assert extra_metrics("nq.open", right, golds).values == {"exact_match": 1, "f1": 1}


@pytest.mark.parametrize(
    ("golds", "tokenizer"),
    [
        (["Der Hund bellt."], "13a"),
        (["这是一个句子。", "OK"], "zh"),
        (["これは文です。"], "char"),
        (["東京に行く"], "char"),
        (["นี่คือประโยค"], "char"),
        (["이것은 문장입니다"], "13a"),
        (["Это предложение"], "13a"),
        (["12 + 5 = 17"], "13a"),
        (["Der Hund heißt 小白 und bellt."], "13a"),
    ],
)
def test_the_tokenizer_follows_the_writing_of_the_gold_texts(golds: list[str], tokenizer: str) -> None:
    assert tokenizer_for([golds]) == tokenizer
    extra = extra_metrics("wmt16.x-y", ["a"] * len(golds), [[gold] for gold in golds])
    assert f"|tok:{tokenizer}|" in extra.signatures["bleu"]


def test_chinese_is_not_one_word() -> None:
    answer, gold = "我们今天去北京看朋友。", "我们今天去北京看电影。"
    assert 50 < corpora("wmt16.en-zh", [answer], [[gold]])["bleu"].value < 90


def test_uneven_numbers_of_references_are_noted() -> None:
    even = extra_metrics("wmt16.x-y", ["a", "b"], [["a", "c"], ["b", "c"]])
    uneven = extra_metrics("wmt16.x-y", ["a", "b"], [["a"], ["b", "c"]])
    assert "nrefs:2|" in even.signatures["bleu"] and "nrefs:2|" in even.signatures["chrf"]
    assert "nrefs:var|" in uneven.signatures["bleu"] and "nrefs:var|" in uneven.signatures["chrf"]


def test_the_order_of_references_does_not_matter_nor_does_one_said_twice() -> None:
    answers, golds = ["the cat sat", "a mat on it"], [["the cat lay", "a cat sat"], ["mats on it", "the mat"]]
    values = extra_metrics("gem.dart", answers, golds).values
    assert extra_metrics("gem.dart", answers, [texts[::-1] for texts in golds]).values == values
    assert extra_metrics("gem.dart", answers, [texts * 2 for texts in golds]).values == values


# -- ROUGE ----------------------------------------------------------------------------------------------------------


@given(PAIRS)
@settings(max_examples=40)
def test_rouge_is_the_mean_over_the_best_reference(pairs: list[tuple[str, list[str]]]) -> None:
    scorer = RougeScorer(["rouge1", "rouge2", "rougeL"], use_stemmer=True)
    scores = [scorer.score_multi(golds, answer) for answer, golds in pairs]
    found = corpora("gem.e2e_nlg", [answer for answer, _ in pairs], [golds for _, golds in pairs])
    for ours, theirs in (("rouge-1", "rouge1"), ("rouge-2", "rouge2"), ("rouge-L", "rougeL")):
        assert found[ours].value == pytest.approx(np.mean([score[theirs].fmeasure for score in scores]))


# -- questions ------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("answer", "gold", "equal", "f1"),
    [
        ("The  Eiffel Tower!", "eiffel tower", True, 1.0),
        ("an U.S. state", "US state", True, 1.0),
        ("Paris, France", "Paris", False, 2 / 3),
        ("cat cat dog", "cat dog dog", False, 2 / 3),  # one cat and one dog in common
        ("theatre", "re", False, 0.0),  # articles are words
        ("", "Paris", False, 0.0),
        ("Rome", "Paris", False, 0.0),
        ("(A)", "A", True, 1.0),
        ("(B)", "(A)", False, 0.0),
        ("", "(A)", False, 0.0),  # an article that is the whole answer stays
        ("the", "(A)", False, 0.0),
        ("?", "!", True, 1.0),
        ("forty-two", "fortytwo", True, 1.0),
    ],
)
def test_answers_compared_by_hand(answer: str, gold: str, equal: bool, f1: float) -> None:
    assert same(answer, gold) is equal
    assert token_f1(answer, gold) == pytest.approx(f1)


@given(TEXTS, TEXTS)
def test_f1_is_symmetric_between_0_and_1_and_1_for_what_is_the_same(one: str, other: str) -> None:
    value = token_f1(one, other)
    assert value == token_f1(other, one) and 0 <= value <= 1
    assert value == 1 if same(one, other) else value <= 1


@given(TEXTS)
def test_normalising_twice_changes_nothing(text: str) -> None:
    assert normalised(normalised(text)) == normalised(text)


@given(TEXTS, st.lists(TEXTS, min_size=1, max_size=4))
def test_questions_take_the_best_gold_text(answer: str, golds: list[str]) -> None:
    found = corpora("nq.open", [answer], [golds])
    assert found["exact_match"].value == max(same(answer, gold) for gold in golds)
    assert found["f1"].value == max(token_f1(answer, gold) for gold in golds)


# -- intervals ------------------------------------------------------------------------------------------------------


def test_intervals_hold_the_value_shrink_with_more_rows_and_repeat_with_their_seed() -> None:
    answers = ["right", "wrong", "right here", "left"] * 4
    golds = [["right"], ["right"], ["right"], ["left"]] * 4
    few = extra_metrics("bbh.x", answers, golds, seed=3)
    many = extra_metrics("bbh.x", answers * 25, golds * 25, seed=3)
    for name, value in few.values.items():
        low, high = few.intervals[name]
        assert 0 <= low < value < high <= 1
        assert many.intervals[name][1] - many.intervals[name][0] < (high - low) / 3
    assert extra_metrics("bbh.x", answers, golds, seed=3) == few
    other = extra_metrics("bbh.x", answers, golds, seed=4)
    assert other.intervals["f1"] != few.intervals["f1"]  # drawn
    assert other.intervals["exact_match"] == few.intervals["exact_match"] == proportion(8, 16)


def test_a_few_graded_answers_have_no_interval() -> None:
    extra = extra_metrics("bbh.x", ["right here", "left"], [["right"], ["left"]])
    assert set(extra.values) == {"exact_match", "f1"} and set(extra.intervals) == {"exact_match"}


# -- what cannot be measured ----------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("predictions", "golds"), [([], []), (["a"], []), (["a"], [["a"], ["b"]]), (["a", "b"], [["a"], []])]
)
def test_what_cannot_be_measured_is_refused(predictions: list[str], golds: list[list[str]]) -> None:
    with pytest.raises(ValueError, match=r"'bbh\.x': expected one or more predictions with at least one gold text"):
        extra_metrics("bbh.x", predictions, golds)
