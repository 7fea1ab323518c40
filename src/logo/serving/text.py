"""`Text`: decodes tokens as they come, without incomplete characters and without stop texts."""

from __future__ import annotations

from collections.abc import Sequence
from functools import lru_cache
from typing import TYPE_CHECKING

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
        self._stops = [_Match(stop) for stop in stops]
        self._ids: list[int] = []
        self._start, self._read = 0, 0  # the first token to decode, and the number of tokens whose text is known
        self._known = ""
        self._sent = 0
        self.stopped = False

    def push(self, ids: Sequence[int]) -> str:
        """The new text that these tokens give."""
        if self.stopped:
            return ""
        self._ids.extend(ids)
        # As in vLLM, a few earlier tokens are decoded, too, since the text of a token depends on them.
        before = self._decode(self._ids[self._start : self._read])
        both = self._decode(self._ids[self._start :])
        if len(both) > len(before) and not both.endswith(_INCOMPLETE):
            self._learn(both[len(before) :])
            self._start, self._read = self._read, len(self._ids)
        return self._show(max((match.begun for match in self._stops), default=0))

    def finish(self) -> str:
        """The rest of the text, when there are no more tokens."""
        if self.stopped:
            return ""
        whole = self._decode(self._ids)
        if whole.startswith(self._known):
            self._learn(whole[len(self._known) :])
        return self._show(0)

    def _learn(self, more: str) -> None:
        self._known += more
        for match in self._stops:
            match.read(more)

    def _show(self, held_back: int) -> str:
        """The new text without so many characters at the end, with which a stop text may begin."""
        first = min((match.place for match in self._stops if match.place is not None), default=None)
        self.stopped = first is not None
        end = len(self._known) - held_back if first is None else first
        piece = self._known[self._sent : end]
        self._sent = max(self._sent, end)
        return piece

    def _decode(self, ids: Sequence[int]) -> str:
        text: str = self._tokenizer.decode(ids, skip_special_tokens=True)
        return text


class _Match:
    """Searches for a text in another that comes in pieces, in linear time.

    The algorithm of Knuth, Morris and Pratt (SIAM J. Comput. 6, 1977).

    Attributes:
        begun: how many characters of the text the input ends with.
        place: the position of its first occurrence; None: none yet.
    """

    def __init__(self, text: str) -> None:
        self._text, self._borders = text, _borders(text)
        self._count = 0
        self.begun = 0
        self.place: int | None = None

    def read(self, piece: str) -> None:
        """Reads the next piece."""
        if self.place is not None:
            return
        text, borders, begun = self._text, self._borders, self.begun
        for number, character in enumerate(piece, start=self._count + 1):
            while begun and text[begun] != character:
                begun = borders[begun - 1]
            begun += text[begun] == character
            if begun == len(text):
                self.place = number - begun
                return
        self.begun, self._count = begun, self._count + len(piece)


@lru_cache(maxsize=256)  # all answers of a request search for the same texts
def _borders(text: str) -> tuple[int, ...]:
    """For every beginning of the text: the longest shorter one that it ends with."""
    borders, length = [0], 0
    for character in text[1:]:
        while length and text[length] != character:
            length = borders[length - 1]
        length += text[length] == character
        borders.append(length)
    return tuple(borders)
