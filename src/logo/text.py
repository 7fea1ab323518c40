"""`Text`: decodes tokens as they come, without incomplete characters, special tokens and stop texts."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING

from logo.endings import EndRule, StopTexts, at_texts

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

_INCOMPLETE = "�"  # bytes of an incomplete character decode to it


class Text:
    """The text of one answer in pieces, which together are the decoded answer without special tokens, up to the first
    of the `stops`, which may hold special tokens."""

    def __init__(self, tokenizer: PreTrainedTokenizerBase, stops: Sequence[str] = ()) -> None:
        self._tokenizer = tokenizer
        self._text = StopTexts(stops)
        self._by_token = bool(stops)  # so that no token behind a stop text is taken
        tokens = {stop: tokenizer(stop, add_special_tokens=False)["input_ids"] for stop in stops}
        special = [stop for stop, ids in tokens.items() if self._decode(ids) != tokenizer.decode(ids)]
        self._ends: EndRule | None = at_texts(tokenizer, special) if special else None
        self._ids: list[int] = []
        self._start = 0  # the first token to decode
        self._read = 0  # the number of tokens whose text is known

    @property
    def taken(self) -> int:
        """The number of tokens so far, without those behind the one that completes a stop text."""
        return len(self._ids)

    @property
    def stopped(self) -> bool:
        """Whether there was a stop text."""
        return self._text.stopped

    def push(self, ids: Sequence[int]) -> str:
        """The new text that these tokens give."""
        new = ""
        for part in [[token] for token in ids] if self._by_token else [ids]:
            if self.stopped:
                break
            self._ids.extend(part)
            new += self._text.push(self._more())
            if not self.stopped and self._ends is not None and self._ends(self._ids):
                new += self.finish()
                self._text.stopped = True
        return new

    def finish(self) -> str:
        """The rest of the text, when there are no more tokens."""
        return self._text.push(self._more(held=False)) + self._text.finish()

    def _more(self, held: bool = True) -> str:
        """The text of the tokens that are not read yet; it is `held` back if it ends with an incomplete character."""
        # As in vLLM, a few earlier tokens are decoded, too, since the text of a token depends on them.
        before = self._decode(self._ids[self._start : self._read])
        both = self._decode(self._ids[self._start :])
        if len(both) <= len(before) or (held and both.endswith(_INCOMPLETE)):
            return ""
        self._start = self._read
        self._read = len(self._ids)
        return both[len(before) :]

    def _decode(self, ids: Sequence[int]) -> str:
        text: str = self._tokenizer.decode(ids, skip_special_tokens=True)
        return text
