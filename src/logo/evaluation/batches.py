"""Prompts through an engine in batches, with error handling.

If the engine refuses a batch, or it does not fit into memory, its prompts are asked one by one, so that only the prompt
at fault gets no answer. Errors of the run (an option that cannot be used, a failed disk) end it. This module knows
engines by the protocol below only, and nothing about datasets.
"""

from __future__ import annotations

import warnings
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, Protocol

from logo.errors import HubError, LoGoError, StorageError, is_out_of_memory

if TYPE_CHECKING:
    from logo.core import Generation
    from logo.prompts import Conversation

OUT_OF_MEMORY = "out of memory with this prompt alone; ask for fewer new tokens, or use a smaller dtype"


class Engine(Protocol):
    """Anything that answers prompts, texts or conversations: one generation per prompt, in order."""

    def generate(self, prompts: list[Any], *, max_new_tokens: int, batch_size: int) -> Sequence[Generation]: ...


@dataclass(frozen=True)
class Failure:
    """A prompt without an answer: the error, with a message of one line."""

    error: Exception

    @property
    def message(self) -> str:
        return OUT_OF_MEMORY if is_out_of_memory(self.error) else " ".join(str(self.error).split())


Batch = tuple[Any, ...]  # a `Generation` or a `Failure` for each of a few prompts, in order


def in_batches(
    engine: Engine,
    prompts: Sequence[str | Conversation],
    *,
    batch_size: int,
    max_new_tokens: int,
    proven: bool = False,
) -> Iterator[Batch]:
    """Answers to all prompts, in order.

    Args:
        batch_size: number of prompts that the engine gets at once.
        max_new_tokens: of each answer.
        proven: the engine has answered prompts of this run before, so a refusal concerns the prompt and not the run.

    Raises:
        LoGoError: the engine refuses the first prompts (a whole batch, at least two) for the same reason, or cannot
            read its files.
        RuntimeError: the engine does not return one generation per prompt, or the first prompts do not fit into memory
            one by one.
    """
    held: list[Batch] = []  # until a prompt has an answer: the run may fail in all of them
    for start in range(0, len(prompts), batch_size):
        held.append(_answers(engine, list(prompts[start : start + batch_size]), max_new_tokens))
        if not proven:
            answers = [answer for batch in held for answer in batch]
            failures = [answer for answer in answers if isinstance(answer, Failure)]
            if len(failures) == len(answers) and len({failure.message for failure in failures}) == 1:
                if len(failures) >= max(2, min(batch_size, len(prompts))):
                    raise failures[0].error
                continue
            proven = True
        yield from held
        held.clear()
    yield from held


def _answers(engine: Engine, prompts: list[Any], max_new_tokens: int) -> Batch:
    """One answer per prompt."""
    answers = _attempt(engine, prompts, max_new_tokens)
    if not isinstance(answers, Failure):
        return answers
    if len(prompts) == 1:
        return (answers,)
    if is_out_of_memory(answers.error):
        message = f"out of memory with {len(prompts)} prompts at once: going on one by one; use a smaller batch"
        warnings.warn(message, UserWarning, stacklevel=2)
    single = [_attempt(engine, [prompt], max_new_tokens) for prompt in prompts]
    return tuple(answer if isinstance(answer, Failure) else answer[0] for answer in single)


def _attempt(engine: Engine, prompts: list[Any], max_new_tokens: int) -> tuple[Generation, ...] | Failure:
    try:
        generations = engine.generate(prompts, max_new_tokens=max_new_tokens, batch_size=len(prompts))
    except (StorageError, HubError):
        raise
    except (LoGoError, RuntimeError) as error:
        if not isinstance(error, LoGoError) and not is_out_of_memory(error):
            raise
        # The traceback's frames hold tensors, which would leave no room for the next attempt.
        return Failure(error.with_traceback(None))
    if len(generations) != len(prompts):
        raise RuntimeError(f"engine: expected {len(prompts)} generations, one per prompt, found {len(generations)}")
    return tuple(generations)
