"""Text as it comes: the pieces joined are the whole, and nothing of a stop text is ever shown."""

from __future__ import annotations

import itertools
from functools import cache
from typing import Any

from hypothesis import assume, given
from hypothesis import strategies as st
from tokenizers import Tokenizer, decoders, models, pre_tokenizers
from transformers import PreTrainedTokenizerFast

from logo.endings import at_texts, cut_at
from logo.models import load_base
from logo.serve.text import Text
from make_adapters import calm


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
def demo() -> Any:
    return load_base("demo")[1]


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


@calm
@given(WORDS, STOPS, CUTS)
def test_pieces_of_text_in_bytes_are_the_text_up_to_a_stop(words: str, stops: list[str], cuts: list[int]) -> None:
    # A stop inside another is complete first, and ends the text before anybody knows of the longer one.
    assume(not any(a != b and a in b for a in stops for b in stops))
    tokenizer = by_bytes()
    pieces, text = shown(tokenizer, split(tokenizer(words)["input_ids"], cuts), stops)
    assert "".join(pieces) == cut_at(words, stops)
    assert text.stopped == any(stop in words for stop in stops)
    assert not any("\N{REPLACEMENT CHARACTER}" in piece for piece in pieces)


@calm
@given(st.lists(st.integers(0, 300), max_size=40), CUTS)
def test_pieces_of_any_tokens_are_what_they_decode_to_together(ids: list[int], cuts: list[int]) -> None:
    tokenizer = demo()
    ids = [i % len(tokenizer) for i in ids]
    pieces, _ = shown(tokenizer, split(ids, cuts), [])
    assert "".join(pieces) == tokenizer.decode(ids, skip_special_tokens=True)


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


@calm
@given(WORDS, STOPS, CUTS)
def test_tokens_behind_the_one_that_completes_a_stop_text_are_not_taken(
    words: str, stops: list[str], cuts: list[int]
) -> None:
    tokenizer = by_bytes()
    ids = tokenizer(words)["input_ids"]
    _, text = shown(tokenizer, split(ids, cuts), stops)
    ends = at_texts(tokenizer, stops) if stops else lambda ids: False
    assert text.taken == next((count for count in range(1, len(ids)) if ends(ids[:count])), len(ids))
