"""`CompletionScorer`: scores completions under mixtures on one model, by the pure functions of `logo.scoring`."""

from __future__ import annotations

import functools
from collections.abc import Mapping, Sequence
from contextlib import AbstractContextManager
from typing import TYPE_CHECKING, Any

from logo.adapters.activation import earliest
from logo.adapters.pool import AdapterPool
from logo.decoding import Prompts, batches_by_length, input_device
from logo.mixing import Mixer, Mixture
from logo.prompts import Prompt, answer_lead, is_conversation
from logo.scoring import Continued, Read, Scored, completion_ids, continued_rows, score_continued, score_mixtures
from logo.selection.beginnings import Beginnings
from logo.selection.probe import cache_argument

if TYPE_CHECKING:
    from transformers import PreTrainedModel

    from logo.prompts import OnePrompt


def encoded(prompts: Prompts, prompt: OnePrompt, completion: str) -> tuple[Prompt, list[int]]:
    """A prompt and a completion as they are scored. If they exceed the context, the prompt is cut.

    The completion of a conversation has in front of it what the chat template writes between prompt and answer.

    Raises:
        UsageError: an empty prompt, or a completion without tokens or too long.
    """
    tokenizer = prompts.tokenizer
    [whole] = prompts.read([prompt], room=None)
    text = tokenizer.decode(whole.ids) if whole.text is None else whole.text
    lead = answer_lead(tokenizer, prompt, text) if is_conversation(prompt) else None  # type: ignore[arg-type]
    said = completion.strip() if isinstance(completion, str) else ""
    if lead is not None and said:
        text, completion = "", lead + said
    gold = completion_ids(tokenizer, text, completion, prompts.context)
    [row] = prompts.read([whole], room=len(gold))
    return row, gold


class CompletionScorer:
    """Scores completions, teacher-forced.

    Args:
        model: a Hugging Face causal LM.
        prompts: for padding, the tokenizer and the context.
        mixer: of the same model.
        beginnings: the cache of prompt beginnings.
    """

    def __init__(
        self, model: PreTrainedModel, prompts: Prompts, mixer: Mixer, beginnings: Beginnings | None = None
    ) -> None:
        self._model, self._prompts, self._mixer = model, prompts, mixer
        self._beginnings = beginnings

    def mixtures(
        self, pool: AdapterPool, row: Sequence[int], gold: Sequence[int], mixtures: Sequence[Mapping[str, float]]
    ) -> list[Scored]:
        """Scores one completion of one prompt under each mixture."""
        vocabulary, device = len(self._prompts.tokenizer), input_device(self._model)
        start = earliest(pool.activations, row) if self._beginnings is not None else 0
        read = None
        if start and self._beginnings is not None:
            read = Read(start, functools.partial(self._read, row[:start]))

        def active(some: Sequence[Mapping[str, float]]) -> AbstractContextManager[Any]:
            return self._mixer.active(pool, [Mixture.of(pool, one, row).shifted(0, start) for one in some])

        return score_mixtures(self._model, row, gold, mixtures, active, vocabulary, device, read)

    def pairs(
        self,
        pool: AdapterPool,
        pairs: Sequence[tuple[Sequence[int], Sequence[int]]],
        mixtures: Sequence[Mapping[str, float]],
        batch_size: int,
    ) -> list[Scored]:
        """Scores completions, each after its own prompt and under its own mixture; errors as `continued_rows`."""
        plain = all(activation.everywhere for activation in pool.activations)
        rows = continued_rows(pairs, mixtures, self._prompts.context, apart=not plain)
        pad = functools.partial(self._prompts.pad, side="right", device=input_device(self._model))
        vocabulary, active = len(self._prompts.tokenizer), functools.partial(self._active, pool)
        scored: dict[int, Scored] = {}
        for batch in batches_by_length([len(row.ids) for row in rows], batch_size):
            scored |= score_continued(self._model, [rows[i] for i in batch], active, pad, vocabulary)
        return [scored[number] for number in range(len(pairs))]

    def _read(self, beginning: Sequence[int], rows: int) -> dict[str, Any]:
        """The cache of a beginning for so many rows."""
        assert self._beginnings is not None
        cache = self._beginnings.cache([beginning], [len(beginning)], [len(beginning)])
        cache.batch_repeat_interleave(rows)
        return {cache_argument(self._model) or "": cache}

    def _active(self, pool: AdapterPool, rows: Sequence[Continued]) -> AbstractContextManager[Any]:
        """Activates the mixtures of rows that are read whole, each adapter from where it acts in the row's prompt."""
        return self._mixer.active(pool, [Mixture.of(pool, row.mixture, row.prompt) for row in rows])
