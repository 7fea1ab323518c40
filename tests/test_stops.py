"""Answers that end at a text: wherever its tokens begin and end, and only within the answer; and text as it comes: the
pieces joined are the whole, and nothing of a stop text is ever shown."""

from __future__ import annotations

import itertools
from functools import cache
from typing import Any

import pytest
import torch
from hypothesis import assume, given
from hypothesis import strategies as st
from tokenizers import Tokenizer, decoders, models, pre_tokenizers
from transformers import AutoTokenizer, PreTrainedTokenizerFast

from logo import LoGo
from logo.decoding import EndRows
from logo.demo import model_dir
from logo.endings import StopTexts, at_texts, cut_at
from logo.text import Text

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
    plain, same = (logo.generate(PROMPTS, max_new_tokens=8, **stop) for stop in ({}, {"stop": ["", "never"]}))
    assert [answer.token_ids for answer in same] == [answer.token_ids for answer in plain]


# -- text as a server sends it ----------------------------------------------------------------------------------------


@cache
def by_bytes() -> Any:
    """Every byte is a token, so that characters come in parts."""
    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    vocabulary = {"</s>": 0} | {piece: i + 1 for i, piece in enumerate(alphabet)}
    made = Tokenizer(models.BPE(vocabulary, []))
    made.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    made.decoder = decoders.ByteLevel()
    return PreTrainedTokenizerFast(tokenizer_object=made, eos_token="</s>", pad_token="</s>")


@cache
def with_blanks() -> Any:
    """As of Llama 2: blanks belong to tokens, and the first one of a text is dropped."""
    pieces = ["<unk>", "</s>", "\u2581", "\u2581\u2581", "\u2581a", "a", "\n"]
    made = Tokenizer(models.BPE({piece: i for i, piece in enumerate(pieces)}, [], unk_token="<unk>"))
    made.decoder = decoders.Sequence([decoders.Replace("\u2581", " "), decoders.Fuse(), decoders.Strip(" ", 1, 0)])
    return PreTrainedTokenizerFast(tokenizer_object=made, eos_token="</s>", unk_token="<unk>")


def shown(tokenizer: Any, steps: list[list[int]], stops: list[str]) -> tuple[list[str], Text]:
    text = Text(tokenizer, stops)
    pieces = []
    for ids in steps:
        pieces.append(text.push(ids))
        if text.stopped:
            return pieces, text
    return [*pieces, text.finish()], text


def split(ids: list[int], cuts: list[int]) -> list[list[int]]:
    places = sorted({cut % (len(ids) + 1) for cut in cuts} | {0, len(ids)})
    return [ids[a:b] for a, b in itertools.pairwise(places)] or [[]]


WORDS = st.text("ab é😀\n漢", max_size=30)
STOPS = st.lists(st.text("ab é😀\n", min_size=1, max_size=4), max_size=3)
CUTS = st.lists(st.integers(0, 200), max_size=40)


@given(WORDS, STOPS, CUTS)
def test_pieces_of_text_in_bytes_are_the_text_up_to_a_stop(words: str, stops: list[str], cuts: list[int]) -> None:
    """And tokens behind the one that completes a stop text are not taken."""
    tokenizer = by_bytes()
    ids = tokenizer(words)["input_ids"]
    pieces, text = shown(tokenizer, split(ids, cuts), stops)
    ends = at_texts(tokenizer, stops) if stops else lambda ids: False
    assert text.taken == next((count for count in range(1, len(ids)) if ends(ids[:count])), len(ids))
    assert text.stopped == any(stop in words for stop in stops)
    assert not any("\N{REPLACEMENT CHARACTER}" in piece for piece in pieces)
    # A stop inside another is complete first, and ends the text before anybody knows of the longer one.
    if not any(a != b and a in b for a in stops for b in stops):
        assert "".join(pieces) == cut_at(words, stops)


@given(st.lists(st.integers(0, 300), max_size=40), CUTS)
def test_pieces_of_any_tokens_are_what_they_decode_to_together(ids: list[int], cuts: list[int]) -> None:
    for tokenizer in (TOKENIZER, with_blanks()):
        tokens = [i % len(tokenizer) for i in ids]
        pieces, _ = shown(tokenizer, split(tokens, cuts), [])
        assert "".join(pieces) == tokenizer.decode(tokens, skip_special_tokens=True)


def test_a_stop_text_may_hold_special_tokens_which_are_not_shown() -> None:
    """The answer ends where `LoGo.generate` ends it."""
    tokenizer = by_bytes()
    for words, stops in (("an</s>END", ["</s>"]), ("an</s>END", ["</s>E"]), ("an</s>END", ["never", "n</s>"])):
        ids = tokenizer(words)["input_ids"]
        ends = at_texts(tokenizer, stops)
        length = next(count for count in range(1, len(ids)) if ends(ids[:count]))
        for steps in ([ids], [[one] for one in ids]):
            pieces, text = shown(tokenizer, steps, stops)
            assert text.stopped and text.taken == length
            assert "".join(pieces) == tokenizer.decode(ids[:length], skip_special_tokens=True)
    pieces, text = shown(tokenizer, [tokenizer("an</s>END")["input_ids"]], ["n", "</s>"])
    assert "".join(pieces) == "a" and text.taken == 2
