"""Answers that end at a text: wherever its tokens begin and end, and only within the answer."""

from __future__ import annotations

import pytest
import torch
from hypothesis import assume, given
from hypothesis import strategies as st
from transformers import AutoTokenizer

from logo import LoGo
from logo.decoding import EndRows
from logo.demo import model_dir
from logo.endings import StopTexts, at_texts, cut_at

PROMPTS = ["Spell the word fence backwards.", "What is the plural of lake?", "What is 7 plus 5?"]
TOKENIZER = AutoTokenizer.from_pretrained(model_dir())
TEXT = st.text(alphabet="ab é\n日", max_size=12)


@pytest.fixture(scope="module")
def logo() -> LoGo:
    return LoGo.from_pretrained("demo", signal="norm", k=3, device="cpu")


@given(TEXT, st.lists(TEXT, max_size=3))
def test_cut_at_the_first_of_them(text: str, stops: list[str]) -> None:
    stops = [stop for stop in stops if stop]
    cut = cut_at(text, stops)
    assert text.startswith(cut) and not any(stop in cut for stop in stops)
    if cut != text:
        assert any(text[len(cut) :].startswith(stop) for stop in stops)


@given(TEXT, st.lists(TEXT.filter(bool), max_size=3), st.lists(st.integers(1, 4), max_size=12))
def test_pieces_end_before_the_first_of_them(text: str, stops: list[str], sizes: list[int]) -> None:
    """However the text is cut into pieces; and nothing is held back that cannot become a stop text any more."""
    assume(not any(a != b and a in b for a in stops for b in stops))
    ends, passed, start = StopTexts(stops), "", 0
    for size in [*sizes, len(text)]:
        passed += ends.push(text[start : start + size])
        start += size
        assert cut_at(text, stops).startswith(passed)
        if not ends.stopped:
            held = text[: min(start, len(text))][len(passed) :]
            assert not held or any(stop.startswith(held) for stop in stops)
    assert passed + ends.finish() == cut_at(text, stops)


@given(TEXT, TEXT, TEXT.filter(bool))
def test_a_row_ends_when_its_answer_holds_the_text(prompt: str, answer: str, stop: str) -> None:
    """Token by token: it ends at the first token that completes the text, and what the prompt holds does not count."""
    start = TOKENIZER(prompt)["input_ids"]
    tokens = TOKENIZER(answer, add_special_tokens=False)["input_ids"]
    criterion = EndRows([at_texts(TOKENIZER, [stop])], len(start))
    seen = [bool(criterion(torch.tensor([start + tokens[: n + 1]]))[0]) for n in range(len(tokens))]
    if stop in answer:
        first = next(n for n in range(len(tokens)) if stop in TOKENIZER.decode(tokens[: n + 1]))
        assert seen.index(True) == first
    else:
        assert not any(seen)


def test_rows_of_a_batch_end_on_their_own(logo: LoGo) -> None:
    forced = [{"reverse_word": 1.0}, {"plural": 1.0}, {"add_numbers": 1.0}]
    whole = [answer.text for answer in logo.generate(PROMPTS, adapters=forced, max_new_tokens=16)]
    stops = ("k", "12")
    answers = logo.generate(PROMPTS, adapters=forced, max_new_tokens=16, stop=stops)
    assert [answer.text for answer in answers] == [cut_at(text, stops) for text in whole]
    assert any(answer.text != text for answer, text in zip(answers, whole, strict=True))
    assert {answer.finish_reason for answer in answers} == {"stop"}
    assert logo.generate(PROMPTS[1], adapters=forced[1], stop="k", max_new_tokens=16).text == answers[1].text


def test_without_texts_nothing_changes(logo: LoGo) -> None:
    plain = logo.generate(PROMPTS, max_new_tokens=8)
    assert [a.token_ids for a in logo.generate(PROMPTS, max_new_tokens=8, stop=["", "never"])] == [
        a.token_ids for a in plain
    ]
