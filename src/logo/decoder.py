"""`Decoder`: continues prompts with `model.generate`, each under its own mixture."""

from __future__ import annotations

import copy
import time
from collections.abc import Generator, Iterator, Mapping, Sequence
from contextlib import contextmanager, nullcontext
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor
from transformers import GenerationConfig, LogitsProcessorList, StoppingCriteria, StoppingCriteriaList

from logo.adapters.activation import earliest, warn_of_silent
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
from logo.errors import NotFinite, listed
from logo.mixing import Form, Mixer, Mixture
from logo.selection import Selection
from logo.selection.beginnings import Beginnings
from logo.selection.probe import cache_argument

if TYPE_CHECKING:
    from transformers import PreTrainedModel, PreTrainedTokenizerBase
    from transformers.generation.streamers import BaseStreamer


# Transformers' names of caches that hold what a plain one holds; Gemma's checkpoints use the last.
_PLAIN_CACHES = (None, "dynamic", "dynamic_full", "hybrid")


@dataclass(frozen=True)
class Generation:
    """One answer.

    Attributes:
        text: the decoded continuation, special tokens removed, cut before a `stop` text.
        selection: the adapters that gave it.
        token_ids: the tokens of the continuation, with the end token.
        finish_reason: `"stop"` (the model or a stop rule ended it) or `"length"` (it was cut: at the most new tokens,
            or at `max_time`).
        seconds: this prompt's share of the wall time: `{"probe", "generate"}`.
        form: the form of the mixtures in its batch: `"merged"` into the weights, `"gated"` beside them, or
            `"none"` without adapters.
    """

    text: str
    selection: Selection
    token_ids: tuple[int, ...]
    finish_reason: FinishReason
    seconds: dict[str, float]
    form: Form


@dataclass(frozen=True)
class Decoding:
    """How one call continues its prompts.

    Attributes:
        config: the complete config of the call.
        stop_at_newline: see `at_newline`.
        stop: see `at_texts`; answers are cut before them.
        activation: where all adapters act in this call; None: as in the pool.
    """

    config: GenerationConfig
    stop_at_newline: bool | str = False
    stop: tuple[str, ...] = ()
    activation: str | None = None

    @property
    def ends(self) -> set[int]:
        """Token ids that end an answer."""
        return end_tokens(self.config)

    def rules(self, tokenizer: PreTrainedTokenizerBase) -> list[EndRule]:
        """Further rules that end an answer. They replace transformers' own, which also search the prompt for texts."""
        config = self.config
        texts = [config.stop_strings] if isinstance(config.stop_strings, str) else list(config.stop_strings or ())
        rules = [at_texts(tokenizer, some) for some in (texts, self.stop) if some]
        if self.stop_at_newline:
            rules.append(at_newline(tokenizer, official=self.stop_at_newline == "official"))
        return rules

    def generations(
        self,
        tokenizer: PreTrainedTokenizerBase,
        continued: Sequence[tuple[list[int], Form]],
        selections: Sequence[Selection],
        seconds: Mapping[str, float],
    ) -> list[Generation]:
        """Makes answers of rows of new tokens, each up to its end.

        Args:
            continued: new tokens, also those behind the end, and the form of the mixture.
            selections: the mixtures.
            seconds: of each row.
        """
        ends, rules = self.ends, self.rules(tokenizer)
        answers = [cut_after_end(row, ends, rules) for row, _ in continued]
        texts = tokenizer.batch_decode([ids for ids, _ in answers], skip_special_tokens=True)
        return [
            Generation(cut_at(text, self.stop), selection, tuple(ids), reason, dict(seconds), form)
            for text, selection, (ids, reason), (_, form) in zip(texts, selections, answers, continued, strict=True)
        ]


class Decoder:
    """Continues prompts under mixtures.

    Args:
        model: a Hugging Face causal LM.
        prompts: for padding and the tokenizer.
        mixer: of the same model.
        beginnings: the cache of prompt beginnings.
    """

    def __init__(
        self, model: PreTrainedModel, prompts: Prompts, mixer: Mixer, beginnings: Beginnings | None = None
    ) -> None:
        self.model = model
        self.prompts = prompts
        self._mixer = mixer
        self._beginnings = beginnings
        self._told: set[str] = set()  # the adapters of which a warning says that they do not act

    def __call__(
        self,
        pool: AdapterPool,
        decoding: Decoding,
        probed: float,
        rows: Sequence[Sequence[int]],
        selections: Sequence[Selection],
        streamer: BaseStreamer | None = None,
    ) -> list[Generation]:
        """One answer per row of a batch. A row's answer does not depend on the other rows, up to rounding.

        Args:
            pool: fitted to the model.
            decoding: how to decode.
            probed: seconds per row that selecting took.
            rows: token ids of the prompts.
            selections: their mixtures.
            streamer: for a single row; it is also ended after an error, since another thread may wait for it.

        Raises:
            CacheFull: the adapters of the batch do not fit into the memory for adapters.
        """
        started = time.perf_counter()
        rules, acting = decoding.rules(self.prompts.tokenizer), pool.acting(decoding.activation)
        mixtures = [selection.mixture for selection in selections]
        try:
            tokens, form = self._continue(acting, rows, mixtures, decoding.config, rules, streamer=streamer)
        except BaseException:
            if streamer is not None:
                streamer.end()
            raise
        seconds = {"probe": probed, "generate": (time.perf_counter() - started) / len(rows)}
        continued = [(row, form) for row in tokens]
        return decoding.generations(self.prompts.tokenizer, continued, selections, seconds)

    def stream(
        self, pool: AdapterPool, row: Sequence[int], mixture: Mapping[str, float], decoding: Decoding, lock: Any
    ) -> Generator[str]:
        """Yields the text of one continuation in pieces; `lock` is held while it is generated.

        What is cached of the prompt when this is called is there when the stream begins, however much later.
        """
        rules, acting = decoding.rules(self.prompts.tokenizer), pool.acting(decoding.activation)
        kept = self._beginnings if self._reads_ahead(acting, decoding.config) else None
        end = earliest(acting.activations, row)
        pages = [] if kept is None else kept.find(row, end)

        def generate(streamer: Any, cancelled: Cancelled) -> None:
            with lock, nullcontext() if kept is None else kept.held():
                if kept is not None:
                    kept.put_back(row, end, pages)
                self._continue(acting, [row], [mixture], decoding.config, rules, cancelled, streamer=streamer)

        return streamed(self.prompts.tokenizer, generate)

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
        config.stop_strings = None  # the rules contain them
        if rules:
            criteria = (*criteria, EndRows(rules, ids.shape[1], growing=only_grows(config)))
        finite = Finite(stop=options.get("streamer") is not None)
        onset = self._onset(pool, rows, mixtures, ids.shape[1])
        start = onset.read if self._reads_ahead(pool, config) else 0
        if start > 0 and self._beginnings is not None:
            cache = self._beginnings.cache(rows, onset.ends, [max(0, start - pad) for pad in onset.pads])
            cache.batch_repeat_interleave(_copies(config))
            config.cache_implementation = None  # transformers takes either a cache or the name of one
            options[cache_argument(self.model) or ""] = cache
        with (
            self._mixer.active(pool, onset.after(start), _passes(config)) as form,
            _without_checkpoint(self.model),
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
            raise overflow(mixtures[finite.rows[0] * len(rows) // finite.count])
        sequences: Tensor = getattr(output, "sequences", output)  # an object with return_dict_in_generate
        return sequences[:, ids.shape[1] :].tolist(), form

    def _reads_ahead(self, pool: AdapterPool, config: GenerationConfig) -> bool:
        """Whether the base model alone reads the tokens before adapters act, from the cache of beginnings."""
        cached = config.use_cache is not False and config.cache_implementation in _PLAIN_CACHES
        return self._beginnings is not None and pool.read_once and cached

    def _onset(
        self, pool: AdapterPool, rows: Sequence[Sequence[int]], mixtures: Sequence[Mapping[str, float]], width: int
    ) -> Onset:
        """Where the adapters of a batch begin to act; warns once of each adapter that does not."""
        made = Onset.of(pool, rows, mixtures, width)
        warn_of_silent(made.silent, self._told)
        return made


@dataclass(frozen=True)
class Onset:
    """Where the adapters of a batch begin to act.

    Attributes:
        pads: columns before each row's first token.
        ends: tokens of each row before any adapter of the pool acts; less than all of them.
        mixtures: per row, the adapters that act; their columns are positions in the row.
        silent: the adapters that do not act, one entry for each row.
    """

    pads: tuple[int, ...]
    ends: tuple[int, ...]
    mixtures: tuple[Mixture, ...]
    silent: tuple[str, ...]

    @classmethod
    def of(
        cls, pool: AdapterPool, rows: Sequence[Sequence[int]], mixtures: Sequence[Mapping[str, float]], width: int
    ) -> Onset:
        """The onset of rows that are padded on the left to `width` columns.

        Raises:
            UsageError: see `Mixture.of`.
        """
        pads = tuple(width - len(row) for row in rows)
        found = tuple(Mixture.of(pool, mixture, row) for row, mixture in zip(rows, mixtures, strict=True))
        ends = tuple(earliest(pool.activations, row) for row in rows)
        both = zip(mixtures, found, strict=True)
        silent = tuple(name for mixture, acting in both for name in mixture if name not in acting.weights)
        return cls(pads, ends, found, silent)

    @property
    def read(self) -> int:
        """The first column in which an adapter may act."""
        return min(pad + end for pad, end in zip(self.pads, self.ends, strict=True))

    def after(self, start: int) -> list[Mixture]:
        """The mixtures of a batch whose columns before `start` are read already."""
        return [mixture.shifted(pad, start) for mixture, pad in zip(self.mixtures, self.pads, strict=True)]


def _passes(config: GenerationConfig) -> float:
    """The forward passes that a call is expected to take; most answers are shorter than it allows."""
    return float(max(config.min_new_tokens or 0, config.max_new_tokens / 4))


def _copies(config: GenerationConfig) -> int:
    return max(config.num_beams or 1, config.num_return_sequences or 1)


@contextmanager
def _without_checkpoint(model: PreTrainedModel) -> Iterator[None]:
    """Sets the checkpoint's generation config aside inside the block, since transformers would fill in from it what the
    config of the call leaves open."""
    own = model.generation_config
    model.generation_config = GenerationConfig()
    try:
        yield
    finally:
        model.generation_config = own


def overflow(mixture: Mapping[str, float]) -> NotFinite:
    """The error for a mixture that overflows; it names the adapters with the largest weights."""
    names = sorted(mixture, key=lambda name: -abs(mixture[name]))
    under = f"with the adapters {listed(list(map(repr, names)))}" if names else "with no adapter"
    return NotFinite(f"{OVERFLOW} ({under})")
