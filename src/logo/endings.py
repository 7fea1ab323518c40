"""Where an answer ends before it has the most new tokens: rules on its tokens, and texts that cut it."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING

from logo.core import FinishReason
from logo.errors import UsageError

if TYPE_CHECKING:
    from transformers import GenerationConfig, PreTrainedTokenizerBase

# Whether an answer of these tokens ends with the last one. A rule reads the answer's own tokens alone, so that the end
# does not depend on the other rows of the batch.
EndRule = Callable[[Sequence[int]], bool]


def end_tokens(config: GenerationConfig) -> set[int]:
    """The token ids that end a row."""
    ends = config.eos_token_id
    if ends is None:
        return set()
    return set(ends) if isinstance(ends, (list, tuple)) else {int(ends)}


def at_newline(tokenizer: PreTrainedTokenizerBase, *, official: bool = False) -> EndRule:
    """Ends an answer once its first line that is not blank is complete; `official`: at the single token of "\\n", as
    the official code: not at merged ones such as "\\n\\n", and a leading newline gives an empty answer."""
    if official:
        newline = tokenizer.encode("\n", add_special_tokens=False)[0]
        return lambda ids: ids[-1] == newline

    def complete(ids: Sequence[int]) -> bool:
        if "\n" not in tokenizer.decode(ids[-1:]):  # almost every step ends here
            return False
        return "\n" in tokenizer.decode(ids, skip_special_tokens=True).lstrip()

    return complete


def at_texts(tokenizer: PreTrainedTokenizerBase, stops: Sequence[str]) -> EndRule:
    """Ends an answer once it contains one of these texts, which need not be whole tokens and must not be empty."""
    # A token has at least one byte; a few more are read, because some decoders drop a leading blank.
    tail = max(len(stop.encode()) for stop in stops) + 4

    def holds(ids: Sequence[int]) -> bool:
        text = tokenizer.decode(ids[-tail:])  # a stop text may be a special token
        return any(stop in text for stop in stops)

    return holds


def at_stop_strings(config: GenerationConfig, tokenizer: PreTrainedTokenizerBase) -> list[EndRule]:
    """What ends an answer by a config's `stop_strings`, behind one of which it ends."""
    texts = stop_strings(config)
    return [at_texts(tokenizer, texts)] if texts else []


def stop_strings(config: GenerationConfig) -> list[str]:
    """The texts behind one of which an answer ends; UsageError: they are no texts."""
    texts = config.stop_strings or []
    if isinstance(texts, str):
        texts = [texts]
    if not isinstance(texts, (list, tuple)) or not all(isinstance(text, str) for text in texts):
        raise UsageError(f"stop_strings: expected a text or a list of texts, found {config.stop_strings!r:.60}")
    return [text for text in texts if text]


def cut_at(text: str, stops: Sequence[str]) -> str:
    """The text before the first occurrence of any stop text; all of it if there is none."""
    starts = [text.find(stop) for stop in stops if stop in text]
    return text[: min(starts, default=None)]


def cut_after_end(ids: list[int], end: set[int], rules: Sequence[EndRule] = ()) -> tuple[list[int], FinishReason]:
    """A row's continuation up to and including the token that ends it (in `end`, or by a rule), and why it ended:
    `"length"` if nothing did, so that it was cut at the most new tokens or at `max_time`. Tokens behind the end, which
    `generate` adds while other rows of the batch go on, are ignored."""
    for i, token in enumerate(ids):
        if token in end or any(rule(ids[: i + 1]) for rule in rules):
            return ids[: i + 1], "stop"
    return ids, "length"


class StopTexts:
    """Passes a text on in pieces, up to the first stop text (not empty), no part of which is ever passed on.

    Attributes:
        text: all of it so far.
        stopped: whether it holds a stop text; nothing is passed on any more.
    """

    def __init__(self, stops: Sequence[str]) -> None:
        self._stops = tuple(stops)
        self._passed = 0  # characters
        self.text = ""
        self.stopped = False

    def push(self, more: str) -> str:
        """Adds characters, and returns the new text that certainly is no part of a stop text."""
        if self.stopped:
            return ""
        self.text += more
        starts = [self.text.find(stop, self._passed) for stop in self._stops]
        starts = [start for start in starts if start >= 0]
        self.stopped = bool(starts)
        return self._pass(min(starts) if starts else len(self.text) - self._begun())

    def finish(self) -> str:
        """What is left of the text, when no more characters come."""
        return "" if self.stopped else self._pass(len(self.text))

    def _begun(self) -> int:
        """How many characters the text ends with that a stop text begins with."""
        most = min(len(self.text) - self._passed, max(map(len, self._stops), default=1) - 1)
        ends = (self.text[len(self.text) - count :] for count in range(most, 0, -1))
        return next((len(end) for end in ends if any(stop.startswith(end) for stop in self._stops)), 0)

    def _pass(self, end: int) -> str:
        piece = self.text[self._passed : end]
        self._passed = max(self._passed, end)
        return piece
