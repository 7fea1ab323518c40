"""Rows of a task as tokens: the prompt, tokenised as at inference, and the completion to learn."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING

from logo.errors import DataError, LoGoError
from logo.prompts import chat, cut_left, text_ids, written_answer
from logo.scoring import joined
from logo.training.tasks import Pair, Task

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase


@dataclass(frozen=True)
class Example:
    """One row.

    Attributes:
        ids: tokens of the prompt and of the completion.
        prompt: number of prompt tokens. The loss covers the tokens after them.
        begin: the first token on which an adapter acts; a prompt token.
    """

    ids: tuple[int, ...]
    prompt: int
    begin: int = 0

    @property
    def completion(self) -> int:
        """Number of tokens that the loss covers."""
        return len(self.ids) - self.prompt

    def __len__(self) -> int:
        return len(self.ids)


@dataclass(frozen=True)
class Examples:
    """The rows of a task, and how many prompts were truncated at their beginning."""

    rows: tuple[Example, ...]
    cut: int


def encode(tokenizer: PreTrainedTokenizerBase, task: Task, max_length: int, context: int | None = None) -> Examples:
    """The rows of a task as tokens.

    A text ends with the tokenizer's end token, so that the adapter learns where to stop. An answer in a conversation
    ends as the chat template ends it, and then with that token. Completions are encoded on their own, as
    `logo.scoring` does, because a prompt keeps the tokens that it has when it is asked.

    Args:
        max_length: tokens of a row at most.
        context: tokens that the base model reads at most; None: any number.

    Raises:
        DataError: a row cannot be encoded, or its completion is longer than `max_length` or the context (names the
            row).
    """
    rows, cut = [], 0
    most = max_length if context is None else min(max_length, context)
    for number, pair in enumerate(task.pairs, start=1):
        try:
            prompt, completion = _tokens(tokenizer, pair)
        except LoGoError as error:
            raise DataError(f"{task.source}, row {number}: {error}") from error
        room = most - len(completion)
        if room < 1 or not completion:
            more = ", or raise --max-length" if most == max_length else ", since the base model reads no more"
            raise DataError(
                f"{task.source}, row {number}: the completion has {len(completion)} tokens, and a row may have "
                f"{most} with its prompt; shorten it{more}"
            )
        if not prompt:
            raise DataError(f"{task.source}, row {number}: the prompt has no tokens; fix or delete the row")
        cut += len(prompt) > room
        kept = cut_left(tokenizer, prompt, room)
        rows.append(Example((*kept, *completion), len(kept)))
    return Examples(tuple(rows), cut)


def _tokens(tokenizer: PreTrainedTokenizerBase, pair: Pair) -> tuple[list[int], list[int]]:
    """The token ids of the prompt and of the completion."""
    end = [] if tokenizer.eos_token_id is None else [int(tokenizer.eos_token_id)]
    if isinstance(pair.prompt, str):
        return text_ids(tokenizer, pair.prompt), _ids(tokenizer, joined(pair.prompt, pair.completion)) + end
    prompt = chat(tokenizer, pair.prompt)
    text = prompt.text or ""
    written = written_answer(tokenizer, pair.prompt, text, pair.completion)
    if written is not None:
        return list(prompt.ids), _ended(_ids(tokenizer, written.rstrip()), end)
    return list(prompt.ids), _ids(tokenizer, joined(text, pair.completion)) + end


def _ended(ids: list[int], end: list[int]) -> list[int]:
    """An answer up to its last end token. If the template ends it with another one, the end token is appended, because
    generation stops there."""
    if end and end[0] in ids:
        return ids[: len(ids) - ids[::-1].index(end[0])]
    return ids + end


def _ids(tokenizer: PreTrainedTokenizerBase, text: str) -> list[int]:
    found: list[int] = tokenizer(text, add_special_tokens=False)["input_ids"]
    return found
