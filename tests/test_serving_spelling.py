"""How log probabilities name tokens: by their own bytes, which together are those of the text."""

from __future__ import annotations

from functools import cache
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st
from tokenizers import Tokenizer, decoders, models
from transformers import PreTrainedTokenizerFast

from logo.protocol import TokenLogprob
from logo.serving.rendering import ChatRendering, CompletionRendering, Options
from logo.serving.spelling import Offsets, Spelling
from make_adapters import calm
from test_serving_text import WORDS, by_bytes, demo

OPTIONS = Options("logo", token_ids=False, logprobs=True, usage=False)


@cache
def sentences(**strips: int) -> Any:
    """A tokenizer like that of Llama 2: pieces with "▁" for blanks, and bytes for what the vocabulary lacks."""
    pieces = ["<unk>", "</s>", *(f"<0x{byte:02X}>" for byte in range(256)), "▁a", "a", "▁", "b", "é", "\n"]
    made = Tokenizer(models.BPE({piece: i for i, piece in enumerate(pieces)}, [("▁", "a")], byte_fallback=True))
    steps = [decoders.Replace("▁", " "), decoders.ByteFallback(), decoders.Fuse()]
    made.decoder = decoders.Sequence([*steps, decoders.Strip(" ", 1, 0)] if strips else steps)
    return PreTrainedTokenizerFast(tokenizer_object=made, eos_token="</s>", unk_token="<unk>")


def ids_of(words: str) -> list[int]:
    return [one for word in words for one in sentences()(word.replace(" ", "▁"))["input_ids"]]


@calm
@given(WORDS)
def test_tokens_have_the_bytes_of_the_text(words: str) -> None:
    ids = by_bytes()(words)["input_ids"]
    assert b"".join(map(Spelling(by_bytes()).encoded, ids)) == words.encode()
    assert b"".join(map(Spelling(sentences()).encoded, ids_of(words))) == words.encode()
    ids = demo()(words, add_special_tokens=False)["input_ids"]
    assert b"".join(map(Spelling(demo()).encoded, ids)) == demo().decode(ids).encode()


@calm
@given(st.sampled_from(["bytes", "sentences", "stripped"]), WORDS, st.integers(0, 3))
def test_places_are_those_in_the_text(kind: str, words: str, ends: int) -> None:
    tokenizer = by_bytes() if kind == "bytes" else sentences(start=1) if kind == "stripped" else sentences()
    ids = [tokenizer.eos_token_id] * ends + (tokenizer(words)["input_ids"] if kind == "bytes" else ids_of(words))
    whole, spelling = tokenizer.decode(ids, skip_special_tokens=True).encode(), Spelling(tokenizer)
    offsets, read, begun = Offsets(spelling), 0, False
    for token in ids:
        assert offsets.next(token) == len(whole[:read].decode("utf-8", "ignore"))
        read += len(spelling.shown(token, first=not begun))
        begun = begun or token != tokenizer.eos_token_id
    assert read == len(whole)


def test_blanks_in_front_of_words_belong_to_tokens() -> None:
    spelling = Spelling(sentences(start=1))
    assert [spelling.name(token) for token in sentences().convert_tokens_to_ids(["▁a", "▁", "</s>"])] == [
        " a",
        " ",
        "</s>",
    ]
    assert spelling.encoded(100_000) == b"" and spelling.name(100_000) == ""


@pytest.mark.parametrize("tokenizer", [by_bytes, sentences])
def test_parts_of_characters_are_told_apart(tokenizer: Any) -> None:
    first, other = [(by_bytes()(c)["input_ids"] if tokenizer is by_bytes else ids_of(c))[:2] for c in ("😀", "漢")]
    logprob = TokenLogprob(first[0], -1.0, ((first[0], -1.0), (other[0], -2.0), (first[1], -3.0)))
    spelling = Spelling(tokenizer())
    old = CompletionRendering(OPTIONS, spelling)._logprobs(0, [logprob])
    assert old.tokens == [r"bytes:\xf0"]
    assert old.top_logprobs == [{r"bytes:\xf0": -1.0, r"bytes:\xe6": -2.0, r"bytes:\x9f": -3.0}]
    new = ChatRendering(OPTIONS, spelling)._logprobs([logprob])
    assert new is not None and [other.bytes for other in new.content[0].top_logprobs] == [[0xF0], [0xE6], [0x9F]]
    assert (new.content[0].token, new.content[0].bytes) == (r"bytes:\xf0", [0xF0])


def test_of_two_tokens_with_one_name_the_likelier_counts() -> None:
    ids = sentences().convert_tokens_to_ids(["a", "<0x61>"])
    logprob = TokenLogprob(ids[0], -1.0, ((ids[0], -1.0), (ids[1], -2.0)))
    found = CompletionRendering(OPTIONS, Spelling(sentences()))._logprobs(0, [logprob])
    assert found.top_logprobs == [{"a": -1.0}]
