"""How prompts are continued: the generation config of a call, rules that end an answer, batches, and `Decoder`.

rows + mixtures -> Mixer.active -> model.generate -> Generation
"""

from __future__ import annotations

import copy
import itertools
import math
import time
from collections.abc import Callable, Collection, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from numbers import Integral, Real
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor
from transformers import (
    GenerationConfig,
    LogitsProcessor,
    LogitsProcessorList,
    StoppingCriteria,
    StoppingCriteriaList,
)
from transformers.generation import GenerationMode
from transformers.generation.streamers import BaseStreamer

from logo.adapters.activation import EVERYWHERE, earliest, warn_of_silent
from logo.adapters.pool import AdapterPool
from logo.core import AnswerOptions, Form, Generation, Selection
from logo.endings import (
    EndRule,
    at_newline,
    at_stop_strings,
    at_texts,
    cut_after_end,
    cut_at,
    end_tokens,
)
from logo.errors import LoGoError, NotFinite, UsageError, check_type, closest, listed
from logo.mixing.mixer import PASS, Mixer, Mixture
from logo.models import device_of, lock_of, padded, without_autocast
from logo.prefix_cache import PrefixCache, cache_argument
from logo.prompts import Prompts
from logo.streams import BackgroundAnswer, Stream
from logo.text import Text

if TYPE_CHECKING:
    from transformers import PreTrainedModel, PreTrainedTokenizerBase

OVERFLOW = (
    "the model's output is not finite with this mixture of adapters, so nothing can be generated from it: an adapter "
    "is damaged, or too large for the model's dtype; leave that adapter out, or use float32"
)
# Refused options -> those to use: names of other libraries, and lengths that would include the padding of a prompt.
_INSTEAD = {
    **dict.fromkeys(("max_tokens", "max_completion_tokens", "max_length"), "max_new_tokens"),
    **dict.fromkeys(("min_tokens", "min_length"), "min_new_tokens"),
}
_KNOWN = frozenset(name for name in vars(GenerationConfig()) if not name.startswith("_")) - _INSTEAD.keys()
# What a config leaves open, for greedy decoding or plain sampling.
_PLAIN = {"do_sample": False, "num_beams": 1, "repetition_penalty": 1.0, "no_repeat_ngram_size": 0}
_PLAIN |= {"temperature": 1.0, "top_p": 1.0, "top_k": 50}
# What a config leaves open, which the checkpoint says without a choice of how to decode.
_OF_CHECKPOINT = ("bos_token_id", "eos_token_id", "stop_strings", "cache_implementation")
# Numbers: above 0, from 0 on, or any; those that are `_WHOLE`, all others floats, also where a whole one is given.
_ABOVE_0 = ("temperature", "top_p", "repetition_penalty", "num_beams", "max_time")
_FROM_0 = ("top_k", "min_new_tokens")
_ANY_NUMBER = ("length_penalty",)
_WHOLE = ("num_beams", "top_k", "min_new_tokens")
_SAMPLING = ("temperature", "top_p", "top_k")
_LEAST_TEMPERATURE = 1e-30  # logits in float32 that are divided by a smaller one are infinite
_MODES = ("greedy_search", "sample", "beam_search", "beam_sample")
# Transformers' names of caches that hold what a plain one holds; Gemma's checkpoints use the last.
_PLAIN_CACHES = (None, "dynamic", "dynamic_full", "hybrid")


def call_config(
    prompts: Prompts,
    config: GenerationConfig | None,
    options: Mapping[str, Any],
    max_new_tokens: int | None = None,
    checkpoint: GenerationConfig | None = None,
) -> GenerationConfig:
    """A copy of a config (None: an empty one) with the options of a call applied.

    What neither says is greedy or plain sampling; of the checkpoint's config, only end tokens and stop texts count.

    Raises:
        UsageError: an option that does not exist or cannot be used here, a config that transformers refuses or whose
            length counts the prompt's tokens, or no new tokens.
    """
    for name in options:
        if name in _INSTEAD:
            raise UsageError(f"generation option {name!r} cannot be used here: give {_INSTEAD[name]!r} instead")
        if name not in _KNOWN:
            hint = closest(name, sorted(_KNOWN | AnswerOptions.__optional_keys__))
            expected = (
                "one such as k, candidates or stop (`logo.core.AnswerOptions`), or of transformers.GenerationConfig"
            )
            raise UsageError(f"unknown generation option {name!r}{hint}: expected {expected}")
    if config is not None:
        check_type("generation_config", config, GenerationConfig, "a transformers.GenerationConfig")
    try:
        complete = GenerationConfig() if config is None else copy.deepcopy(config)
        complete.update(**options)
    except (AttributeError, TypeError, ValueError) as error:
        raise _refused(error) from error
    complete.pad_token_id = 0  # any token that the model knows; a mask hides it
    defaults: dict[str, Any] = dict(_PLAIN)
    if checkpoint is not None:
        defaults |= {name: getattr(checkpoint, name) for name in _OF_CHECKPOINT}
    for name, value in defaults.items():
        if getattr(complete, name) is None:
            setattr(complete, name, copy.deepcopy(value))
    _check_values(complete)
    most = complete.max_new_tokens if max_new_tokens is None else max_new_tokens
    if most is None and complete.max_length is not None:
        raise UsageError(
            f"generation_config: max_length {complete.max_length} counts the prompt's tokens, too, which differ from "
            "row to row: give max_new_tokens instead"
        )
    complete.max_new_tokens = prompts.room(most)
    complete.max_length = None
    return complete


def _refused(error: Exception) -> UsageError:
    return UsageError(f"generation options: transformers refuses them: {' '.join(str(error).split())}")


def _check_values(config: GenerationConfig) -> None:
    for name in (*_ABOVE_0, *_FROM_0, *_ANY_NUMBER):
        value = getattr(config, name)
        if value is None or (name in _SAMPLING and not config.do_sample):
            continue
        setattr(config, name, _checked_number(name, value))
    if config.do_sample and config.top_p is not None and config.top_p > 1:
        raise UsageError(f"top_p: expected a share above 0 and up to 1, found {config.top_p!r:.60}")
    if config.do_sample and config.temperature is not None and config.temperature < _LEAST_TEMPERATURE:
        raise UsageError(
            f"temperature: expected {_LEAST_TEMPERATURE:g} or more, found {config.temperature:g}; do_sample=False "
            "always takes the likeliest token"
        )
    mode = config.get_generation_mode()
    if mode not in _MODES or config.num_return_sequences not in (None, 1):
        raise UsageError(
            f"generation options: expected greedy decoding, sampling or beam search with one answer per prompt, found "
            f"{GenerationMode(mode).value} with {config.num_return_sequences or 1}"
        )


def _checked_number(name: str, value: Any) -> float | int:
    """The value of an option as the number that transformers expects; UsageError unless it is one in its range."""
    number = float(value) if isinstance(value, Real) else math.nan
    if name in _ABOVE_0:
        expected = "a number above 0"
        in_range = number > 0
    elif name in _FROM_0:
        expected = "0 or more"
        in_range = number >= 0
    else:
        expected = "a number"
        in_range = not math.isnan(number)
    if not in_range:
        raise UsageError(f"{name}: expected {expected}, found {value!r:.60}")
    if name not in _WHOLE:
        return number
    if not number.is_integer():
        raise UsageError(f"{name}: expected a whole number, found {value!r:.60}")
    return int(number)


def check_batch_size(batch_size: Any) -> None:
    """Raises UsageError unless it is a number of rows."""
    if type(batch_size) is bool or not isinstance(batch_size, Integral) or batch_size <= 0:
        raise UsageError(f"batch_size: expected a whole number, 1 or more, found {batch_size!r:.60}")


def check_streamable(rows: int, config: GenerationConfig) -> None:
    """Raises UsageError unless there is one answer, which is made without beams."""
    if rows != 1:
        raise UsageError(f"streaming: expected a single prompt, found {rows}; ask for them one by one")
    if (config.num_beams or 1) != 1:
        raise UsageError(f"streaming: beam search changes sent tokens; leave out num_beams={config.num_beams}")


@contextmanager
def ended_by_errors(streamer: BaseStreamer | None) -> Iterator[None]:
    """Ends a streamer after an error in the block, since another thread may wait for it."""
    try:
        yield
    except BaseException:
        if streamer is not None:
            streamer.end()
        raise


@dataclass(frozen=True)
class Decoding:
    """How one call continues its prompts.

    Attributes:
        config: the complete config of the call.
        stop_at_newline: see `at_newline`.
        stop: see `at_texts`; answers are cut before them.
    """

    config: GenerationConfig
    stop_at_newline: bool | str = False
    stop: tuple[str, ...] = ()

    @classmethod
    def of(cls, config: GenerationConfig, stop_at_newline: Any, stop: Any) -> Decoding:
        """Checks what a user gives.

        Raises:
            UsageError: `stop` is no texts, or `stop_at_newline` is neither True, False nor `"official"`.
        """
        texts = [stop] if isinstance(stop, str) else stop
        if not isinstance(texts, Collection) or not all(isinstance(text, str) for text in texts):
            raise UsageError(f"stop: expected a text or a list of texts, found {stop!r:.60}")
        if not isinstance(stop_at_newline, bool) and stop_at_newline != "official":
            raise UsageError(f"stop_at_newline: expected True, False or 'official', found {stop_at_newline!r:.60}")
        return cls(config, stop_at_newline, tuple(text for text in texts if text))

    def rules(self, tokenizer: PreTrainedTokenizerBase) -> list[EndRule]:
        """Further rules that end an answer. They replace transformers' own, which also search the prompt for texts."""
        rules = at_stop_strings(self.config, tokenizer)
        if self.stop:
            rules.append(at_texts(tokenizer, self.stop))
        if self.stop_at_newline:
            rules.append(at_newline(tokenizer, official=self.stop_at_newline == "official"))
        return rules

    def generations(
        self,
        tokenizer: PreTrainedTokenizerBase,
        continued: Sequence[tuple[list[int], Form]],
        selections: Sequence[Selection],
        seconds: float,
    ) -> list[Generation]:
        """Makes answers of rows of new tokens (also those behind the end) and forms of mixtures; `seconds` per row."""
        ends = end_tokens(self.config)
        rules = self.rules(tokenizer)
        answers = [cut_after_end(row, ends, rules) for row, _ in continued]
        texts = tokenizer.batch_decode([ids for ids, _ in answers], skip_special_tokens=True)
        return [
            Generation(cut_at(text, self.stop), selection, tuple(ids), reason, {"generate": seconds}, form)
            for text, selection, (ids, reason), (_, form) in zip(texts, selections, answers, continued, strict=True)
        ]


class EndRows(StoppingCriteria):  # type: ignore[misc]
    """Ends each row of a batch by rules on its new tokens, those from `prompt_length` on, which counts padding; so
    nothing in a prompt ends its answer."""

    def __init__(self, rules: Sequence[EndRule], prompt_length: int) -> None:
        self._rules = rules
        self._prompt_length = prompt_length

    def __call__(self, input_ids: Tensor, scores: Tensor | None = None, **kwargs: Any) -> Tensor:
        rows = input_ids[:, self._prompt_length :].tolist()
        return torch.tensor([any(rule(row) for rule in self._rules) for row in rows], device=input_ids.device)


class _Finite(LogitsProcessor):  # type: ignore[misc]
    """Finds rows with a step whose largest logit is not finite, where argmax would silently return token 0.

    Such logits become zeros, since sampling from NaN crashes a GPU. With `stop`, for streams, the first raises.
    """

    def __init__(self, *, stop: bool) -> None:
        self._stop = stop
        self._finite: Tensor | None = None

    def __call__(self, input_ids: Tensor, scores: Tensor) -> Tensor:
        finite = scores.max(dim=-1).values.isfinite()  # (rows,)
        self._finite = finite if self._finite is None else self._finite & finite
        if self._stop and not bool(self._finite.all()):
            raise NotFinite(OVERFLOW)
        return scores.masked_fill(~finite[:, None], 0.0)

    @property
    def used(self) -> bool:
        """Whether the model has read the prompts."""
        return self._finite is not None

    def first(self, rows: int) -> int | None:
        """The first of so many rows, each of which may have several beams, with such a step; None: there is none."""
        if self._finite is None or bool(self._finite.all()):
            return None
        return int((~self._finite).nonzero()[0]) * rows // len(self._finite)


def batches_by_length(
    lengths: Sequence[int], size: int, *, padded: bool = True, tokens: int | None = None
) -> Iterator[list[int]]:
    """Indices in batches of at most `size`, longest first, so that rows of one batch need little padding; not `padded`,
    they all have the same length. `tokens` are the most of a batch of several rows, with padding."""
    order = sorted(range(len(lengths)), key=lambda i: (-lengths[i], i))
    alike = [order] if padded else [list(rows) for _, rows in itertools.groupby(order, key=lambda i: lengths[i])]
    for rows in alike:
        start = 0
        while start < len(rows):
            count = size if tokens is None else max(1, min(size, tokens // max(1, lengths[rows[start]])))
            yield rows[start : start + count]
            start += count


def reads_prompts(config: GenerationConfig) -> bool:
    """Whether decoding depends on the tokens of prompts, as some logits processors do.

    Transformers gives them the padding, too, so that a row's answer would depend on the other rows of its batch.
    """
    penalties = (config.repetition_penalty, config.encoder_repetition_penalty)
    counts = (config.no_repeat_ngram_size, config.encoder_no_repeat_ngram_size, config.min_length)
    if config.forced_bos_token_id is not None or config.watermarking_config is not None:
        return True
    return any(value not in (None, 1.0) for value in penalties) or any(counts)


@dataclass(frozen=True)
class Batch:
    """Prompts that are continued together, each under its own mixture.

    Attributes:
        pool: fitted to the model.
        rows: token ids of the prompts.
        selections: their mixtures.
        decoding: how to decode.
    """

    pool: AdapterPool
    rows: Sequence[Sequence[int]]
    selections: Sequence[Selection]
    decoding: Decoding


@dataclass(frozen=True)
class Decoder:
    """Continues batches with `model.generate`.

    Attributes:
        model: a Hugging Face causal LM.
        prompts: for padding and the tokenizer.
        mixer: of the same model.
        prefix_cache: of what the base model reads before adapters act; None: the model keeps more than keys and values.
    """

    model: PreTrainedModel
    prompts: Prompts
    mixer: Mixer
    prefix_cache: PrefixCache | None = None
    _warned: set[str] = field(default_factory=set)  # the adapters of which a warning says that they do not act

    def __call__(self, batch: Batch, streamer: BaseStreamer | None = None) -> list[Generation]:
        """One answer per row, which does not depend on the other rows, up to rounding; a streamer is for one row.

        Raises:
            CacheFull: the adapters of the batch do not fit into the memory for adapters.
            NotFinite: a mixture overflows.
        """
        started = time.perf_counter()
        rows, form = self._continue(batch, streamer=streamer)
        seconds = (time.perf_counter() - started) / len(rows)
        continued = [(row, form) for row in rows]
        return batch.decoding.generations(self.prompts.tokenizer, continued, batch.selections, seconds)

    def stream(self, batch: Batch, begin: Callable[[], object]) -> Stream:
        """The text of the continuation of one row in pieces, up to a stop text, while another thread generates it,
        which calls `begin` first."""

        def generate(streamer: BaseStreamer, left: StoppingCriteria) -> None:
            begin()
            self._continue(batch, left, streamer=streamer)

        text = Text(self.prompts.tokenizer, batch.decoding.stop)
        answer = BackgroundAnswer(text, lock_of(self.model), generate)
        return Stream(answer.pieces(), answer.begin, answer.end)

    def _continue(
        self, batch: Batch, *criteria: StoppingCriteria, streamer: BaseStreamer | None = None
    ) -> tuple[list[list[int]], Form]:
        """The new tokens of each row, also those behind its end, and the form of the mixtures."""
        config = copy.copy(batch.decoding.config)
        config.stop_strings = None  # the rules contain them
        config.disable_compile = True  # what is compiled does not see gates that are hooked in later
        ids, mask = padded(batch.rows, device_of(self.model.get_input_embeddings()), left=True)
        rules = batch.decoding.rules(self.prompts.tokenizer)
        if rules:
            criteria = (*criteria, EndRows(rules, ids.shape[1]))
        finite = _Finite(stop=streamer is not None)
        cached: dict[str, Any] = {}
        if batch.pool.activations == (EVERYWHERE,):
            mixtures = [Mixture(selection.mixture) for selection in batch.selections]
        else:
            mixtures, cached = self._prefilled(batch, config)
        passes = max(config.min_new_tokens or 0, config.max_new_tokens / 4)  # most answers are shorter than they may be
        with (
            self.mixer.active(batch.pool, mixtures, ids.shape[1] + PASS * passes) as form,
            _without_checkpoint(self.model),
            torch.no_grad(),
        ):
            try:
                output = self.model.generate(
                    input_ids=ids,
                    attention_mask=mask,
                    generation_config=config,
                    stopping_criteria=StoppingCriteriaList(criteria),
                    logits_processor=LogitsProcessorList([finite]),
                    streamer=streamer,
                    **cached,
                )
            except (AssertionError, TypeError, ValueError) as error:
                if finite.used or isinstance(error, LoGoError):
                    raise
                raise _refused(error) from error  # a value that transformers looks at only now
        overflown = finite.first(len(batch.rows))
        if overflown is not None:
            raise overflow(batch.selections[overflown].mixture)
        sequences: Tensor = getattr(output, "sequences", output)  # an object with return_dict_in_generate
        return sequences[:, ids.shape[1] :].tolist(), form

    def _prefilled(self, batch: Batch, config: GenerationConfig) -> tuple[list[Mixture], dict[str, Any]]:
        """The mixtures of rows, padded on the left, some of whose adapters act from a position on only; and, if the
        base model alone reads what stands before, the model's argument with the keys and values of that."""
        if config.guidance_scale not in (None, 1):
            what = "reads prompts a second time from another position, where adapters of this pool do not act"
            raise UsageError(f"generation option 'guidance_scale' {what}; leave it out")
        mixtures = [selection.mixture for selection in batch.selections]
        acting = [Mixture.of(batch.pool, mixture, row) for mixture, row in zip(mixtures, batch.rows, strict=True)]
        for mixture, act in zip(mixtures, acting, strict=True):
            warn_of_silent((name for name in mixture if name not in act.weights), self._warned)
        width = max(map(len, batch.rows))
        pads = [width - len(row) for row in batch.rows]
        read, cached = self._cached_beginning(batch, config, pads)
        return [mixture.shifted(pad, read) for mixture, pad in zip(acting, pads, strict=True)], cached

    def _cached_beginning(
        self, batch: Batch, config: GenerationConfig, pads: Sequence[int]
    ) -> tuple[int, dict[str, Any]]:
        """How many columns the base model alone has read of a batch, and the model's argument with their keys and
        values; 0 and nothing if the mixture reads everything."""
        if self.prefix_cache is None or not self._reads_ahead(batch.pool, config):
            return 0, {}
        ends = [earliest(batch.pool.activations, row) for row in batch.rows]
        read = min(pad + end for pad, end in zip(pads, ends, strict=True))  # before, no adapter acts in any row
        if not read:
            return 0, {}
        # What is cached with a mixture in it, or rounded by a caller's autocast, would be wrong for ever.
        with self.mixer.active(batch.pool, ()), without_autocast(self.model)():
            cache = self.prefix_cache.cache(batch.rows, ends, [max(0, read - pad) for pad in pads])
        cache.batch_repeat_interleave(max(config.num_beams or 1, config.num_return_sequences or 1))
        config.cache_implementation = None  # transformers takes either a cache or the name of one
        return read, {cache_argument(self.model) or "": cache}

    def _reads_ahead(self, pool: AdapterPool, config: GenerationConfig) -> bool:
        """Whether the base model alone reads the tokens before adapters act, with the prefix cache."""
        plain = config.use_cache is not False and config.cache_implementation in _PLAIN_CACHES
        return self.prefix_cache is not None and pool.read_once and plain


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
    """The error for a mixture that overflows, with the names of the largest weights."""
    names = sorted(mixture, key=lambda name: -abs(mixture[name]))
    under = f"with the adapters {listed(list(map(repr, names)))}" if names else "with no adapter"
    return NotFinite(f"{OVERFLOW} ({under})")
