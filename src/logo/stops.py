"""`StopTexts`: cuts a text that comes in pieces before the first stop text in it."""

from __future__ import annotations

from collections.abc import Generator, Iterator, Sequence
from contextlib import closing
from functools import lru_cache


class StopTexts:
    """Passes a text on in pieces, up to the first stop text, no part of which is ever passed on.

    Args:
        stops: the text ends before the first of these, which must not be empty.

    Attributes:
        known: the text so far.
        stopped: whether it holds a stop text; nothing is passed on any more.
    """

    def __init__(self, stops: Sequence[str]) -> None:
        self._stops = [_Match(stop) for stop in stops]
        self._sent = 0
        self.known = ""
        self.stopped = False

    def push(self, more: str) -> str:
        """Adds characters, and returns the new text that certainly is no part of a stop text."""
        if self.stopped:
            return ""
        self.known += more
        for match in self._stops:
            match.read(more)
        first = min((match.place for match in self._stops if match.place is not None), default=None)
        self.stopped = first is not None
        return self._pass(len(self.known) - max((match.begun for match in self._stops), default=0), first)

    def finish(self) -> str:
        """The rest of the text, when no more characters come."""
        return "" if self.stopped else self._pass(len(self.known), None)

    def _pass(self, end: int, first: int | None) -> str:
        end = end if first is None else first
        piece = self.known[self._sent : end]
        self._sent = max(self._sent, end)
        return piece


def cut_pieces(pieces: Generator[str], stops: Sequence[str]) -> Iterator[str]:
    """The pieces of a text up to the first stop text, none of them empty."""
    text = StopTexts(stops)
    with closing(pieces):
        for piece in pieces:
            if passed := text.push(piece):
                yield passed
    if rest := text.finish():
        yield rest


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
