"""Token ids to text while they come: whole characters only, and nothing of a stop text or behind it."""

from __future__ import annotations

from collections.abc import Sequence
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
        self._stops = tuple(stops)
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
            self._known += both[len(before) :]
            self._start, self._read = self._read, len(self._ids)
        return self._show(self._held_back())

    def finish(self) -> str:
        """What is left when no token comes any more."""
        if self.stopped:
            return ""
        whole = self._decode(self._ids)
        if whole.startswith(self._known):
            self._known = whole
        return self._show(0)

    def _show(self, held_back: int) -> str:
        first = min((place for stop in self._stops if (place := self._known.find(stop)) >= 0), default=None)
        self.stopped = first is not None
        end = len(self._known) - held_back if first is None else first
        piece = self._known[self._sent : end]
        self._sent = max(self._sent, end)
        return piece

    def _held_back(self) -> int:
        """Characters at the end with which a stop text may have begun."""
        longest = max((len(stop) - 1 for stop in self._stops), default=0)
        for count in range(min(longest, len(self._known)), 0, -1):
            if any(stop.startswith(self._known[-count:]) for stop in self._stops):
                return count
        return 0

    def _decode(self, ids: Sequence[int]) -> str:
        text: str = self._tokenizer.decode(ids, skip_special_tokens=True)
        return text
