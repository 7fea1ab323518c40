"""`Text`: decodes tokens as they come, without incomplete characters and without stop texts."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING

from logo.stops import StopTexts

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

_INCOMPLETE = "�"  # bytes of an incomplete character decode to it


class Text:
    """The text of one answer in pieces, which together are the decoded answer, cut at a stop text.

    Args:
        tokenizer: special tokens are left out.
        stops: the text ends before the first of these.
    """

    def __init__(self, tokenizer: PreTrainedTokenizerBase, stops: Sequence[str] = ()) -> None:
        self._tokenizer = tokenizer
        self._text = StopTexts(stops)
        self._ids: list[int] = []
        self._start, self._read = 0, 0  # the first token to decode, and the number of tokens whose text is known

    @property
    def stopped(self) -> bool:
        """Whether there was a stop text."""
        return self._text.stopped

    def push(self, ids: Sequence[int]) -> str:
        """The new text that these tokens give."""
        if self.stopped:
            return ""
        self._ids.extend(ids)
        # As in vLLM, a few earlier tokens are decoded, too, since the text of a token depends on them.
        before = self._decode(self._ids[self._start : self._read])
        both = self._decode(self._ids[self._start :])
        if len(both) <= len(before) or both.endswith(_INCOMPLETE):
            return ""
        self._start, self._read = self._read, len(self._ids)
        return self._text.push(both[len(before) :])

    def finish(self) -> str:
        """The rest of the text, when there are no more tokens."""
        if self.stopped:
            return ""
        whole, known = self._decode(self._ids), self._text.known
        more = whole[len(known) :] if whole.startswith(known) else ""
        return self._text.push(more) + self._text.finish()

    def _decode(self, ids: Sequence[int]) -> str:
        text: str = self._tokenizer.decode(ids, skip_special_tokens=True)
        return text
