"""Streaming text from token ids: complete characters only, and nothing from a stop text on."""

from __future__ import annotations

from collections.abc import Sequence
from functools import lru_cache
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

_INCOMPLETE = "�"  # how bytes decode that are no whole character yet


class Text:
    """The text of one answer, piece by piece; the pieces joined are what the whole decodes to, cut at a stop text.

    Args:
        tokenizer: special tokens are left out.
        stops: the text ends before the first of these.
    """

    def __init__(self, tokenizer: PreTrainedTokenizerBase, stops: Sequence[str] = ()) -> None:
        self._tokenizer = tokenizer
        self._stops = [_Match(stop) for stop in stops]
        self._ids: list[int] = []
        self._start, self._read = 0, 0  # tokens from which on is decoded, and those whose text is known
        self._known = ""
        self._sent = 0
        self.stopped = False

    def push(self, ids: Sequence[int]) -> str:
        """What these tokens add to the text that may be shown."""
        if self.stopped:
            return ""
        self._ids.extend(ids)
        # As vLLM does it: a few tokens before are decoded along, since what a token looks like depends on them.
        before = self._decode(self._ids[self._start : self._read])
        both = self._decode(self._ids[self._start :])
        if len(both) > len(before) and not both.endswith(_INCOMPLETE):
            self._learn(both[len(before) :])
            self._start, self._read = self._read, len(self._ids)
        return self._show(max((match.begun for match in self._stops), default=0))

    def finish(self) -> str:
        """What is left when no token comes any more."""
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
        """What may be shown, but for so many characters at the end, with which a stop text may have begun."""
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
    """Looks for a text in another that comes piece by piece, in a time proportional to what comes.

    The algorithm of Knuth, Morris and Pratt (SIAM J. Comput. 6, 1977).

    Attributes:
        begun: how much of the text stands at the end of what has come.
        place: where the text first stands in it; None: nowhere yet.
    """

    def __init__(self, text: str) -> None:
        self._text, self._borders = text, _borders(text)
        self._count = 0
        self.begun = 0
        self.place: int | None = None

    def read(self, piece: str) -> None:
        """What comes next."""
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


@lru_cache(maxsize=256)  # every answer of a request looks for the same texts
def _borders(text: str) -> tuple[int, ...]:
    """For every beginning of the text: the longest shorter one that it ends with."""
    borders, length = [0], 0
    for character in text[1:]:
        while length and text[length] != character:
            length = borders[length - 1]
        length += text[length] == character
        borders.append(length)
    return tuple(borders)
