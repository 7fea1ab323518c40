"""Rules that end an answer before it has the most new tokens.

A rule reads the answer's own tokens alone, so that the end does not depend on the other rows of the batch.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING, Any, Literal

import torch
from torch import Tensor
from transformers import StoppingCriteria
from transformers.generation import GenerationMode

if TYPE_CHECKING:
    from transformers import GenerationConfig, PreTrainedTokenizerBase

FinishReason = Literal["stop", "length"]
# Whether an answer of these tokens ends with the last one.
EndRule = Callable[[Sequence[int]], bool]


def end_tokens(config: GenerationConfig) -> set[int]:
    """The token ids that end a row."""
    ends = config.eos_token_id
    if ends is None:
        return set()
    return set(ends) if isinstance(ends, (list, tuple)) else {int(ends)}


def at_newline(tokenizer: PreTrainedTokenizerBase, *, official: bool = False) -> EndRule:
    """Ends an answer once its first line that is not blank is complete.

    Args:
        tokenizer: decodes tokens, to find newlines inside them.
        official: end on the single token of "\\n" as the official code does, wherever it occurs; merged tokens such
            as "\\n\\n" then do not end an answer, and a leading newline gives an empty one.
    """
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


class EndRows(StoppingCriteria):  # type: ignore[misc]
    """Ends each row of a batch by the same rules.

    Args:
        rules: on new tokens only, so that nothing in a prompt ends its answer.
        prompt_length: padded length of the prompts, where new tokens start.
        growing: each call adds one token to each row, so that only this one is copied from the device; see
            `only_grows`. Otherwise every call copies all new tokens.
    """

    def __init__(self, rules: Sequence[EndRule], prompt_length: int, *, growing: bool = False) -> None:
        self.rules = rules
        self.prompt_length = prompt_length
        self.growing = growing
        self._rows: list[list[int]] = []  # the new tokens so far

    def __call__(self, input_ids: Tensor, scores: Tensor | None = None, **kwargs: Any) -> Tensor:
        done = [any(rule(row) for rule in self.rules) for row in self._read(input_ids[:, self.prompt_length :])]
        if not any(done):  # made on the device, without a copy
            return torch.zeros(len(done), dtype=torch.bool, device=input_ids.device)
        return torch.tensor(done, device=input_ids.device)

    def _read(self, new: Tensor) -> list[list[int]]:
        if not (self.growing and self._rows) or new.shape != (len(self._rows), len(self._rows[0]) + 1):
            self._rows = new.tolist()
            return self._rows
        for row, token in zip(self._rows, new[:, -1].tolist(), strict=True):
            row.append(token)
        return self._rows


def only_grows(config: GenerationConfig) -> bool:
    """Whether decoding adds one token to each row in every step, unlike beam search."""
    return config.get_generation_mode() in (GenerationMode.GREEDY_SEARCH, GenerationMode.SAMPLE)


def cut_at(text: str, stops: Sequence[str]) -> str:
    """The text before the first occurrence of any stop text; all of it if there is none."""
    return text[: min((place for stop in stops if (place := text.find(stop)) >= 0), default=None)]


def cut_after_end(ids: list[int], end: set[int], rules: Sequence[EndRule] = ()) -> tuple[list[int], FinishReason]:
    """A row's continuation up to and including the token that ends it, and why it ended: `"length"` if nothing did, so
    that it was cut at the most new tokens or at `max_time`.

    Tokens behind the end, which `generate` adds while other rows of the batch go on, are ignored.

    Args:
        ids: new tokens, also those behind the end.
        end: token ids that end a row.
        rules: further rules that end a row.
    """
    for i, token in enumerate(ids):
        if token in end or any(rule(ids[: i + 1]) for rule in rules):
            return ids[: i + 1], "stop"
    return ids, "length"
