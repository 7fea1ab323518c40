"""`Decoder`: prompts and a mixture for each, continued by `model.generate`."""

from __future__ import annotations

import copy
import time
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor
from transformers import GenerationConfig, LogitsProcessorList, StoppingCriteria, StoppingCriteriaList

from logo.adapters.pool import AdapterPool
from logo.decoding import OVERFLOW, Cancelled, Finite, Prompts, input_device, streamed
from logo.endings import (
    EndRows,
    EndRule,
    FinishReason,
    at_newline,
    at_texts,
    cut_after_end,
    cut_at,
    end_tokens,
    only_grows,
)
from logo.errors import NotFinite, StoreFull
from logo.mixing import Form, Mixer, Work
from logo.mixing.costs import EXPECTED
from logo.selection import Selection

if TYPE_CHECKING:
    from transformers import PreTrainedModel
    from transformers.generation.streamers import BaseStreamer


@dataclass(frozen=True)
class Generation:
    """One answer.

    Attributes:
        text: the decoded continuation, special tokens removed, cut before a `stop` text.
        selection: which adapters gave it.
        token_ids: the continuation's tokens, its end token included.
        finish_reason: `"stop"` (the model or a stop rule ended it) or `"length"`.
        seconds: this prompt's share of the wall time: `{"probe", "generate"}`.
        form: how mixtures acted in its batch: `"folded"` into the weights, `"gated"` beside them, `"routed"` token by
            token, or not at all (`"base"`).
    """

    text: str
    selection: Selection
    token_ids: tuple[int, ...]
    finish_reason: FinishReason
    seconds: dict[str, float]
    form: Form


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

    def __call__(
        self,
        pool: AdapterPool,
        config: GenerationConfig,
        stop_at_newline: bool | str,
        stop: Sequence[str],
        probed: float,
        rows: Sequence[Sequence[int]],
        selections: Sequence[Selection],
        streamer: BaseStreamer | None = None,
    ) -> list[Generation]:
        """One answer per row of a batch. What an answer holds follows from its own row alone, to rounding.

        A batch whose adapters need more memory than adapters may have is answered in halves.

        Args:
            pool: fitted to the model.
            config: how to decode.
            stop_at_newline: see `at_newline`.
            stop: see `at_texts`; answers are cut before them.
            probed: seconds that selecting took, per row.
            rows: token ids of the prompts.
            selections: their mixtures.
            streamer: of a single row; ended whatever happens, since somebody may wait for it in another thread.

        Raises:
            StoreFull: the adapters of one row need more memory than adapters may have.
        """
        started = time.perf_counter()
        tokenizer = self.prompts.tokenizer
        rules = self._rules(config)
        if stop:
            rules.append(at_texts(tokenizer, stop))
        if stop_at_newline:
            rules.append(at_newline(tokenizer, official=stop_at_newline == "official"))
        mixtures = [selection.mixture for selection in selections]
        try:
            continued = self._in_parts(pool, rows, mixtures, config, rules, streamer)
        except BaseException:
            if streamer is not None:
                streamer.end()
            raise
        ends = end_tokens(config, self.model.generation_config)
        answers = [cut_after_end(row, ends, config.max_new_tokens, rules) for row, _ in continued]
        texts = tokenizer.batch_decode([ids for ids, _ in answers], skip_special_tokens=True)
        seconds = {"probe": probed, "generate": (time.perf_counter() - started) / len(rows)}
        return [
            Generation(cut_at(text, stop), selection, tuple(ids), reason, dict(seconds), form)
            for text, selection, (ids, reason), (_, form) in zip(texts, selections, answers, continued, strict=True)
        ]

    def stream(
        self, pool: AdapterPool, row: Sequence[int], mixture: Mapping[str, float], config: GenerationConfig, lock: Any
    ) -> Iterator[str]:
        """The text of one continuation piece by piece; `lock` is held while it is generated."""

        def generate(streamer: Any, cancelled: Cancelled) -> None:
            with lock:
                self._continue(pool, [row], [mixture], config, self._rules(config), cancelled, streamer=streamer)

        return streamed(self.prompts.tokenizer, generate)

    def _in_parts(
        self,
        pool: AdapterPool,
        rows: Sequence[Sequence[int]],
        mixtures: Sequence[Mapping[str, float]],
        config: GenerationConfig,
        rules: Sequence[EndRule],
        streamer: BaseStreamer | None,
    ) -> list[tuple[list[int], Form]]:
        """Each row's new tokens and form: of all rows at once, or of halves where their adapters do not fit."""
        try:
            tokens, form = self._continue(pool, rows, mixtures, config, rules, streamer=streamer)
        except StoreFull:
            if len(rows) == 1:
                raise
        else:
            return [(row, form) for row in tokens]
        middle = len(rows) // 2
        halves = (slice(middle), slice(middle, None))
        return [
            one for half in halves for one in self._in_parts(pool, rows[half], mixtures[half], config, rules, streamer)
        ]

    def _continue(
        self,
        pool: AdapterPool,
        rows: Sequence[Sequence[int]],
        mixtures: Sequence[Mapping[str, float]],
        config: GenerationConfig,
        rules: Sequence[EndRule],
        *criteria: StoppingCriteria,
        **options: Any,
    ) -> tuple[list[list[int]], Form]:
        ids, mask = self.prompts.pad(rows, "left", input_device(self.model))
        config = copy.copy(config)
        config.stop_strings = None  # they are among the rules
        if rules:
            criteria = (*criteria, EndRows(rules, ids.shape[1], growing=only_grows(config)))
        finite = Finite(stop=options.get("streamer") is not None)
        with (
            self._mixer.active(pool, mixtures, self._work(ids, config)) as form,
            _without_stop_strings(self.model.generation_config),
            torch.no_grad(),
        ):
            output = self.model.generate(
                input_ids=ids,
                attention_mask=mask,
                generation_config=config,
                stopping_criteria=StoppingCriteriaList(criteria),
                logits_processor=LogitsProcessorList([finite]),
                **options,
            )
        if finite.rows:
            raise _overflow(mixtures[finite.rows[0] * len(rows) // finite.count])
        sequences: Tensor = getattr(output, "sequences", output)  # an object with return_dict_in_generate
        return sequences[:, ids.shape[1] :].tolist(), form

    def _rules(self, config: GenerationConfig) -> list[EndRule]:
        """What ends a row by the config, end tokens apart: transformers would look for its texts in the prompt too."""
        texts = [config.stop_strings] if isinstance(config.stop_strings, str) else list(config.stop_strings or ())
        return [at_texts(self.prompts.tokenizer, texts)] if texts else []

    def _work(self, ids: Tensor, config: GenerationConfig) -> Work:
        copies = max(config.num_beams or 1, config.num_return_sequences or 1)
        steps = max(config.min_new_tokens or 0, EXPECTED * config.max_new_tokens)
        return Work(ids.numel(), len(ids) * copies, steps)


@contextmanager
def _without_stop_strings(checkpoint: GenerationConfig) -> Iterator[None]:
    """Transformers would take the checkpoint's own where a call has none, and ask for a tokenizer."""
    own = checkpoint.stop_strings
    checkpoint.stop_strings = None
    try:
        yield
    finally:
        checkpoint.stop_strings = own


def _overflow(mixture: Mapping[str, float]) -> NotFinite:
    """Names the adapters that weigh most."""
    names = sorted(mixture, key=lambda name: -abs(mixture[name]))
    listed = ", ".join(map(repr, names[:3])) + (f" and {len(names) - 3} more" if len(names) > 3 else "")
    under = f"with the adapters {listed}" if names else "with no adapter"
    return NotFinite(f"{OVERFLOW} ({under})")
