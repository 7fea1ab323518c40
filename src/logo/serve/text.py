"""`Text`: decodes tokens as they come, without incomplete characters, special tokens and stop texts."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING

from logo.endings import EndRule, StopTexts, at_texts

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

_INCOMPLETE = "�"  # bytes of an incomplete character decode to it


class Text:
    """The text of one answer in pieces, which together are the decoded answer, cut at a stop text.

    Args:
        tokenizer: special tokens are left out.
        stops: the text ends before the first of these, which may hold special tokens.

    Attributes:
        taken: the number of tokens so far, without those behind the one that completes a stop text.
        stopped: whether there was a stop text.
    """

    def __init__(self, tokenizer: PreTrainedTokenizerBase, stops: Sequence[str] = ()) -> None:
        self._tokenizer, self._stops = tokenizer, bool(stops)
        self._text = StopTexts(stops)
        special = [stop for stop in stops if _holds_special(tokenizer, stop)]
        self._ends: EndRule | None = at_texts(tokenizer, special) if special else None
        self.stopped = False
        self._ids: list[int] = []
        self._start, self._read = 0, 0  # the first token to decode, and the number of tokens whose text is known

    @property
    def taken(self) -> int:
        """See `Text`."""
        return len(self._ids)

    def push(self, ids: Sequence[int]) -> str:
        """The new text that these tokens give."""
        if not self._stops:
            self._ids.extend(ids)
            return self._read_on()
        new = ""
        for token in ids:
            if self.stopped:
                break
            self._ids.append(token)
            new += self._read_on()
            if not self.stopped and self._ends is not None and self._ends(self._ids):
                new += self.finish()
                self.stopped = True
        return new

    def _read_on(self) -> str:
        # As in vLLM, a few earlier tokens are decoded, too, since the text of a token depends on them.
        before = self._decode(self._ids[self._start : self._read])
        both = self._decode(self._ids[self._start :])
        if len(both) <= len(before) or both.endswith(_INCOMPLETE):
            return ""
        self._start, self._read = self._read, len(self._ids)
        return self._passed(both[len(before) :])

    def finish(self) -> str:
        """The rest of the text, when there are no more tokens."""
        if self.stopped:
            return ""
        whole, known = self._decode(self._ids), self._text.known
        more = whole[len(known) :] if whole.startswith(known) else ""
        return self._passed(more) + self._text.finish()

    def _passed(self, more: str) -> str:
        shown = self._text.push(more)
        self.stopped = self._text.stopped
        return shown

    def _decode(self, ids: Sequence[int]) -> str:
        text: str = self._tokenizer.decode(ids, skip_special_tokens=True)
        return text


def _holds_special(tokenizer: PreTrainedTokenizerBase, text: str) -> bool:
    """Whether a text holds special tokens, which are no part of an answer's text."""
    ids = tokenizer(text, add_special_tokens=False)["input_ids"]
    return bool(tokenizer.decode(ids, skip_special_tokens=True) != tokenizer.decode(ids))
