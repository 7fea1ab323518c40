"""`Decoder`: prompts and a mixture for each, continued by `model.generate`."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor
from transformers import GenerationConfig, StoppingCriteria, StoppingCriteriaList

from logo.adapters.pool import AdapterPool
from logo.decoding import Cancelled, FinishReason, Prompts, StopAt, StopAtNewline, cut_after_end, end_tokens, streamed
from logo.mixing import Mixer, Work
from logo.selection import Selection

if TYPE_CHECKING:
    from transformers import PreTrainedModel

# How much the last answer counts in how long answers are taken to be.
_RECENT = 0.1


@dataclass(frozen=True)
class Generation:
    """One answer.

    Attributes:
        text: the decoded continuation, special tokens removed, cut before a `stop` text.
        selection: which adapters gave it.
        token_ids: the continuation's tokens, its end token included.
        finish_reason: `"stop"` (the model or a stop rule ended it) or `"length"`.
        seconds: this prompt's share of the wall time: `{"probe", "generate"}`.
    """

    text: str
    selection: Selection
    token_ids: tuple[int, ...]
    finish_reason: FinishReason
    seconds: dict[str, float]


class Decoder:
    """Continues prompts under mixtures.

    Args:
        model: a Hugging Face causal LM.
        prompts: for padding and the tokenizer.
        mixer: of the same model.
    """

    def __init__(self, model: PreTrainedModel, prompts: Prompts, mixer: Mixer) -> None:
        self.model = model
        self.prompts = prompts
        self._mixer = mixer
        self._usual: float | None = None  # new tokens of an answer that ends by itself

    def __call__(
        self,
        pool: AdapterPool,
        rows: Sequence[Sequence[int]],
        mixtures: Sequence[Mapping[str, float]],
        config: GenerationConfig,
        stop_at_newline: bool | str = False,
        stop: Sequence[str] = (),
    ) -> list[tuple[list[int], FinishReason]]:
        """The new tokens of each row, its end token included, and why it ended.

        Args:
            pool: fitted to the model.
            rows: token ids of the prompts, in one batch.
            mixtures: adapter name -> weight, one per row.
            config: how to decode.
            stop_at_newline: see `StopAtNewline`.
            stop: see `StopAt`.
        """
        criteria: list[StoppingCriteria] = []
        tokenizer = self.prompts.tokenizer
        start = max(map(len, rows))
        if stop:
            criteria.append(StopAt(tokenizer, start, stop))
        if stop_at_newline:
            criteria.append(StopAtNewline(tokenizer, start, official=stop_at_newline == "official"))
        tokens = self._continue(pool, rows, mixtures, config, criteria)
        ends = end_tokens(config, self.model.generation_config)
        # A row that a stop rule ended is filled up with pad tokens while the others go on.
        stopped_early = len(rows) > 1 and (stop_at_newline or stop or config.stop_strings)
        padding = tokenizer.pad_token_id if stopped_early else None
        answers = [cut_after_end(row, ends, config.max_new_tokens, padding) for row in tokens]
        self._learn([len(ids) for ids, reason in answers if reason == "stop"])
        return answers

    def stream(
        self, pool: AdapterPool, row: Sequence[int], mixture: Mapping[str, float], config: GenerationConfig, lock: Any
    ) -> Iterator[str]:
        """The text of one continuation piece by piece; `lock` is held while it is generated."""

        def generate(streamer: Any, cancelled: Cancelled) -> None:
            with lock:
                self._continue(pool, [row], [mixture], config, [cancelled], streamer=streamer)

        return streamed(self.prompts.tokenizer, generate)

    def _continue(
        self,
        pool: AdapterPool,
        rows: Sequence[Sequence[int]],
        mixtures: Sequence[Mapping[str, float]],
        config: GenerationConfig,
        criteria: list[StoppingCriteria],
        **options: Any,
    ) -> list[list[int]]:
        weight: Tensor = self.model.get_input_embeddings().weight
        ids, mask = self.prompts.pad(rows, "left", weight.device)
        if config.stop_strings:
            options["tokenizer"] = self.prompts.tokenizer
        with self._mixer.active(pool, mixtures, self._work(ids, config)), torch.no_grad():
            output = self.model.generate(
                input_ids=ids,
                attention_mask=mask,
                generation_config=config,
                stopping_criteria=StoppingCriteriaList(criteria),
                **options,
            )
        sequences: Tensor = getattr(output, "sequences", output)  # an object with return_dict_in_generate
        return sequences[:, ids.shape[1] :].tolist()

    def _learn(self, lengths: list[int]) -> None:
        """Remembers how long answers are that end by themselves; of those that were cut off nobody knows."""
        for length in lengths:
            self._usual = length if self._usual is None else (1 - _RECENT) * self._usual + _RECENT * length

    def _work(self, ids: Tensor, config: GenerationConfig) -> Work:
        copies = max(config.num_beams or 1, config.num_return_sequences or 1)
        limit = config.max_new_tokens
        steps = limit if self._usual is None else max(config.min_new_tokens or 0, min(limit, self._usual))
        return Work(ids.numel(), len(ids) * copies, steps)
