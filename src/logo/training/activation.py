"""Which tokens the adapters of a pool act on: resolves the recipe's activation with the rows of each task.

The invocation of an activated adapter is a text that every prompt contains. Tokenisation depends on the neighbouring
text, so the invocation's tokens are read from the prompts, and they have to be the same in all of them.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING

from logo.adapters.activation import Activation, last_occurrence
from logo.errors import DataError, LoGoError, UsageError
from logo.prompts import chat, conversation_text
from logo.training.examples import Example
from logo.training.prepared import Prepared
from logo.training.recipe import ACTIVATED, INVOCATION, Recipe
from logo.training.tasks import Task

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

# Tokens at the end of a prompt on which `activated` adapters act where no chat template opens a turn.
USUAL_LAST = 4

_INSTEAD = "give --last N, or an --invocation that all prompts contain"


@dataclass(frozen=True)
class Settled:
    """A task with the activation of its adapter resolved.

    Attributes:
        recipe: the task's recipe, with `last:N` or an invocation instead of `activated`.
        invocation: tokens from which the adapter acts; empty if it has none.
        rows: the examples, each with the position at which its prompt activates the adapter.
    """

    recipe: Recipe
    invocation: tuple[int, ...]
    rows: tuple[Example, ...]


class Settling:
    """Resolves the activation of the adapters of one pool, task by task.

    Args:
        tokenizer: the base model's tokenizer.
    """

    def __init__(self, tokenizer: PreTrainedTokenizerBase) -> None:
        self._tokenizer = tokenizer
        self._known: dict[str, tuple[int, ...]] = {}  # the tokens of a text, as in the first row that has it

    def settle(self, task: Task, recipe: Recipe, rows: Sequence[Example]) -> Settled:
        """Resolves where the adapter of a task acts in each of its rows.

        Raises:
            DataError: a prompt lacks the invocation, or has it as other tokens (names the row).
        """
        if recipe.activation == ACTIVATED:
            recipe = self._chosen(task, recipe)
        if recipe.activation != INVOCATION:
            activation = Activation.parse(recipe.activation)
            return Settled(recipe, (), tuple(replace(row, begin=activation.begin(_prompt(row)) or 0) for row in rows))
        text, begun = recipe.invocation, []
        for number, row in enumerate(rows, start=1):
            tokens = self._known.get(text) or self._tokens(text, row)
            begin = last_occurrence(_prompt(row), tokens) if tokens else None
            if begin is None:
                raise DataError(f"{task.source}, row {number}: {self._missing(text, tokens, row, recipe)}")
            begun.append(replace(row, begin=begin))
            self._known[text] = tokens
        return Settled(recipe, self._known[text], tuple(begun))

    def _chosen(self, task: Task, recipe: Recipe) -> Recipe:
        """The recipe with `activated` replaced: by the text that opens the assistant's turn if rows are conversations
        and the tokenizer has a chat template, else by the last tokens."""
        asked = task.pairs[0].prompt
        if isinstance(asked, str) or not self._tokenizer.chat_template:
            return replace(recipe, activation=f"last:{USUAL_LAST}")
        try:
            before, whole = conversation_text(self._tokenizer, asked), chat(self._tokenizer, asked).text or ""
        except LoGoError as error:
            raise DataError(f"{task.source}, row 1: {error}") from error
        opening = whole[len(before) :] if whole.startswith(before) else ""
        if not opening.strip():
            raise DataError(
                f"{task.source}: the chat template writes nothing that opens the assistant's turn, from which the "
                f"adapter could act; {_INSTEAD}"
            )
        return replace(recipe, activation=INVOCATION, invocation=opening)

    def _tokens(self, text: str, row: Example) -> tuple[int, ...]:
        """The tokens of a text within a prompt, or alone if it does not stand there as tokens of its own."""
        alone = tuple(self._tokenizer(text, add_special_tokens=False)["input_ids"])
        if alone and last_occurrence(_prompt(row), alone) is not None:
            return alone
        for part in (text, text.lstrip()):  # decoders may leave out a space at the beginning
            found = self._standing(part, _prompt(row))
            if found and self._text(found).lstrip() == text.lstrip():
                return found
        return alone

    def _missing(self, text: str, tokens: Sequence[int], row: Example, recipe: Recipe) -> str:
        """Why a prompt cannot activate an adapter."""
        found = self._standing(text, _prompt(row)) or self._standing(text.lstrip(), _prompt(row))
        if found:
            expected, here = (self._tokenizer.convert_ids_to_tokens(list(some)) for some in (tokens, found))
            return (
                f"the tokenizer splits the invocation {text!r:.60} differently here: expected tokens {expected}, found "
                f"{here}; separate it from what stands around it in the same way in every prompt, or {_INSTEAD}"
            )
        cut = " (--max-length may have cut it off)" if len(row) >= recipe.max_length else ""
        end = self._text(_prompt(row)[-12:])
        return (
            f"expected the invocation {text!r:.60} in the prompt, found {end!r:.90} at its end{cut}; fix the row, or "
            f"{_INSTEAD}"
        )

    def _standing(self, text: str, prompt: Sequence[int]) -> tuple[int, ...]:
        """The fewest tokens that hold the last occurrence of a text; none if it does not occur."""
        if text not in self._text(prompt):
            return ()
        start = next(start for start in reversed(range(len(prompt))) if text in self._text(prompt[start:]))
        stops = range(start + 1, len(prompt) + 1)
        return tuple(next(prompt[start:stop] for stop in stops if text in self._text(prompt[start:stop])))

    def _text(self, tokens: Sequence[int]) -> str:
        return str(self._tokenizer.decode(list(tokens), clean_up_tokenization_spaces=False))


def acting(task: Prepared) -> Activation:
    """The activation of a task's adapter."""
    return Activation(task.invocation) if task.invocation else Activation.parse(task.recipe.activation)


def common(tasks: Sequence[Prepared]) -> Activation | None:
    """The activation that the adapters of all tasks share; None if there are no tasks.

    Raises:
        UsageError: they differ; a pool has one activation.
    """
    for task in tasks[1:]:
        if acting(task) != acting(tasks[0]):
            raise UsageError(
                f"a pool has one activation: task {tasks[0].name!r} has {_said(tasks[0].recipe)}, and {task.name!r} "
                f"has {_said(task.recipe)}; give --last N or --invocation TEXT for all, or train them into two pools"
            )
    return acting(tasks[0]) if tasks else None


def _said(recipe: Recipe) -> str:
    return f"invocation {recipe.invocation!r:.60}" if recipe.invocation else recipe.activation


def _prompt(row: Example) -> tuple[int, ...]:
    return row.ids[: row.prompt]
