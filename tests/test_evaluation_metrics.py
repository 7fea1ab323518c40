"""The metrics against nltk and rouge_score called directly, and against values worked out by hand."""

from __future__ import annotations

import math
import sys
from subprocess import run

import pytest
from hypothesis import assume, given
from hypothesis import strategies as st
from nltk.translate.bleu_score import SmoothingFunction, sentence_bleu
from rouge_score.rouge_scorer import RougeScorer

from logo.evaluation.metrics import bleu, em, em_multi, first_line, measure, metric_kind, rouge, summary_line

WORDS = ["the", "cat", "cats", "sat", "running", "on", "a", "mat", ".", "Mat", "é"]
SENTENCES = st.lists(st.sampled_from(WORDS), max_size=12).map(" ".join)


@given(st.text())
def test_first_line_is_what_the_official_code_keeps(text: str) -> None:
    stripped = text.strip()
    assert first_line(text) == (stripped.splitlines() or [stripped])[0]


@given(st.text(alphabet="ab .\n\u2028\x85\r\t"))
def test_first_line_is_one_line_without_leading_blanks(text: str) -> None:
    line = first_line(text)
    assert len(line.splitlines()) <= 1
    assert line == line.lstrip()
    assert bool(line) == bool(text.strip())


@pytest.mark.parametrize(
    ("text", "line"),
    [
        ("", ""),
        (" \n\t", ""),
        (" True", "True"),
        ("\n\nTrue\nFalse", "True"),
        ("True  \nFalse", "True  "),  # blanks before the line's end stay
        ("True  ", "True"),  # those at the end of everything go
        ("one\u2028two", "one"),
        ("one\x85two", "one"),
        ("one\x0btwo", "one"),
        ("one\x1ctwo", "one"),
        ("one\r\ntwo", "one"),
        ("one\ttwo", "one\ttwo"),
        ("one\u00a0two", "one\u00a0two"),
    ],
)
def test_first_line(text: str, line: str) -> None:
    assert first_line(text) == line


@given(st.text(), st.text())
def test_em_is_the_official_comparison(prediction: str, gold: str) -> None:
    same = prediction.strip().lower().replace(".", "") == gold.strip().lower().replace(".", "")
    assert em(prediction, gold) == int(same)


@given(st.text(), st.lists(st.text(), max_size=4))
def test_em_over_a_list_is_any_of_it(prediction: str, golds: list[str]) -> None:
    assert em_multi(prediction, golds) == em(prediction, tuple(golds)) == int(any(em(prediction, g) for g in golds))


@given(st.text(min_size=1))
def test_em_ignores_case_dots_and_outer_blanks(text: str) -> None:
    assume(text.lower() == text.swapcase().lower())  # not so for a few letters, such as 'ß'
    assert em(f" {text.swapcase()}\n", text) == 1
    assert em(text.strip() + "..", text) == 1


@pytest.mark.parametrize(
    ("prediction", "gold", "value"),
    [
        ("True", "true.", 1),
        ("U.S.A.", "usa", 1),
        ("True", "False", 0),
        ("", "True", 0),
        ("", ".", 1),
        ("a b", "a  b", 0),  # inner blanks count
        ("yes. ", "yes", 1),
        (" .yes", "yes", 1),
        ("yes .", "yes", 0),  # stripping comes before the dots go
        ("Paris", ("London", "paris"), 1),
        ("Rome", ("London", "paris"), 0),
    ],
)
def test_em(prediction: str, gold: str | tuple[str, ...], value: int) -> None:
    assert em(prediction, gold) == em_multi(prediction, gold) == value


@given(SENTENCES, SENTENCES)
def test_bleu_is_nltk(prediction: str, gold: str) -> None:
    expected = sentence_bleu(
        [gold.split()],
        prediction.split(),
        weights=(0.25, 0.25, 0.25, 0.25),
        smoothing_function=SmoothingFunction().method1,
    )
    assert bleu(prediction, gold) == expected
    assert bleu(prediction, (gold, "another reference")) == expected


def test_bleu_by_hand() -> None:
    # prediction: 5 words, 4 of them right; 2-grams 3 of 4, 3-grams 2 of 3, 4-grams 1 of 2; no brevity penalty
    assert bleu("a b c d x", "a b c d e") == pytest.approx((4 / 5 * 3 / 4 * 2 / 3 * 1 / 2) ** 0.25)
    # one word of four, all higher orders empty: 0.1 / 1 each; brevity e^(1 - 4/1)
    assert bleu("a", "a b c d") == pytest.approx(math.exp(-3) * (1 * 0.1**3) ** 0.25)
    assert bleu("a b c d", "a b c d") == 1.0


@pytest.mark.parametrize(("prediction", "gold"), [("", "a b c d"), ("", ""), ("a", ""), ("x y", "a b c d")])
def test_bleu_without_a_common_word_is_zero_and_silent(prediction: str, gold: str) -> None:
    value = bleu(prediction, gold)
    assert value == 0.0
    assert isinstance(value, float)


@given(SENTENCES, SENTENCES)
def test_rouge_is_rouge_score(prediction: str, gold: str) -> None:
    scores = RougeScorer(["rouge1", "rouge2", "rougeL"], use_stemmer=True).score(gold, prediction)
    expected = {
        "rouge-1": scores["rouge1"].fmeasure,
        "rouge-2": scores["rouge2"].fmeasure,
        "rouge-L": scores["rougeL"].fmeasure,
    }
    assert rouge(prediction, gold) == rouge(prediction, (gold, "another")) == expected


def test_rouge_by_hand() -> None:
    value = rouge("the cat was running", "The cats run")  # stems: the cat wa run / the cat run
    assert value["rouge-1"] == pytest.approx(2 * (3 / 4) * (3 / 3) / (3 / 4 + 3 / 3))
    assert value["rouge-2"] == pytest.approx(2 * (1 / 3) * (1 / 2) / (1 / 3 + 1 / 2))
    assert value["rouge-L"] == pytest.approx(2 * (3 / 4) * (3 / 3) / (3 / 4 + 3 / 3))
    assert rouge("", "the cat") == {"rouge-1": 0.0, "rouge-2": 0.0, "rouge-L": 0.0}


@pytest.mark.parametrize(
    ("dataset", "kind"),
    [
        ("bbh.navigate", "em"),
        ("wmt14.fr-en", "bleu"),
        ("wmt16.en-ro", "bleu"),
        ("gem.dart", "rouge"),
        ("ai2_arc.ARC-Easy", "em"),
        ("nq.natural-questions", "em_multi"),
        ("tqa.rc", "em_multi"),
        ("anli.r1", "em"),
        ("glue.qnli", "em"),
        ("code_x_glue.code_to_text_python", "bleu"),
        ("mine.colours", "em"),
        ("gemlike.x", "em"),
    ],
)
def test_metric_by_dataset(dataset: str, kind: str) -> None:
    assert metric_kind(dataset) == kind


def test_measure_speaks_for_all_kinds() -> None:
    assert measure("em", "a", "A") == 1
    assert measure("em_multi", "a", ("b", "A")) == 1
    assert measure("bleu", "a b c d", "a b c d") == 1.0
    assert measure("rouge", "a", "a") == {"rouge-1": 1.0, "rouge-2": 0.0, "rouge-L": 1.0}


def test_summary_lines() -> None:
    assert summary_line("em", [1, 1, 0]) == "Accuracy: 66.67"
    assert summary_line("em_multi", [1]) == "Accuracy: 100.00"
    assert summary_line("bleu", [0.1, 0.1468]) == "BLEU: 12.34"
    values = [{"rouge-1": 0.4, "rouge-2": 0.2, "rouge-L": 0.4}, {"rouge-1": 0.502, "rouge-2": 0.2006, "rouge-L": 0.4}]
    assert summary_line("rouge", values) == "ROUGE-1: 45.10  ROUGE-2: 20.03  ROUGE-L: 40.00"


@pytest.mark.parametrize(("kind", "values"), [("em", []), ("rouge", []), ("rouge", [1]), ("bleu", [{"rouge-1": 1.0}])])
def test_a_mean_of_nothing_is_refused(kind: str, values: list[object]) -> None:
    with pytest.raises(ValueError):
        summary_line(kind, values)  # type: ignore[arg-type]


@pytest.mark.parametrize(
    ("modules", "heavy"),
    [
        ("metrics, logo.evaluation.datasets", "nltk rouge_score sacrebleu numpy torch transformers"),
        ("results", "nltk rouge_score sacrebleu torch transformers"),  # intervals are numpy's
    ],
)
def test_importing_the_package_imports_nothing_heavy(modules: str, heavy: str) -> None:
    code = f"import sys, logo.evaluation.{modules}; print(sorted(set({heavy.split()}) & set(sys.modules)))"
    done = run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout == "[]\n"
