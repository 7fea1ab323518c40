"""`CompletionScorer`: scores completions under mixtures on one model, by the pure functions of `logo.scoring`."""

from __future__ import annotations

import functools
from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING

from logo.adapters.pool import AdapterPool
from logo.decoding import Prompts, batches_by_length, input_device
from logo.mixing import Mixer
from logo.scoring import Scored, continued_rows, score_continued, score_mixtures

if TYPE_CHECKING:
    from transformers import PreTrainedModel


class CompletionScorer:
    """Scores completions, teacher-forced.

    Args:
        model: a Hugging Face causal LM.
        prompts: for padding, the tokenizer and the context.
        mixer: of the same model.
    """

    def __init__(self, model: PreTrainedModel, prompts: Prompts, mixer: Mixer) -> None:
        self._model, self._prompts, self._mixer = model, prompts, mixer

    def mixtures(
        self, pool: AdapterPool, row: Sequence[int], gold: Sequence[int], mixtures: Sequence[Mapping[str, float]]
    ) -> list[Scored]:
        """One completion of one prompt under each mixture."""
        active = functools.partial(self._mixer.active, pool)
        vocabulary, device = len(self._prompts.tokenizer), input_device(self._model)
        return score_mixtures(self._model, row, gold, mixtures, active, vocabulary, device)

    def pairs(
        self,
        pool: AdapterPool,
        pairs: Sequence[tuple[Sequence[int], Sequence[int]]],
        mixtures: Sequence[Mapping[str, float]],
        batch_size: int,
    ) -> list[Scored]:
        """Many completions, each after its own prompt and under its own mixture; errors as `continued_rows`."""
        rows = continued_rows(pairs, mixtures, self._prompts.context)
        active = functools.partial(self._mixer.active, pool)
        pad = functools.partial(self._prompts.pad, side="right", device=input_device(self._model))
        vocabulary = len(self._prompts.tokenizer)
        scored: dict[int, Scored] = {}
        for batch in batches_by_length([len(row.ids) for row in rows], batch_size):
            scored |= score_continued(self._model, [rows[i] for i in batch], active, pad, vocabulary)
        return [scored[number] for number in range(len(pairs))]
